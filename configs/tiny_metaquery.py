"""UniPic2-Tiny-MetaQuery: the vision-language model of configs/tiny_vlm.py conditions the transformer of UniPic2-Tiny.

First queries and connector are aligned with the transformer frozen, then both are trained together (paper, section 3.1); the
vision-language model stays as it is. `--config.parts.vlm=DIR` names its folder.
"""

from ml_collections import ConfigDict

from configs import pretraining
from unipic2_jax.training.config import make_config

# What is learned last: whatever depends on which colour goes with which shape, and where things are.
HARD = {
    "position": 4.0,
    "color_attr": 3.0,
    **dict.fromkeys(("two_object", "counting", "replace", "recolor", "move", "arrange"), 2.0),
}


def get_config(arg: str = "") -> ConfigDict:
    """`arg` is empty, or 'smoke' for a few steps."""
    smoke = {"": False, "smoke": True}[arg]
    slow = {"optimizer": {"warmup": 2 if smoke else 200}, "validation": {}}
    # Editing comes back soon, since the transformer can do it.
    mixture = {"data": {"kind": "shapes", "weights": HARD}, "tasks": ("t2i", "t2i", "edit")}
    stages = {
        "connector": pretraining.tiny_stage(
            pretraining.CONNECTOR, 1000, 1e-3, smoke, pool=256 if smoke else 20480, **slow
        ),
        "unified": pretraining.tiny_stage(
            pretraining.BOTH, 10000, 5e-4, smoke, pool=256 if smoke else 30720, **mixture, **slow
        ),
    }
    parts = {**pretraining.TINY_PARTS, "vlm": "runs/tiny_vlm/half/vlm"}
    return make_config({"model": "tiny_metaquery", "parts": parts, "schedule": tuple(stages), "stages": stages})
