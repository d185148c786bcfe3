"""PDTR: reinforce editing first, then text-to-image (paper section 3.2; hyper-parameters from section 4.1).

`configs/pdtr.py` is the paper's run and wants a model and prompts of yours:

    --config.init=DIR --config.stages.edit.source.path=edits.jsonl --config.stages.t2i.source.path=prompts.jsonl

`configs/pdtr.py:model=metaquery` is the same for a MetaQuery model; `--config.vlm=DIR` names its Qwen2.5-VL.
`configs/pdtr.py:tiny,model=metaquery` reinforces UniPic2-Tiny-MetaQuery.

`configs/pdtr.py:tiny` is the same two stages on the shipped UniPic2-Tiny in the shapes world, in minutes on a CPU;
`configs/pdtr.py:tiny,long` gives it about half an hour, `configs/pdtr.py:tiny,smoke` a few seconds.
"""

from ml_collections import ConfigDict

from configs.shapes import SIZE, evaluations
from unipic2_jax.pipelines import TINY, TINY_METAQUERY
from unipic2_jax.pipelines.metaquery import EDIT_NEGATIVE
from unipic2_jax.training.config import make_config

# The paper's rewards of the two stages; GenEval's wants a detector, EditReward a trained judge.
REWARDS = {"edit": "editreward", "t2i": "geneval"}


# One turn through the training prompts at tiny scale: what the base often gets wrong comes more often, because a group whose
# samples are all right, or all wrong, teaches nothing.
TURNS = {
    "edit": ("add", "arrange", "replace", "recolor", "arrange", "replace", "move"),
    "t2i": ("counting", "position", "color_attr", "two_object", "counting", "position", "single_object"),
}


def full_stage(task: str, negative_prompt: str = "") -> dict:
    """A stage with the paper's hyper-parameters, which are the defaults of the GRPO stage."""
    return {
        "kind": "grpo",
        "steps": 1000,
        "source": {"kind": "jsonl", "path": "", "task": task},
        "rewards": {REWARDS[task]: {"weight": 1.0}},
        "num_prompts": 16,
        "compute_dtype": "bfloat16",
        "negative_prompt": negative_prompt,
        "grpo": {"micro_batch": 32},
    }


# Rollouts of the tiny stages. A group shares its first noise and differs by one stochastic step, so that all of what its
# rewards differ by is credited to the step that is trained. Which steps was found by trying: an edit is decided by the first
# ones, while a picture from text is mended later (smears, half objects), and early noise tells little about it.
ROLLOUT = {
    "edit": {"num_steps": 6, "window": {"size": 1, "low": 0, "high": 4}},
    # A stronger KL than the paper's 0.04 keeps what editing has gained.
    "t2i": {"num_steps": 8, "window": {"size": 1, "low": 3, "high": 6}, "kl_beta": 1.0},
}


# Steps and learning rate of the variants. The paper's 3e-4 is for many more steps; text-to-image, whose rewards are noisier,
# takes smaller ones so that editing does not suffer.
LENGTH = {
    "demo": {"edit": (110, 1e-3), "t2i": (120, 5.5e-4)},
    "long": {"edit": (300, 7e-4), "t2i": (400, 4e-4)},
    "smoke": {"edit": (2, 1e-3), "t2i": (2, 1e-3)},
}


def tiny_stage(task: str, steps: int, lr: float, num_prompts: int = 14) -> dict:
    """The same stage with the sizes and counts of the shapes world."""
    return {
        "kind": "grpo",
        "steps": steps,
        "save_every": 20,
        "source": {"kind": "shapes", "task": task, "tags": TURNS[task]},
        "rewards": {f"shapes_{task}": {"weight": 1.0}},
        **SIZE,
        "num_prompts": num_prompts,
        "same_latent": True,
        "grpo": {**ROLLOUT[task], "guidance_scale": 1.0},
        "optimizer": {"lr": lr, "warmup": min(5, steps - 1)},
    }


def get_config(arg: str = "") -> ConfigDict:
    """`arg` is a comma-separated list of 'tiny', 'long', 'smoke', 'model=metaquery'."""
    words = {word for word in arg.split(",") if word}
    if unknown := words - {"tiny", "long", "smoke", "model=metaquery"}:
        raise ValueError(
            f"configs/pdtr.py has no variant '{unknown.pop()}'; combine tiny, long, smoke and model=metaquery."
        )
    metaquery = "model=metaquery" in words
    if "tiny" not in words:
        negatives = {"edit": EDIT_NEGATIVE if metaquery else "", "t2i": ""}
        stages = {task: full_stage(task, negative) for task, negative in negatives.items()}
        model = {"model": "unipic2_metaquery", "vlm_dtype": "bfloat16"} if metaquery else {"model": "sd35_medium"}
        return make_config({"init": None, **model, "schedule": ("edit", "t2i"), "stages": stages})
    smoke, long = "smoke" in words, "long" in words
    length = LENGTH["smoke" if smoke else "long" if long else "demo"]
    stages = {task: tiny_stage(task, *length[task], 2 if smoke else 14) for task in ("edit", "t2i")}
    for stage in stages.values():
        stage["evaluations"] = evaluations(6, 1) if smoke else evaluations(750, 2)
    model = {"init": TINY_METAQUERY, "model": "tiny_metaquery"} if metaquery else {"init": TINY, "model": "tiny"}
    return make_config({**model, "schedule": ("edit", "t2i"), "stages": stages})
