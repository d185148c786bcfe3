"""The whole paper as one schedule: connector, Kontext, unified model, then PDTR on editing and on text-to-image.

    python -m launch.train --config=configs/unipic2.py --workdir=runs/unipic2 \
        --config.parts.transformer=SD35/transformer --config.parts.vae=SD35/vae --config.parts.vlm=QWEN \
        --config.models.text.init=SD35 --config.stages.connector.data.sources.t2i.path=DATA ...

The connector is aligned with the text-to-image transformer; Kontext continues that transformer under its text encoders, the
model called `text`; `unified` puts what both have trained together. Any other order is a flag:
`--config.schedule="('kontext','connector','unified')"`.

`configs/unipic2.py:tiny` does all of it in the shapes world from nothing but an autoencoder and a vision-language model, after `base`,
which stands for SD3.5-Medium: text encoders and a transformer learn text-to-image.
"""

from ml_collections import ConfigDict

from configs import connector, kontext, pdtr, pretraining, unified
from unipic2_jax.training.config import make_config


def get_config(arg: str = "") -> ConfigDict:
    """`arg` is empty, 'tiny', or 'tiny,smoke' for a few steps."""
    pretraining.read_words(arg, "configs/unipic2.py")
    reinforced = pdtr.get_config(",".join(filter(None, [arg, "model=metaquery"])))
    recipes = [recipe.get_config(arg) for recipe in (kontext, connector, unified)]
    stages = {name: stage for recipe in recipes for name, stage in recipe.stages.items()}
    order = ("base",) if "base" in stages else ()
    order += ("connector", "kontext", "unified", *reinforced.schedule)
    for name in ("base", "kontext"):
        if name in stages:
            stages[name].model = "text"
    text, aligned = recipes[0], recipes[1]
    parts = aligned.parts.to_dict()
    words = {"init": ""}  # a whole model in diffusers layout
    if "base" in stages:
        words = {"model": text.model, "parts": text.parts.to_dict()}
        del parts["transformer"]  # it comes from `base`
    config = make_config(
        {
            "model": aligned.model,
            "precision": aligned.precision,
            "parallel": aligned.parallel.to_dict(),
            "zero_projectors": aligned.zero_projectors,
            "parts": parts,
            "models": {"text": words},
            "schedule": order,
            "stages": {**stages, **reinforced.stages},
        }
    )
    return pdtr.share_evaluations(config)
