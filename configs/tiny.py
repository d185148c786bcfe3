"""UniPic2-Tiny, second part: text encoders and Kontext transformer jointly, from nothing, T2I and edits alternating.

Starts from the model that configs/tiny_vae.py exports: `--config.init=DIR`.
"""

from ml_collections import ConfigDict

from configs.shapes import evaluations
from unipic2_jax.training.config import make_config


def get_config(arg: str = "") -> ConfigDict:
    """`arg` is empty, or 'smoke' for a few steps."""
    smoke = {"": False, "smoke": True}[arg]
    base = {
        "kind": "flow",
        "steps": 8 if smoke else 12000,
        "save_every": 500,
        "eval_every": 0 if smoke else 4000,
        "log_every": 10,
        "data": {"kind": "shapes"},
        "pool": 256 if smoke else 40960,
        "batch_size": 64,
        # Guidance needs an unconditional branch for both tasks, and nothing here was pre-trained with one.
        "caption_dropout": {"t2i": 0.1, "edit": 0.1},
        # The prompt decides at high noise only: half of the levels lie above 0.83.
        "timesteps": {"kind": "logit_normal", "shift": 5.0},
        "evaluations": evaluations(6 if smoke else 200, 4),
        "optimizer": {
            "lr": 1e-3,
            "schedule": "trapezoid",
            "warmup": 2 if smoke else 200,
            "weight_decay": 0.02,
            "trainable": "^(transformer|conditioner)/",
        },
    }
    return make_config({"model": "tiny", "schedule": ("base",), "stages": {"base": base}})
