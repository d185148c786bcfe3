"""Queries, connector and transformer together: UniPic2-MetaQuery (paper, sections 3.1 and 4.1).

Starts from an aligned connector and a Kontext transformer; `parts` takes them from the two runs before:

    python -m launch.train --config=configs/unified.py --workdir=runs/unified \
        --config.parts.conditioner=runs/connector/export/conditioner --config.parts.transformer=runs/kontext/export/transformer \
        --config.parts.vae=SD35/vae --config.parts.vlm=QWEN \
        --config.stages.unified.data.sources.t2i.path=DATA --config.stages.unified.data.sources.edit.path=EDITS

`configs/unified.py:tiny` continues the shipped UniPic2-Tiny-MetaQuery in the shapes world; to continue a connector of yours:
`--config.parts.conditioner=runs/connector/export/conditioner`.
"""

from ml_collections import ConfigDict

from configs import pretraining
from unipic2_jax.core.assets import TINY_METAQUERY
from unipic2_jax.training.config import make_config


def get_config(arg: str = "") -> ConfigDict:
    """`arg` is empty, 'tiny', or 'tiny,smoke' for a few steps."""
    words = pretraining.read_words(arg, "configs/unified.py")
    if "tiny" in words:
        stage = pretraining.tiny_stage(pretraining.BOTH, 1000, 3e-4, "smoke" in words)
        parts = {name: f"{TINY_METAQUERY}/{name}" for name in ("transformer", "vae", "vlm", "conditioner")}
        model = {"model": "tiny_metaquery", "parts": parts}
    else:
        stage = pretraining.unified()
        parts = {"conditioner": "", "transformer": "", "vae": "", "vlm": ""}
        model = {"model": "unipic2_metaquery", "precision": "mixed", "parallel": {"preset": "auto"}, "parts": parts}
    return make_config({**model, "schedule": ("unified",), "stages": {"unified": stage}})
