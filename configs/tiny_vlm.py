"""The vision-language model of UniPic2-Tiny-MetaQuery, from nothing: questions about scenes of the shapes world.

`single` shows one object at a time: what it is, how large, and where; beside others sizes are hardly learned at all. `several` is
everything, token by token, so that captions and lists count most, which need all of a scene. `answers` is the same with every
answer counting the same: one word that says a colour would else take thousands of steps. `named` asks more often what is learned
last, where an object is that a question names, and at half the rate: at 1e-3 that hardly improves.
"""

from ml_collections import ConfigDict

from unipic2_jax.shapes.questions import ALL_TAGS, QUESTION_TAGS
from unipic2_jax.training.config import make_config


def vlm_stage(steps: int, smoke: bool, pool: int, lr: float, schedule: str = "trapezoid", **fields) -> dict:
    """What the stages share."""
    steps = 4 if smoke else steps
    return {
        "kind": "vlm",
        "steps": steps,
        "save_every": 500,
        "eval_every": 0 if smoke else 500,
        "log_every": 10,
        "heldout": {"kind": "shapes", "split": "heldout"},
        "measure": 12 if smoke else 300,
        "pool": 256 if smoke else pool,
        # Later it reads prompts without the template's first lines and in plain positions; so small a model has to be used to it.
        "forms": ("chat", "conditioner"),
        "text_length": 66,
        "optimizer": {
            "lr": lr,
            "schedule": schedule,
            "warmup": min(100, steps // 2),
            "weight_decay": 0.02,
            "end_lr": 1e-5,
        },
        **fields,
    }


def get_config(arg: str = "") -> ConfigDict:
    """`arg` is empty, or 'smoke' for a few steps."""
    smoke = {"": False, "smoke": True}[arg]
    everything = {"kind": "shapes", "tags": ALL_TAGS}
    named = {"kind": "shapes", "tags": (*QUESTION_TAGS, "where", "box", "ground")}
    stages = {
        "single": vlm_stage(400, smoke, 10240, 1e-3, data={**everything, "most": 1}, equal_answers=True),
        "several": vlm_stage(1000, smoke, 40960, 2e-3, "constant", data=everything),
        "answers": vlm_stage(2400, smoke, 40960, 1e-3, data=everything, equal_answers=True),
        "named": vlm_stage(1800, smoke, 40960, 5e-4, data=named, equal_answers=True),
    }
    return make_config({"model": "tiny_metaquery", "schedule": tuple(stages), "stages": stages})
