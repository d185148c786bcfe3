"""DeepGen 1.0's supervised stages: queries and connector alone, then with the transformer and the vision-language model's LoRA.

    python -m launch.train --config=configs/deepgen.py --workdir=runs/deepgen \
        --config.parts.transformer=KONTEXT/transformer --config.parts.vae=KONTEXT/vae --config.parts.vlm=QWEN3B \
        --config.stages.align.data.sources.t2i.path=T2I --config.stages.align.data.sources.edit.path=EDITS \
        --config.stages.sft.data.sources.t2i.path=T2I --config.stages.sft.data.sources.edit.path=EDITS

`configs/deepgen.py:tiny` does it in the shapes world, in minutes on two cores; `tiny,smoke` in a few steps. A released model that
docs/weights.md converts is where `--config.init=MODEL --config.schedule='("sft",)'` goes on.

Source: deepgenteam/deepgen, configs/pretrain/deepgen_joint_pretrain_scb.py and configs/finetune/deepgen_joint_sft_scb.py. What is
other here: weight decay also on vectors, no dropout within the LoRA, no LoRA on the embedding, and pictures keep to `launch.prepare_data`'s
sizes.
"""

from ml_collections import ConfigDict

from configs import pretraining
from unipic2_jax.training.config import make_config

# What the second stage trains: all but autoencoder and vision-language model.
TOGETHER = "^(transformer|conditioner/(conditioner|lora))/"
# Prompts' tokens with their template, images not counted: the context has one length, so that a step is compiled once.
PROMPT_TOKENS = 256


def full_stage(trainable: str, iterations: int, lr: float, tasks: tuple[str, ...]) -> dict:
    """A stage at full size. The original's 64 GPUs take 4 examples each of one task in an iteration, and go through the whole turn
    of tasks before an update; here an update has as many examples, of one task."""
    turn = len(tasks)
    stage = pretraining.full_stage(trainable, iterations // turn, 256 * turn, lr, tasks, ((0.0, 512),), ema_decay=0.0)
    stage["timesteps"] = {"kind": "uniform", "shift": None}
    stage["optimizer"] |= {"betas": (0.9, 0.95), "weight_decay": 0.05}
    return stage


def get_config(arg: str = "") -> ConfigDict:
    """`arg` is empty, 'tiny', or 'tiny,smoke' for a few steps."""
    words = pretraining.read_words(arg, "configs/deepgen.py")
    if "tiny" in words:
        smoke = "smoke" in words
        stages = {
            "align": pretraining.tiny_stage(pretraining.CONNECTOR, 1000, 1e-3, smoke),
            "sft": pretraining.tiny_stage(TOGETHER, 1000, 5e-4, smoke, tasks=("edit", "t2i", "t2i")),
        }
        model = {"model": "tiny_deepgen", "parts": pretraining.TINY_PARTS}
    else:
        stages = {
            "align": full_stage(pretraining.CONNECTOR, 200_000, 1e-4, ("edit", "t2i", "t2i", "t2i")),
            "sft": full_stage(TOGETHER, 400_000, 5e-5, ("edit", "t2i", "t2i")),
        }
        model = {
            "model": "deepgen",
            "precision": "mixed",
            "parallel": {"preset": "auto"},
            # Without a default: naming them is the first thing to do.
            "parts": {"transformer": "", "vae": "", "vlm": ""},
            "settings": {"max_sequence_length": PROMPT_TOKENS},
            "zero_projectors": True,
        }
    return make_config({**model, "schedule": tuple(stages), "stages": stages})
