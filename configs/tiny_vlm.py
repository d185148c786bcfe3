"""The language model of UniPic2-Tiny-MetaQuery, from nothing: questions about scenes of the shapes world."""

from ml_collections import ConfigDict

from unipic2_jax.training.config import make_config


def get_config(arg: str = "") -> ConfigDict:
    """`arg` is empty, or 'smoke' for a few steps."""
    smoke = {"": False, "smoke": True}[arg]
    steps = 4 if smoke else 4500
    vlm = {
        "kind": "vlm",
        "steps": steps,
        "save_every": 500,
        "eval_every": 0 if smoke else 500,
        "log_every": 10,
        "data": {"kind": "shapes"},
        "heldout": {"kind": "shapes", "split": "heldout"},
        "measure": 12 if smoke else 300,
        "pool": 256 if smoke else 51200,
        # Later it reads prompts without the template's first lines and in plain positions; so small a model has to be used to it.
        "forms": ("chat", "conditioner"),
        "text_length": 62,
        # Or the one word that says a colour or a size would hardly count beside lists and boxes.
        "equal_answers": True,
        "optimizer": {
            "lr": 2e-3,
            "schedule": "trapezoid",
            "warmup": min(200, steps // 2),
            "weight_decay": 0.02,
            "end_lr": 1e-5,
        },
    }
    return make_config({"model": "tiny_metaquery", "schedule": ("vlm",), "stages": {"vlm": vlm}})
