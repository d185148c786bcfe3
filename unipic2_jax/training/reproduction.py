"""What the runs behind a table of the paper left: their scores, their curves, and what their models draw."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from unipic2_jax.evaluation.grids import contact_sheet
from unipic2_jax.evaluation.tables import BASE, Table
from unipic2_jax.training.evaluator import Evaluator, read_evaluation
from unipic2_jax.training.loop import load_bundle
from unipic2_jax.training.metrics import read_evaluations, read_rows, smooth


def read_scores(table: Table, runs: Mapping[str, Sequence[Path]]) -> dict[str, dict[str, list[float]]]:
    """Variant -> score -> a value per seed, of the last evaluation of each run; of `BASE` the first of any run from it.

    Args:
      runs: variant -> workdirs, one per seed.
    """
    found: dict[str, dict[str, list[float]]] = {}
    for row in table.rows:
        for workdir in runs[row.variant][: 1 if row.variant == BASE else None]:
            pick = min if row.variant == BASE else max
            record = pick(read_evaluations(workdir), key=lambda record: (record["stage_index"], record["step"]))
            for score in table.benchmarks.values():
                found.setdefault(row.variant, {}).setdefault(score, []).append(record["metrics"][score])
    return found


def draw_rewards(table: Table, runs: Mapping[str, Sequence[Path]], path: Path) -> None:
    """A panel for each variant: what was rewarded and what was only watched, a line per seed; pale where it was watched."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [row for row in table.rows if row.variant != BASE]
    figure = Figure(figsize=(3.2 * len(rows), 2.8), layout="constrained")
    FigureCanvasAgg(figure)
    for axis, row in zip(figure.subplots(1, len(rows), squeeze=False, sharey=True)[0], rows):
        names: dict[str, int] = {}
        for workdir in runs[row.variant]:
            train = [r for r in read_rows(workdir / "metrics.jsonl") if r["kind"] == "train"]
            plain = lambda name: name.startswith("reward_") and not name.endswith(("_std", "_failed"))
            for name in dict.fromkeys(name for r in train for name in r if plain(name) and name != "reward_std"):
                color = f"C{names.setdefault(name, len(names))}"
                points = np.array([(r["total_step"], r[name]) for r in train if name in r])
                label = name.removeprefix("reward_") if workdir == runs[row.variant][0] else None
                axis.plot(points[:, 0], smooth(points[:, 1]), color=color, linewidth=1, label=label)
        axis.set_title(row.short.replace("\n", " "), fontsize=8)
        axis.tick_params(labelsize=7)
        axis.set_xlabel("step", fontsize=7)
        axis.legend(fontsize=6, loc="lower right")
    figure.suptitle("Rewards of the rollouts", fontsize=9)
    figure.savefig(path, dpi=110)


def draw_samples(
    config: ConfigDict, models: Mapping[str, str], fields: Mapping[str, Any], mesh: jax.sharding.Mesh
) -> Image.Image:
    """A row per held-out prompt, a column per model: what each makes of the same noise.

    Args:
      config: of a run from which the models differ in nothing but their weights.
      models: caption -> folder.
      fields: of one evaluation (`training.evaluator.evaluation_fields`).
    """
    fields = {**fields, "num_prompts": 8, "samples": 1, "rewards": {}}
    drawn, evaluator = {}, None
    with jax.set_mesh(mesh):
        for caption, folder in models.items():
            with (of_model := config.copy_and_resolve_references()).unlocked():
                of_model.init = str(folder)
            bundle = load_bundle(of_model, mesh)
            # One program serves all: it takes the weights as an argument.
            evaluator = evaluator or Evaluator("samples", read_evaluation("samples", fields), bundle, mesh)
            drawn[caption] = evaluator.generate(bundle.params)
    pictures, captions = [], []
    for number, record in enumerate(evaluator.records):
        pictures.append(np.full_like(drawn[next(iter(drawn))][0], 255) if record.image is None else record.image)
        captions.append(record.prompt)
        pictures += [images[number] for images in drawn.values()]
        captions += list(drawn)
    return contact_sheet(pictures, captions, columns=1 + len(drawn))
