"""UniPic2-Tiny, first part: the autoencoder of the shapes world, from nothing."""

from ml_collections import ConfigDict

from unipic2_jax.training.config import make_config


def get_config(arg: str = "") -> ConfigDict:
    """`arg` is empty, or 'smoke' for a few steps."""
    steps = {"": 3000, "smoke": 4}[arg]
    optimizer = {
        "lr": 2e-3,
        "schedule": "trapezoid",
        "warmup": min(100, steps // 2),
        "betas": (0.9, 0.99),
        "weight_decay": 1e-4,
        "end_lr": 2e-5,
    }
    vae = {
        "kind": "autoencoder",
        "steps": steps,
        "save_every": 250,
        "eval_every": 500,
        "log_every": 10,
        "data": {"kind": "shapes"},
        "batch_size": 8,
        "optimizer": optimizer,
    }
    return make_config({"model": "tiny", "schedule": ("vae",), "stages": {"vae": vae}})
