"""The runs behind the paper's Tables 2 and 3, in the shapes world; `launch.reproduce` runs them and makes the tables.

All start from UniPic2-Tiny, which stands for UniPic2-SD3.5M-Kontext: its transformer edits already. `connector` aligns new queries
and a new connector with it, on text-to-image alone. A variant trains both tasks from there, for as long as the others:

| variant | model | trained |
|---|---|---|
| `kontext_more` | UniPic2-Tiny with its text encoders (no MLLM) | transformer |
| `mllm`, `dit`, `both` | MetaQuery; where the pictures of an edit go | queries, connector and transformer |
| `dit_only` | MetaQuery, pictures to both | transformer |
| `connector_only` | MetaQuery, pictures to both | queries and connector |
"""

from ml_collections import ConfigDict

from configs import pretraining
from unipic2_jax.pipelines import TINY
from unipic2_jax.training.config import make_config

STEPS = {"connector": 1000, "variant": 500}
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
    """`arg` is 'RUN,FOLDER' or 'RUN,FOLDER,smoke': the run's name, and where the runs are.

    Raises:
      ValueError: for another form, or a run that does not exist.
    """
    run, folder, *scale = arg.split(",") if arg.count(",") else (arg, "runs/ablations")
    if scale not in ([], ["smoke"]):
        raise ValueError(f"configs/ablations.py takes RUN,FOLDER or RUN,FOLDER,smoke, not '{arg}'.")
    smoke = bool(scale)
    if run == "connector":
        model = {"model": "tiny_metaquery", "parts": pretraining.TINY_PARTS}
        trainable, steps, lr, fields = pretraining.CONNECTOR, STEPS["connector"], 1e-3, {"tasks": ("t2i",)}
    elif run in VARIANTS:
        path, trainable = VARIANTS[run]
        model = {"init": TINY, "model": "tiny"}
        if path is not None:
            parts = {**pretraining.TINY_PARTS, "conditioner": f"{folder}/connector/export/conditioner"}
            model = {"model": "tiny_metaquery", "parts": parts, "settings": {"reference_path": path}}
        steps, lr, fields = STEPS["variant"], 5e-4, {}
    else:
        raise ValueError(
            f"configs/ablations.py has no run '{run}'; choose one of {', '.join(('connector', *VARIANTS))}."
        )
    stage = pretraining.tiny_stage(trainable, steps, lr, smoke, **fields)
    if not smoke:
        stage |= {"pool": 12288, "validation": {}}
    return make_config({**model, "schedule": (run,), "stages": {run: stage}})
