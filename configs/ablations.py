"""The runs behind the paper's Tables 2 and 3, in the shapes world; `launch.reproduce` runs them and makes the tables.

Three runs prepare what all variants start from: `base` stands for SD3.5-Medium (text encoders and transformer learn
text-to-image), `kontext` teaches its transformer to edit, `connector` aligns queries and connector with `base`. A variant
trains both tasks from there, for as long as the others:

| variant | model | trained |
|---|---|---|
| `kontext_more` | Kontext with its text encoders (no MLLM) | transformer |
| `mllm`, `dit`, `both` | MetaQuery; where the pictures of an edit go | queries, connector and transformer |
| `dit_only` | MetaQuery, pictures to both | transformer |
| `connector_only` | MetaQuery, pictures to both | queries and connector |
"""

from ml_collections import ConfigDict

from configs import pretraining
from unipic2_jax.pipelines import TINY, TINY_METAQUERY
from unipic2_jax.training.config import make_config

STEPS = {"base": 2500, "kontext": 1500, "connector": 1000, "variant": 1500}
# Variant -> (reference_path, trainable); None: Kontext under its text encoders.
VARIANTS = {
    "kontext_more": (None, pretraining.TRANSFORMER),
    "mllm": ("mllm", pretraining.BOTH),
    "dit": ("dit", pretraining.BOTH),
    "both": ("both", pretraining.BOTH),
    "dit_only": ("both", pretraining.TRANSFORMER),
    "connector_only": ("both", pretraining.CONNECTOR),
}


def get_config(arg: str = "") -> ConfigDict:
    """`arg` is 'RUN,FOLDER' or 'RUN,FOLDER,smoke': the run's name, and where the exports of the runs before it are.

    Raises:
      ValueError: for another form, or a run that does not exist.
    """
    run, folder, *scale = arg.split(",") if arg.count(",") else (arg, "runs/ablations")
    if scale not in ([], ["smoke"]):
        raise ValueError(f"configs/ablations.py takes RUN,FOLDER or RUN,FOLDER,smoke, not '{arg}'.")
    smoke = bool(scale)
    start = lambda name, part="": f"{folder}/{name}/export{part and '/' + part}"
    vae, vlm = f"{TINY}/vae", f"{TINY_METAQUERY}/vlm"
    if run == "base":
        model = {"model": "tiny", "parts": {"vae": vae}}
        trainable, steps, lr, fields = "^(transformer|conditioner)/", "base", 1e-3, {"tasks": ("t2i",)}
    elif run == "kontext":
        model = {"init": start("base"), "model": "tiny"}
        trainable, steps, lr, fields = pretraining.TRANSFORMER, "kontext", 5e-4, {}
    elif run == "connector":
        parts = {"vae": vae, "vlm": vlm, "transformer": start("base", "transformer")}
        model = {"model": "tiny_metaquery", "parts": parts}
        trainable, steps, lr, fields = pretraining.CONNECTOR, "connector", 1e-3, {"tasks": ("t2i",)}
    elif run in VARIANTS:
        path, trainable = VARIANTS[run]
        model = {"init": start("kontext"), "model": "tiny"}
        if path is not None:
            parts = {"transformer": start("kontext", "transformer"), "conditioner": start("connector", "conditioner")}
            parts |= {"vae": vae, "vlm": vlm}
            model = {"model": "tiny_metaquery", "parts": parts, "settings": {"reference_path": path}}
        steps, lr, fields = "variant", 5e-4, {}
    else:
        known = ", ".join(("base", "kontext", "connector", *VARIANTS))
        raise ValueError(f"configs/ablations.py has no run '{run}'; choose one of {known}.")
    stage = pretraining.tiny_stage(trainable, STEPS[steps], lr, smoke, **fields)
    if not smoke:
        stage |= {"pool": 20480, "validation": {}}
    return make_config({**model, "schedule": (run,), "stages": {run: stage}})
