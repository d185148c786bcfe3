"""EditReward: Qwen2.5-VL-7B learns to score edits as a judge did (paper, section 3.2: regression on 333k edits).

`configs/edit_reward.py` wants the vision-language model and the folders that `launch.score_edits` wrote:

    --config.vlm=DIR --config.stages.reward.data=OUT/train --config.stages.reward.heldout=OUT/heldout

It trains all of the vision-language model; `configs/edit_reward.py:lora` a low-rank update of its decoder. The paper says no more than
"supervised learning with regression loss", so the numbers are the usual ones for fine-tuning a model of this size.

`configs/edit_reward.py:tiny` is the LoRA on the vision-language model of the shipped UniPic2-Tiny-MetaQuery, in the shapes world, where
the judge is the exact verifier. Reinforcement soon finds what it does not see; `tiny,again` goes on with it on edits by models that
it has reinforced. `make tiny-edit-reward` does all of that and makes the data; `smoke` takes a few steps.
"""

from collections.abc import Sequence
from pathlib import Path

from ml_collections import ConfigDict

from unipic2_jax.core.assets import TINY_METAQUERY
from unipic2_jax.training.config import make_config

DATA = "runs/edit_reward"
# Of the first round of the tiny EditReward, and edits by the models that it has reinforced, one a seed, and by the one before.
FIRST = "runs/tiny_edit_reward_first"
REINFORCED = [f"{DATA}_policy{number}" for number in ("", 0, 1, 2)]
# On the shapes world 0.8 is asked for; ties of the verifier's scores keep any other order from reaching 1.
GATE = 0.8


def full_stage(lora: bool) -> dict:
    """All of the vision-language model, or its LoRA, once through 333k edits."""
    return {
        "kind": "regression",
        "steps": 2600,
        "save_every": 200,
        "eval_every": 500,
        "data": f"{DATA}/train",
        "heldout": f"{DATA}/heldout",
        "measure": 2048,
        "batch_size": 128,
        "lora": {"rank": 64 if lora else 0, "alpha": 128.0},
        "optimizer": {"lr": 1e-4 if lora else 1e-5, "schedule": "cosine", "warmup": 100, "weight_decay": 0.0},
    }


def tiny_stage(smoke: bool, folders: Sequence[str], steps: int, lr: float = 1.2e-3, gate: float = 0.0) -> dict:
    """A stage of the shipped tiny EditReward; all are measured on the same edits."""
    steps = 4 if smoke else steps
    return {
        "kind": "regression",
        "steps": steps,
        "save_every": 500,
        "eval_every": 0 if smoke else 500,
        "log_every": 10,
        "data": ",".join(f"{folder}/train" for folder in folders),
        "heldout": f"{DATA}/heldout",
        "in_memory": True,
        "remat": "none",
        "combine": "score",
        "batch_size": 32,
        "gate": 0.0 if smoke else gate,
        # With more it would not fit beside the other shipped weights.
        "lora": {"rank": 4, "alpha": 8.0},
        "optimizer": {"lr": lr, "schedule": "cosine", "warmup": min(100, steps // 2), "weight_decay": 0.0},
    }


def get_config(arg: str = "") -> ConfigDict:
    """`arg` is a comma-separated list of 'tiny', 'again', 'smoke', 'lora'."""
    words = {word for word in arg.split(",") if word}
    if unknown := words - {"tiny", "again", "smoke", "lora"}:
        raise ValueError(
            f"configs/edit_reward.py has no variant '{min(unknown)}'; combine tiny, again and smoke, or take lora."
        )
    if "again" in words and "tiny" not in words:
        raise ValueError(f"configs/edit_reward.py:{arg} goes on with a tiny EditReward; write 'tiny' too.")
    shared = {"model": "edit_reward", "schedule": ("reward",)}
    if "tiny" in words:
        # The verifier's score gives part marks to edits that failed, which its other two marks do not.
        settings = {"targets": ("instruction", "preservation", "score"), "template": "{instruction}{source}{edited}"}
        vlm = str(Path(TINY_METAQUERY) / "vlm")
        smoke = "smoke" in words
        if "again" in words:
            stages = {"policy": tiny_stage(smoke, [*REINFORCED, f"{DATA}_hard"], 6000, 8e-4, GATE)}
            start = {"init": f"{FIRST}/export"}
        else:
            stages = {
                "reward": tiny_stage(smoke, [DATA], 4000),
                # What is learned last, backgrounds and places, comes more often.
                "hard": tiny_stage(smoke, [f"{DATA}_hard"], 9000, gate=GATE),
            }
            start = {"vlm": vlm}
        return make_config({**shared, **start, "schedule": tuple(stages), "settings": settings, "stages": stages})
    return make_config(
        {
            **shared,
            "precision": "mixed",
            "parallel": {"preset": "fsdp"},
            "stages": {"reward": full_stage("lora" in words)},
        }
    )
