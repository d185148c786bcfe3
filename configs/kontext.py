"""From SD3.5-Medium to UniPic2-SD3.5M-Kontext: a text-to-image transformer learns to edit (paper, sections 3.1 and 4.1).

    python -m launch.train --config=configs/kontext.py --workdir=runs/kontext --config.init=SD35 \
        --config.stages.kontext.data.sources.t2i.path=DATA --config.stages.kontext.data.sources.edit.path=EDITS

`configs/kontext.py:tiny` does it in the shapes world, where the text-to-image model has to be trained first: `base` learns text
encoders and transformer from nothing on text-to-image alone, at 32 pixels and then at 48, and `kontext` adds edits.
"""

from ml_collections import ConfigDict

from configs import pretraining
from unipic2_jax.core.assets import TINY
from unipic2_jax.training.config import make_config


def get_config(arg: str = "") -> ConfigDict:
    """`arg` is empty, 'tiny', or 'tiny,smoke' for a few steps."""
    words = pretraining.read_words(arg, "configs/kontext.py")
    if "tiny" not in words:
        stages = {"kontext": pretraining.kontext()}
        return make_config(
            {
                "model": "sd35_medium",
                "precision": "mixed",
                "parallel": {"preset": "auto"},
                "schedule": tuple(stages),
                "stages": stages,
            }
        )
    smoke, growing = "smoke" in words, ((0.0, 32), (0.5, 48))
    everything = "^(transformer|conditioner)/"
    stages = {
        "base": pretraining.tiny_stage(everything, 1500, 1e-3, smoke, tasks=("t2i",), resolutions=growing),
        "kontext": pretraining.tiny_stage(pretraining.TRANSFORMER, 1500, 5e-4, smoke, tasks=("t2i", "edit")),
    }
    parts = {"vae": f"{TINY}/vae"}
    return make_config({"model": "tiny", "parts": parts, "schedule": tuple(stages), "stages": stages})
