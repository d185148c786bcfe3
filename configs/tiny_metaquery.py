"""UniPic2-Tiny-MetaQuery: the language model of configs/tiny_vlm.py conditions the transformer of UniPic2-Tiny.

First queries and connector are aligned with the transformer frozen, then both are trained together (paper, section 3.1); the
language model stays as it is. `--config.parts.vlm=DIR` names its folder.
"""

from ml_collections import ConfigDict

from configs import pretraining
from unipic2_jax.training.config import make_config

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


def get_config(arg: str = "") -> ConfigDict:
    """`arg` is empty, or 'smoke' for a few steps."""
    smoke = {"": False, "smoke": True}[arg]
    pooled = lambda count, **fields: {"pool": 256 if smoke else count, "validation": {}, **fields}
    # Editing comes back soon, since the transformer can do it.
    mixture = {"data": {"kind": "shapes", "weights": WEIGHTS}, "tasks": ("t2i", "t2i", "edit")}
    stages = {
        "connector": pretraining.tiny_stage(pretraining.CONNECTOR, 1000, 1e-3, smoke, **pooled(20480)),
        "unified": pretraining.tiny_stage(pretraining.BOTH, 6000, 5e-4, smoke, **pooled(30720, **mixture)),
    }
    parts = {**pretraining.TINY_PARTS, "vlm": "runs/tiny_vlm/half/vlm"}
    return make_config({"model": "tiny_metaquery", "parts": parts, "schedule": tuple(stages), "stages": stages})
