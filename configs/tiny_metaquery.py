"""UniPic2-Tiny-MetaQuery: the language model of configs/tiny_vlm.py conditions the transformer of UniPic2-Tiny.

First queries and connector are aligned with the transformer frozen, then both are trained together (paper, section 3.1); the
language model stays as it is. `--config.parts.vlm=DIR` names its folder.
"""

from ml_collections import ConfigDict

from configs.shapes import evaluations
from unipic2_jax.pipelines import TINY
from unipic2_jax.training.config import make_config

CONNECTOR, WITH_TRANSFORMER = "^conditioner/conditioner/", "^(conditioner/conditioner|transformer)/"

# What is learned last, of both tasks.
WEIGHTS = {
    "position": 4.0,
    "color_attr": 3.0,
    "two_object": 2.0,
    "counting": 2.0,
    "replace": 2.0,
    "recolor": 2.0,
    "move": 2.0,
    "arrange": 2.0,
}


def flow_stage(trainable: str, steps: int, lr: float, smoke: bool, **fields) -> dict:
    """A stage of flow matching on both tasks."""
    steps = 4 if smoke else steps
    return {
        "kind": "flow",
        "steps": steps,
        "save_every": 500,
        "log_every": 10,
        "data": {"kind": "shapes"},
        "pool": 256 if smoke else 20480,
        "batch_size": 8 if smoke else 64,
        "caption_dropout": {"t2i": 0.1, "edit": 0.1},
        "timesteps": {"kind": "logit_normal", "shift": 5.0},
        "evaluations": evaluations(2, 1) if smoke else evaluations(100, 2),
        "optimizer": {
            "lr": lr,
            "schedule": "trapezoid",
            "warmup": min(200, steps // 2),
            "weight_decay": 0.02,
            "trainable": trainable,
        },
        **fields,
    }


def get_config(arg: str = "") -> ConfigDict:
    """`arg` is empty, or 'smoke' for a few steps."""
    smoke = {"": False, "smoke": True}[arg]
    # Editing comes back soon, since the transformer can do it.
    mixture = {"data": {"kind": "shapes", "weights": WEIGHTS}, "tasks": ("t2i", "t2i", "edit")}
    return make_config(
        {
            "model": "tiny_metaquery",
            "parts": {"transformer": f"{TINY}/transformer", "vae": f"{TINY}/vae", "vlm": "runs/tiny_vlm/half/vlm"},
            "schedule": ("connector", "unified"),
            "stages": {
                "connector": flow_stage(CONNECTOR, 1000, 1e-3, smoke),
                "unified": flow_stage(WITH_TRANSFORMER, 6000, 5e-4, smoke, pool=256 if smoke else 30720, **mixture),
            },
        }
    )
