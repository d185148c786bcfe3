"""What the runs behind a table of the paper left: their scores, their curves, and what their models draw."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from unipic2_jax.evaluation.evaluator import Evaluator, read_evaluation
from unipic2_jax.pictures.sheet import contact_sheet
from unipic2_jax.reproduction.tables import BASE, Table
from unipic2_jax.training.curves import smooth
from unipic2_jax.training.metrics import read_evaluations, read_rows
from unipic2_jax.training.setup import load_model


def read_scores(table: Table, runs: Mapping[str, Sequence[Path]]) -> dict[str, dict[str, list[float]]]:
    """Variant -> score -> a value per seed, of the last evaluation of each run; of `BASE` the first of any run from it.

    Args:
      runs: variant -> workdirs, one per seed.
    """
    scores: dict[str, dict[str, list[float]]] = {}
    for row in table.rows:
        for workdir in runs[row.variant][: 1 if row.variant == BASE else None]:
            pick = min if row.variant == BASE else max
            record = pick(read_evaluations(workdir), key=lambda record: (record["stage_index"], record["step"]))
            for score in table.benchmarks.values():
                scores.setdefault(row.variant, {}).setdefault(score, []).append(record["metrics"][score])
    return scores


def draw_rewards(table: Table, runs: Mapping[str, Sequence[Path]], path: Path, columns: int = 4) -> None:
    """A panel for each variant: what was rewarded and what was only watched, a line per seed; pale where it was watched."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [row for row in table.rows if row.variant != BASE]
    down = -(-len(rows) // columns)
    figure = Figure(figsize=(3.2 * columns, 2.6 * down), layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(down, columns, squeeze=False, sharey=True).flat)
    colors: dict[str, str] = {}  # of a reward, in all panels
    for axis, row in zip(axes, rows):
        for workdir in runs[row.variant]:
            stages = json.loads((workdir / "config.json").read_text())["stages"]
            train = [r for r in read_rows(workdir / "metrics.jsonl") if r["kind"] == "train"]
            weights = {name: fields["weight"] for stage in stages.values() for name, fields in stage["rewards"].items()}
            for name, weight in weights.items():
                color = colors.setdefault(name, f"C{len(colors)}")
                points = np.array([(r["total_step"], r[f"reward_{name}"]) for r in train if f"reward_{name}" in r])
                label = name + (" (watched)" if not weight else "") if workdir == runs[row.variant][0] else None
                look = {"color": color, "alpha": 1.0 if weight else 0.4, "linewidth": 1}
                axis.plot(points[:, 0], smooth(points[:, 1]), label=label, **look)
        axis.set_title(row.short.replace("\n", " "), fontsize=8)
        axis.tick_params(labelsize=7)
        axis.set_xlabel("step", fontsize=7)
        axis.legend(fontsize=6, loc="lower right")
    for axis in axes[len(rows) :]:
        axis.set_axis_off()
    figure.suptitle("Rewards of the rollouts", fontsize=9)
    figure.savefig(path, dpi=110)


def draw_samples(
    config: ConfigDict, models: Mapping[str, str], fields: Mapping[str, Any], mesh: jax.sharding.Mesh
) -> Image.Image:
    """A row per held-out prompt, a column per model: what each makes of the same noise.

    Args:
      config: of a run from which the models differ in nothing but their weights.
      models: caption -> folder.
      fields: of one evaluation (`evaluation.evaluator.evaluation_fields`).
    """
    fields = {**fields, "num_prompts": 8, "samples": 1, "rewards": {}}
    drawn, evaluator = {}, None
    with jax.set_mesh(mesh):
        for caption, folder in models.items():
            with (of_model := config.copy_and_resolve_references()).unlocked():
                of_model.init = str(folder)
            bundle = load_model(of_model, mesh)
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
