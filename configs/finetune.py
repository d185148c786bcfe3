"""A LoRA on one's own edits, or pictures: supervised fine-tuning of a UniPic 2.0 or SD3.5 model.

    python -m launch.prepare_data --kind=jsonl --path=edits.jsonl --out=DATA
    python -m launch.train --config=configs/finetune.py --workdir=runs/mine --config.init=MODEL --config.stages.finetune.data.path=DATA

Words after a colon, with commas between them, change it:

| word | |
|---|---|
| `t2i` | pictures with captions instead of edits |
| `full` | all of the transformer instead of a LoRA |
| `tiny` | UniPic2-Tiny on edits of the shapes world, in minutes on a CPU; `tiny,smoke` in seconds |

What it leaves, `stages/finetune/pytorch_lora_weights.safetensors`, goes into `--lora` of the commands here and into diffusers;
`--config.stages.finetune.lora.init=FILE` goes on from one. docs/finetune.md goes through it.
"""

from ml_collections import ConfigDict

from configs import pretraining
from unipic2_jax.core.assets import TINY
from unipic2_jax.training.config import make_config

WORDS = ("tiny", "smoke", "t2i", "full")


def full_size(task: str) -> dict:
    """For some hundred to some ten thousand examples at the data's own resolution, on one device or several."""
    return {
        "kind": "flow",
        "steps": 2000,
        "batch_size": 16,
        "save_every": 250,
        "tasks": (task,),
        "data": {"kind": "prepared", "path": ""},
        "optimizer": {"lr": 1e-4, "warmup": 50, "weight_decay": 0.01},
        **pretraining.CHOICES,
        **pretraining.PLANNED,
        "ema_decay": 0.99,
        "lora": {"rank": 32, "alpha": 64.0},
    }


def tiny(task: str, smoke: bool) -> dict:
    """In the shapes world, where every example is new."""
    fields = {"lora": {"rank": 16, "alpha": 32.0}, "tasks": (task,), "ema_decay": 0.99}
    stage = pretraining.tiny_stage(pretraining.TRANSFORMER, 300, 1e-3, smoke, **fields)
    stage["evaluations"] = {task: stage["evaluations"][task]}
    return {**stage, "save_every": 100}


def get_config(arg: str = "") -> ConfigDict:
    """`arg` is a comma-separated list of words, see above."""
    words = pretraining.read_words(arg, "configs/finetune.py", WORDS)
    task = "t2i" if "t2i" in words else "edit"
    stage = tiny(task, "smoke" in words) if "tiny" in words else full_size(task)
    if "full" in words:
        stage["lora"] = None
        stage["optimizer"]["lr"] = 5e-4 if "tiny" in words else 1e-5
    if "tiny" in words:
        model = {"model": "tiny", "init": TINY}
    else:
        model = {"model": "sd35_medium", "init": None, "precision": "mixed", "parallel": {"preset": "auto"}}
    return make_config({**model, "schedule": ("finetune",), "stages": {"finetune": stage}})
