"""The paper's ablations of pre-training beside our own figures: Markdown tables and a plot with confidence intervals."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from scipy import stats


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of a table of the paper.

    Attributes:
      label: its cells before the figures.
      short: for a plot.
      variant: the run of configs/ablations.py that is its counterpart.
      paper: the figures, by benchmark.
    """

    label: tuple[str, ...]
    short: str
    variant: str
    paper: Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of the paper.

    Attributes:
      head: names of the label's columns.
      benchmarks: the paper's benchmark -> what stands for it here, a score of the stage's evaluations.
    """

    title: str
    head: tuple[str, ...]
    rows: tuple[Row, ...]
    benchmarks: Mapping[str, str]


GEDIT, GENEVAL = "GEdit-EN", "GenEval"
EDIT_SCORE, T2I_SCORE = "edit/shapes_edit_correct", "t2i/shapes_t2i_correct"
TABLES = {
    2: Table(
        "Where the reference image goes",
        ("model", "MLLM", "DiT"),
        (
            Row(("UniPic2-SD3.5M-Kontext", "", "x"), "Kontext", "kontext_more", {GEDIT: 6.31}),
            Row(("UniPic2-MetaQuery", "x", ""), "MLLM", "mllm", {GEDIT: 5.00}),
            Row(("UniPic2-MetaQuery", "", "x"), "DiT", "dit", {GEDIT: 6.40}),
            Row(("UniPic2-MetaQuery", "x", "x"), "MLLM + DiT", "both", {GEDIT: 6.90}),
        ),
        {GEDIT: EDIT_SCORE},
    ),
    3: Table(
        "What is fine-tuned",
        ("connector", "DiT"),
        (
            Row(("frozen", "fine-tuned"), "DiT", "dit_only", {GENEVAL: 0.84, GEDIT: 6.75}),
            Row(("fine-tuned", "frozen"), "connector", "connector_only", {GENEVAL: 0.85, GEDIT: 6.46}),
            Row(("fine-tuned", "fine-tuned"), "both", "both", {GENEVAL: 0.86, GEDIT: 6.90}),
        ),
        {GENEVAL: T2I_SCORE, GEDIT: EDIT_SCORE},
    ),
}
NAMES = {EDIT_SCORE: "edits right (shapes)", T2I_SCORE: "text-to-image right (shapes)"}


def mean_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """Mean of one value per seed and half the width of its t interval.

    Raises:
      ValueError: for less than two values.
    """
    values = np.asarray(values, np.float64)
    if len(values) < 2:
        raise ValueError(f"There is an interval for two seeds and more, not for {len(values)}; run more.")
    half = stats.t.ppf(0.5 + level / 2, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    return float(values.mean()), float(half)


def markdown(table: Table, scores: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    """The table in the paper's order of rows, the paper's figures beside ours.

    Args:
      scores: variant -> score -> a value per seed.
    """
    columns = [column for paper, ours in table.benchmarks.items() for column in (f"{paper} (paper)", NAMES[ours])]
    lines = ["| # | " + " | ".join((*table.head, *columns)) + " |"]
    lines.append("|---:|" + "---|" * len(table.head) + "---:|" * len(columns))
    for number, row in enumerate(table.rows, 1):
        cells = list(row.label)
        for paper, ours in table.benchmarks.items():
            mean, half = mean_interval(scores[row.variant][ours])
            cells += [f"{row.paper[paper]:.2f}", f"{mean:.3f} ± {half:.3f}"]
        lines.append(f"| {number} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plot(table: Table, scores: Mapping[str, Mapping[str, Sequence[float]]], path: Path) -> None:
    """A panel per benchmark: our means with intervals and every seed as a dot, and the paper's figures on an axis of their own."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5 * len(table.benchmarks), 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    places = np.arange(len(table.rows))
    names = [f"#{number} {row.short}" for number, row in enumerate(table.rows, 1)]
    for axis, (paper, ours) in zip(
        figure.subplots(1, len(table.benchmarks), squeeze=False)[0], table.benchmarks.items()
    ):
        values = [np.asarray(scores[row.variant][ours]) for row in table.rows]
        means, halves = zip(*map(mean_interval, values))
        axis.bar(places - 0.2, means, 0.4, yerr=halves, capsize=4, color="#9ecae1", label=NAMES[ours])
        for place, found in zip(places, values):
            axis.plot(np.full(len(found), place - 0.2), found, "o", color="#08519c", markersize=3)
        axis.set_ylim(0, 1)
        axis.set_ylabel(NAMES[ours], color="#08519c", fontsize=9)
        axis.set_xticks(places, names, fontsize=7)
        other = axis.twinx()
        other.bar(places + 0.2, [row.paper[paper] for row in table.rows], 0.4, color="#d9d9d9")
        other.set_ylabel(f"{paper} (paper)", color="#737373", fontsize=9)
        other.set_ylim(0, 10 if paper == GEDIT else 1)
    figure.suptitle(table.title, fontsize=11)
    figure.savefig(path, dpi=110)
