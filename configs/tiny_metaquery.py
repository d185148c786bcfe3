"""UniPic2-Tiny-MetaQuery: the language model of configs/tiny_vlm.py conditions the transformer of UniPic2-Tiny.

First queries and connector are aligned with the transformer frozen, then both are trained together (paper, section 3.1); the
language model stays as it is. `--config.parts.vlm=DIR` names its folder.
"""

from ml_collections import ConfigDict

from configs import pretraining
from configs.shapes import HARD
from unipic2_jax.training.config import make_config

# What `unified` leaves behind: whatever depends on a colour's name.
NAMED = {
    "position": 3.0,
    "color_attr": 3.0,
    "add": 2.0,
    "replace": 3.0,
    "recolor": 3.0,
    "remove": 0.5,
    "background": 0.5,
}


def get_config(arg: str = "") -> ConfigDict:
    """`arg` is empty, or 'smoke' for a few steps."""
    smoke = {"": False, "smoke": True}[arg]
    shared = {"pool": 256 if smoke else 20480, "validation": {}}
    # Editing comes back soon, since the transformer can do it, but for what depends on a colour's name.
    mixture = {"data": {"kind": "shapes", "weights": HARD}, "tasks": ("t2i", "t2i", "edit"), **shared}
    rest = {"data": {"kind": "shapes", "weights": NAMED}, **shared}
    slow = {"optimizer": {"warmup": 2 if smoke else 200}}
    stages = {
        "connector": pretraining.tiny_stage(pretraining.CONNECTOR, 1000, 1e-3, smoke, **shared, **slow),
        "unified": pretraining.tiny_stage(pretraining.BOTH, 3200, 5e-4, smoke, **mixture, **slow),
        "refined": pretraining.tiny_stage(pretraining.BOTH, 2200, 5e-4, smoke, **rest, **slow),
    }
    parts = {**pretraining.TINY_PARTS, "vlm": "runs/tiny_vlm/half/vlm"}
    return make_config({"model": "tiny_metaquery", "parts": parts, "schedule": tuple(stages), "stages": stages})
