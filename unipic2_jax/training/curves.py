"""Curves of a run as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from unipic2_jax.training.metrics import read_rows


def draw_curves(workdir: Path) -> Path | None:
    """Writes curves.png: a column per stage, a row per metric, evaluations as dots. None when nothing worth a curve was logged."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = read_rows(workdir / "metrics.jsonl")
    train = [row for row in rows if row["kind"] == "train"]
    if not train:
        return None
    stages = sorted({(row["stage_index"], row["stage"]) for row in train})
    names = _curve_names(rows)
    if not names:
        return None
    figure = Figure(figsize=(4.2 * len(stages), 2.0 * len(names) + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(names), len(stages), squeeze=False, sharex="col")
    for column, (index, stage) in enumerate(stages):
        for row_number, name in enumerate(names):
            axis = axes[row_number][column]
            if "/" in name and column:  # held-out scores of the stages are compared
                axis.sharey(axes[row_number][0])
            points = [(r["step"], r[name]) for r in train if r["stage_index"] == index and name in r]
            if points:
                steps, values = np.array(points).T
                axis.plot(steps, values, color="#9ecae1", linewidth=0.8)
                axis.plot(steps, smooth(values), color="#08519c", linewidth=1.5)
            dots = [
                (r["step"], r[name])
                for r in rows
                if r["kind"] == "evaluation" and r["stage_index"] == index and name in r
            ]
            if dots:
                axis.plot(*np.array(dots).T, "o-", color="#d94801", markersize=4)
            if not points and not dots:
                axis.set_axis_off()
                continue
            axis.set_title(f"{stage}: {name}", fontsize=9)
            axis.tick_params(labelsize=7)
        axes[-1][column].set_xlabel("step", fontsize=8)
    figure.savefig(workdir / "curves.part.png", dpi=110)
    (workdir / "curves.part.png").replace(workdir / "curves.png")
    return workdir / "curves.png"


# Substrings of the metrics worth a curve; the rest is in TensorBoard.
SHOWN = ("loss", "reward", "kl", "gradient_norm", "clip_fraction", "zero_variance", "psnr", "readable")


def _curve_names(rows: list[dict[str, Any]]) -> list[str]:
    """Held-out scores first (not their details), then what training logged; what never left 0 shows nothing."""
    values: dict[str, set[float]] = {}
    for row in rows:
        for key in row:
            if "/" in key or any(word in key for word in SHOWN):
                values.setdefault(key, set()).add(row[key])
    scores = [name for name in values if "/" in name]
    details = {name for name in scores if any(name.startswith(other) and name != other for other in scores)}
    hidden = {name for name in values if name.endswith("_std") or name.startswith("seconds") or values[name] == {0.0}}
    rank = lambda name: (next(i for i, word in enumerate(("/", "reward", "loss", "")) if word in name), name)
    return sorted(values.keys() - hidden - details, key=rank)[:12]


def smooth(values: np.ndarray) -> np.ndarray:
    """Running mean over about a tenth of the points, of what there is at the ends."""
    width = max(1, len(values) // 10) | 1
    kernel = np.ones(width)
    return np.convolve(values, kernel, "same") / np.convolve(np.ones(len(values)), kernel, "same")
