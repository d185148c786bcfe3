"""What the recipes of flow matching share: the paper's stages (sections 3.1 and 4.1) and their tiny counterparts.

At full size a stage reads what `launch.prepare_data` wrote: `--config.stages.NAME.data.sources.t2i.path=DIR`, and `.edit.path`
where it learns edits. At tiny scale it reads the shapes world.
"""

from typing import Any

from unipic2_jax.core.assets import TINY, TINY_METAQUERY
from unipic2_jax.shapes.heldout import evaluations

# What a stage trains, as a regex on names of parameters; the vision-language model and the autoencoder never are.
TRANSFORMER = "^transformer/"
CONNECTOR = "^conditioner/conditioner/"  # with the queries
BOTH = "^(conditioner/conditioner|transformer)/"

# What the paper leaves open is as in its lineage: docs/training.md has a sentence on each.
CHOICES = {
    "caption_dropout": {"t2i": 0.1, "edit": 0.0},
    "timesteps": {"kind": "logit_normal", "mean": 0.0, "std": 1.0, "shift": None},  # None: the model's scheduler's
    "weighting": "none",
    "latents": "sample",
    "ema_decay": 0.999,
}
# How a batch is computed is the plan's to choose: what the backward pass finds of the forward pass, and in how many parts.
PLANNED = {"remat": "auto", "accumulation": 0}
FULL = {
    **PLANNED,
    "save_every": 1000,
    "eval_every": 10000,
    "log_every": 10,
}
WARMUP = 0.01  # of all steps
CLIP_NORM = 1.0


def prepared(*tasks: str) -> dict[str, Any]:
    """A folder of prepared data for each task."""
    return {"kind": "mixture", "sources": {t: {"kind": "prepared", "path": "", "tasks": (t,)} for t in tasks}}


def full_stage(
    trainable: str, steps: int, batch_size: int, lr: float, tasks: tuple[str, ...], resolutions: tuple, **fields: Any
) -> dict:
    """A stage at full size: AdamW with the paper's betas and weight decay, which are the defaults, and cosine."""
    return {
        "kind": "flow",
        "steps": steps,
        "batch_size": batch_size,
        "tasks": tasks,
        "resolutions": resolutions,
        "data": prepared(*tasks),
        "optimizer": {
            "lr": lr,
            "schedule": "cosine",
            "warmup": int(WARMUP * steps),
            "clip_norm": CLIP_NORM,
            "trainable": trainable,
        },
        **CHOICES,
        **FULL,
        **fields,
    }


def connector(**fields: Any) -> dict:
    """Queries and connector learn to speak to a frozen text-to-image transformer."""
    return full_stage(CONNECTOR, 500_000, 1024, 1e-4, ("t2i",), ((0.0, 512),), **fields)


# The paper trains at growing resolutions but does not say for how long at each.
GROWING = ((0.0, 256), (0.4, 512), (0.8, 1024))


def kontext(**fields: Any) -> dict:
    """A text-to-image transformer learns to edit; batches of both tasks take turns."""
    return full_stage(TRANSFORMER, 200_000, 128, 4e-5, ("t2i", "edit"), GROWING, **fields)


def unified(**fields: Any) -> dict:
    """Queries, connector and transformer together, on the data and with the settings of `kontext`."""
    return full_stage(BOTH, 200_000, 128, 4e-5, ("t2i", "edit"), GROWING, **fields)


def tiny_stage(trainable: str, steps: int, lr: float, smoke: bool, **fields: Any) -> dict:
    """A stage in the shapes world, on both tasks unless told otherwise; fields of `optimizer` go over its own."""
    steps = 4 if smoke else steps
    return {
        "kind": "flow",
        "steps": steps,
        "save_every": 500,
        "log_every": 10,
        "data": {"kind": "shapes"},
        "batch_size": 8 if smoke else 64,
        "loader_threads": 2,
        "caption_dropout": {"t2i": 0.1, "edit": 0.1},
        # The prompt decides at high noise only: half of the levels lie above 0.83.
        "timesteps": {"kind": "logit_normal", "shift": 5.0},
        # Of another seed than the training data's; every combination in it was seen in training.
        "validation": {"data": {"kind": "shapes", "seed": 12345}, "batches": 1 if smoke else 2},
        "evaluations": evaluations(2, 1) if smoke else evaluations(100, 2),
        "optimizer": {
            "lr": lr,
            "schedule": "trapezoid",
            "warmup": min(100, steps // 2),
            "weight_decay": 0.02,
            "trainable": trainable,
            **fields.pop("optimizer", {}),
        },
        **fields,
    }


# Where UniPic2-Tiny's networks are, for recipes that put a model together.
TINY_PARTS = {
    "transformer": f"{TINY}/transformer",
    "vae": f"{TINY}/vae",
    "vlm": f"{TINY_METAQUERY}/vlm",
}


def read_words(arg: str, recipe: str, known: tuple[str, ...] = ("tiny", "smoke")) -> set[str]:
    """The comma-separated words of a recipe's argument.

    Raises:
      ValueError: for one that the recipe does not know, or 'smoke' without 'tiny'.
    """
    words = {word for word in arg.split(",") if word}
    if unknown := words - set(known):
        raise ValueError(f"{recipe} has no variant '{unknown.pop()}'; combine {', '.join(known)}.")
    if "smoke" in words and "tiny" not in words:
        raise ValueError(f"{recipe}: 'smoke' is a variant of 'tiny'; write tiny,smoke.")
    return words
