"""Stage 1 of UniPic2-MetaQuery: queries and connector are aligned with a frozen transformer (paper, sections 3.1 and 4.1).

    python -m launch.train --config=configs/connector.py --workdir=runs/connector --config.parts.transformer=SD35/transformer \
        --config.parts.vae=SD35/vae --config.parts.vlm=QWEN --config.stages.connector.data.sources.t2i.path=DATA

`configs/connector.py:tiny` aligns a new connector with UniPic2-Tiny's transformer in the shapes world, in minutes on two cores.
"""

from ml_collections import ConfigDict

from configs import pretraining
from unipic2_jax.training.config import make_config


def get_config(arg: str = "") -> ConfigDict:
    """`arg` is empty, 'tiny', or 'tiny,smoke' for a few steps."""
    words = pretraining.read_words(arg, "configs/connector.py")
    if "tiny" in words:
        stage = pretraining.tiny_stage(pretraining.CONNECTOR, 1000, 1e-3, "smoke" in words, tasks=("t2i",))
        model = {"model": "tiny_metaquery", "parts": pretraining.TINY_PARTS}
    else:
        stage = pretraining.connector()
        # Without a default: naming them is the first thing to do.
        parts = {"transformer": "", "vae": "", "vlm": ""}
        model = {
            "model": "unipic2_metaquery",
            "precision": "mixed",
            "parallel": {"preset": "auto"},
            "parts": parts,
            "zero_projectors": True,
        }
    return make_config({**model, "schedule": ("connector",), "stages": {"connector": stage}})
