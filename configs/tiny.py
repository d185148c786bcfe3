"""UniPic2-Tiny, second part: text encoders and Kontext transformer jointly, from nothing, T2I and edits alternating.

Starts from the model that configs/tiny_vae.py exports: `--config.init=DIR`. `base` gives every tag and edit type but the
hardest the same share; edits are learned long before text-to-image, so `hard` spends four batches of five on text-to-image
and draws more of what is still wrong: positions, colour binding, moves, and moves relative to another object.
"""

from ml_collections import ConfigDict

from configs import pretraining
from unipic2_jax.shapes.heldout import evaluations
from unipic2_jax.training.config import make_config

# What is learned last.
HARD = {"position": 4.0, "color_attr": 3.0, "two_object": 2.0, "counting": 2.0, "move": 6.0, "arrange": 6.0}


def flow_stage(steps: int, smoke: bool, schedule: str, **fields) -> dict:
    """What both stages share. Guidance needs an unconditional branch, and nothing here was pre-trained with one."""
    fields |= {"pool": 256 if smoke else 40960, "batch_size": 64, "validation": {}}
    fields["evaluations"] = evaluations(6, 1) if smoke else evaluations(200, 4)
    fields["optimizer"] = {"schedule": schedule, "warmup": 2 if smoke else 200}
    return pretraining.tiny_stage("^(transformer|conditioner)/", steps, 1e-3, smoke, **fields)


def get_config(arg: str = "") -> ConfigDict:
    """`arg` is empty, or 'smoke' for a few steps."""
    smoke = {"": False, "smoke": True}[arg]
    stages = {
        "base": flow_stage(5000, smoke, "constant", data={"kind": "shapes", "weights": {"arrange": 0.0}}),
        "hard": flow_stage(
            4000,
            smoke,
            "trapezoid",
            data={"kind": "shapes", "weights": HARD},
            tasks=("t2i", "t2i", "t2i", "t2i", "edit"),
        ),
    }
    return make_config({"model": "tiny", "schedule": ("base", "hard"), "stages": stages})
