"""The runs behind the paper's Tables 2, 3 and 4, in the shapes world; `launch.reproduce` runs them and makes the tables.

**Tables 2 and 3.** All start from UniPic2-Tiny, which stands for UniPic2-SD3.5M-Kontext: its transformer edits already. `connector` aligns new queries
and a new connector with it, on text-to-image alone. A variant trains both tasks from there, for as long as the others:

| variant | model | trained |
|---|---|---|
| `kontext_more` | UniPic2-Tiny with its text encoders (no MLLM) | transformer |
| `mllm`, `dit`, `both` | MetaQuery; where the pictures of an edit go | queries, connector and transformer |
| `dit_only` | MetaQuery, pictures to both | transformer |
| `connector_only` | MetaQuery, pictures to both | queries and connector |

**Table 4.** Stages of `configs/pdtr.py:tiny` from UniPic2-Tiny, alone and one on top of the other; `launch.reproduce` says with
`--config.init` which model a second stage goes on from.
"""

from ml_collections import ConfigDict

from configs import pdtr, pretraining
from unipic2_jax.core.assets import TINY
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
# Run -> words of configs/pdtr.py, and the run whose model it goes on from; None: the shipped one.
REINFORCED = {
    "judge": ("edit=judge,t2i=none", None),
    "editreward": ("edit=editreward,t2i=none", None),
    "geneval": ("edit=none", None),
    "judge_geneval": ("edit=none", "judge"),
    "editreward_geneval": ("edit=none", "editreward"),
    "geneval_editreward": ("edit=editreward,t2i=none", "geneval"),
    "joint": ("edit=editreward,joint", None),
}
# What one run serves all seeds of others.
SHARED = "connector"


def run_before(run: str) -> str | None:
    """The run that has to be done before this one."""
    return SHARED if run in VARIANTS else REINFORCED[run][1] if run in REINFORCED else None


def get_config(arg: str = "") -> ConfigDict:
    """`arg` is 'RUN,FOLDER' or 'RUN,FOLDER,smoke': the run's name, and where the runs are.

    Raises:
      ValueError: for another form, or a run that does not exist.
    """
    run, folder, *scale = arg.split(",") if arg.count(",") else (arg, "runs/ablations")
    if scale not in ([], ["smoke"]):
        raise ValueError(f"configs/ablations.py takes RUN,FOLDER or RUN,FOLDER,smoke, not '{arg}'.")
    smoke = bool(scale)
    if run in REINFORCED:
        return pdtr.get_config(",".join(["tiny", *scale, REINFORCED[run][0]]))
    if run == SHARED:
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
            f"configs/ablations.py has no run '{run}'; choose one of {', '.join((SHARED, *VARIANTS, *REINFORCED))}."
        )
    stage = pretraining.tiny_stage(trainable, steps, lr, smoke, **fields)
    if not smoke:
        stage |= {"pool": 12288, "validation": {}}
    return make_config({**model, "schedule": (run,), "stages": {run: stage}})
