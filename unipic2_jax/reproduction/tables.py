"""The paper's ablations beside our own figures: Markdown tables and a plot with confidence intervals."""

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
      variant: the run of configs/ablations.py that is its counterpart; `BASE` is what they all started from.
      paper: the figures, by benchmark; none of a row that the paper has not.
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


BASE = "base"
GEDIT, GENEVAL, DPG, IMGEDIT = "GEdit-EN", "GenEval", "DPG", "ImgEdit"
LARGEST = {GEDIT: 10, GENEVAL: 1, DPG: 100, IMGEDIT: 5}
EDIT_SCORE, T2I_SCORE = "edit/shapes_edit_correct", "t2i/shapes_t2i_correct"
EDIT_PARTS, T2I_PARTS = "edit/shapes_edit_partial", "t2i/shapes_t2i_partial"
FOUR = (GENEVAL, DPG, GEDIT, IMGEDIT)
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
    4: Table(
        "What is rewarded",
        ("model", "RL on T2I", "RL on edits"),
        (
            Row(("w/o GRPO", "", ""), "none", BASE, dict(zip(FOUR, (0.83, 83.68, 6.31, 3.95)))),
            Row(("judge", "", "x"), "judge", "judge", dict(zip(FOUR, (0.83, 84.15, 6.55, 4.04)))),
            Row(("EditReward", "", "x"), "EditReward", "editreward", dict(zip(FOUR, (0.83, 83.99, 6.59, 4.00)))),
            Row(("GenEval", "x", ""), "GenEval", "geneval", dict(zip(FOUR, (0.87, 83.97, 6.40, 3.95)))),
            Row(
                ("judge, then GenEval", "x", "x"),
                "judge +\nGenEval",
                "judge_geneval",
                dict(zip(FOUR, (0.89, 84.23, 6.54, 3.99))),
            ),
            Row(
                ("EditReward, then GenEval", "x", "x"),
                "EditReward +\nGenEval",
                "editreward_geneval",
                dict(zip(FOUR, (0.89, 84.36, 6.59, 4.00))),
            ),
            Row(("GenEval, then EditReward", "x", "x"), "GenEval +\nEditReward", "geneval_editreward", {}),
            Row(("EditReward and GenEval in turn", "x", "x"), "in turn", "joint", {}),
        ),
        {GENEVAL: T2I_SCORE, DPG: T2I_PARTS, GEDIT: EDIT_SCORE, IMGEDIT: EDIT_PARTS},
    ),
}
NAMES = {
    EDIT_SCORE: "edits right (shapes)",
    T2I_SCORE: "text-to-image right (shapes)",
    EDIT_PARTS: "edits in part (shapes)",
    T2I_PARTS: "text-to-image in part (shapes)",
}


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
      scores: variant -> score -> a value per seed; of what is the same for all seeds, one.
    """
    columns = [column for paper, ours in table.benchmarks.items() for column in (f"{paper} (paper)", NAMES[ours])]
    lines = ["| # | " + " | ".join((*table.head, *columns)) + " |"]
    lines.append("|---:|" + "---|" * len(table.head) + "---:|" * len(columns))
    for number, row in enumerate(table.rows, 1):
        cells = list(row.label)
        for paper, ours in table.benchmarks.items():
            values = scores[row.variant][ours]
            figure = f"{row.paper[paper]:.2f}" if paper in row.paper else ""
            if row.variant == BASE:
                cells += [figure, f"{values[0]:.3f}"]
                continue
            mean, half = mean_interval(values)
            cells += [figure, f"{mean:.3f} ± {half:.3f}"]
        lines.append(f"| {number} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plot(table: Table, scores: Mapping[str, Mapping[str, Sequence[float]]], path: Path) -> None:
    """A panel per benchmark: our means with intervals and every seed as a dot, and the paper's figures on an axis of their own.

    Where all variants started from one model, their changes from it are drawn, both on scales with a common zero.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    start = next((row for row in table.rows if row.variant == BASE), None)
    rows = [row for row in table.rows if row is not start]
    names = [f"#{table.rows.index(row) + 1} {row.short}" for row in rows]
    across = min(2, len(table.benchmarks))
    down = -(-len(table.benchmarks) // across)
    figure = Figure(figsize=(max(5.5, 1.1 * len(rows)) * across, 3.4 * down), layout="constrained")
    FigureCanvasAgg(figure)
    places = np.arange(len(rows))
    for axis, (paper, ours) in zip(figure.subplots(down, across, squeeze=False).flat, table.benchmarks.items()):
        ours_start, theirs_start = (scores[BASE][ours][0], start.paper[paper]) if start else (0.0, 0.0)
        values = [np.asarray(scores[row.variant][ours]) - ours_start for row in rows]
        theirs = np.array([row.paper.get(paper, theirs_start) - theirs_start for row in rows])
        means, halves = np.array([mean_interval(found) for found in values]).T
        axis.bar(places - 0.2, means, 0.4, yerr=halves, capsize=4, color="#9ecae1")
        for place, found in zip(places, values):
            axis.plot(np.full(len(found), place - 0.2), found, "o", color="#08519c", markersize=3)
        other = axis.twinx()
        other.bar(places + 0.2, theirs, 0.4, color="#d9d9d9")
        if start:
            ends = np.array(
                [[min(0, x.min()), max(0, y.max())] for x, y in ((means - halves, means + halves), (theirs, theirs))]
            )
            sizes = np.maximum(np.abs(ends).max(axis=1), 1e-9)
            low, high = 1.1 * (ends.T / sizes).min(), 1.1 * (ends.T / sizes).max()
            axis.set_ylim(low * sizes[0], high * sizes[0])
            other.set_ylim(low * sizes[1], high * sizes[1])
            axis.axhline(0, color="#737373", linewidth=0.8)
        else:
            axis.set_ylim(0, 1)
            other.set_ylim(0, LARGEST[paper])
        change = "change of " if start else ""
        axis.set_ylabel(change + NAMES[ours], color="#08519c", fontsize=9)
        other.set_ylabel(f"{change}{paper} (paper)", color="#737373", fontsize=9)
        axis.set_xticks(places, names, fontsize=7)
    figure.suptitle(table.title, fontsize=11)
    figure.savefig(path, dpi=110)
