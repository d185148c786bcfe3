"""How well predicted scores agree with a judge's: order, pairs, and whether a score means what it says."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Hashable, Sequence

import numpy as np
from PIL import Image

BINS = 10
CHUNK = 1024  # rows of the table of pairs that are in memory at a time


@dataclasses.dataclass(frozen=True)
class Agreement:
    """How far predictions agree with a judge's scores. A number that has no value, since one side is constant, is NaN.

    Attributes:
      pearson, spearman: correlations, of values and of ranks (ties share their mean rank).
      pairs: of all pairs that the judge tells apart, the part in the same order; equal predictions count a half.
      group_pairs: the same within groups, which is what reinforcement sees; NaN where no group has such a pair.
      calibration_error: mean distance of prediction and score over the bins of `bins`, weighted by their counts.
      bins: rows (mean prediction, mean score, count) of `BINS` equal parts of [0, 1] by prediction, empty ones left out.
    """

    pearson: float
    spearman: float
    pairs: float
    group_pairs: float
    calibration_error: float
    bins: tuple[tuple[float, float, int], ...]

    def numbers(self) -> dict[str, float]:
        """What has a value, by name."""
        values = {name: value for name, value in dataclasses.asdict(self).items() if name != "bins"}
        return {name: value for name, value in values.items() if not np.isnan(value)}


def agreement(predicted: np.ndarray, scores: np.ndarray, groups: Sequence[Hashable] = ()) -> Agreement:
    """How far predictions [N] agree with scores [N], both in [0, 1].

    Args:
      groups: [N] keys; none: no pairs within groups.

    Raises:
      ValueError: for shapes that differ, or values that are not finite.
    """
    from scipy import stats  # takes a second, and every run looks the kinds of stages up

    predicted, scores = np.asarray(predicted, np.float64), np.asarray(scores, np.float64)
    if predicted.shape != scores.shape or predicted.ndim != 1 or not len(scores):
        raise ValueError(f"Predictions {predicted.shape} and scores {scores.shape} must be two lists of one length.")
    if not (np.isfinite(predicted).all() and np.isfinite(scores).all()):
        raise ValueError("Predictions and scores must be finite; leave out what has no score.")
    varied = np.ptp(predicted) > 0 and np.ptp(scores) > 0
    within: dict[Hashable, list[int]] = {}
    for index, group in enumerate(groups):
        within.setdefault(group, []).append(index)
    counted = np.sum([_pairs(predicted[own], scores[own]) for own in within.values()] or [(0.0, 0)], axis=0)
    bins = reliability(predicted, scores)
    return Agreement(
        float(stats.pearsonr(predicted, scores).statistic) if varied else float("nan"),
        float(stats.spearmanr(predicted, scores).statistic) if varied else float("nan"),
        _share(*_pairs(predicted, scores)),
        _share(*counted),
        sum(count * abs(mean - score) for mean, score, count in bins) / len(scores),
        bins,
    )


def reliability(predicted: np.ndarray, scores: np.ndarray, count: int = BINS) -> tuple[tuple[float, float, int], ...]:
    """See `Agreement.bins`."""
    places = np.clip((np.asarray(predicted) * count).astype(int), 0, count - 1)
    own = [places == place for place in range(count)]
    return tuple((float(predicted[o].mean()), float(scores[o].mean()), int(o.sum())) for o in own if o.any())


def _pairs(predicted: np.ndarray, scores: np.ndarray) -> tuple[float, int]:
    """(pairs in the judge's order, pairs that the judge tells apart)."""
    right, total = 0.0, 0
    for start in range(0, len(scores), CHUNK):
        rows = slice(start, start + CHUNK)
        # A pair is seen from both of its sides; the one where the judge's first is better counts.
        better = scores[rows, None] > scores[None]
        ahead = np.sign(predicted[rows, None] - predicted[None])[better]
        right, total = right + float((ahead + 1).sum() / 2), total + int(better.sum())
    return right, total


def _share(right: float, total: float) -> float:
    return right / total if total else float("nan")


def reliability_picture(bins: Sequence[tuple[float, float, int]], title: str) -> Image.Image:
    """Mean score over mean prediction, dots as large as their bins are full."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.5, 4.5), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axis = figure.subplots()
    predicted, scores, counts = np.asarray(bins, np.float64).T
    axis.plot([0, 1], [0, 1], color="#bbbbbb", linewidth=1)
    axis.plot(predicted, scores, color="#08519c", linewidth=1.2)
    axis.scatter(predicted, scores, s=20 + 300 * counts / counts.sum(), color="#08519c", alpha=0.7)
    axis.set(xlim=(0, 1), ylim=(0, 1), xlabel="predicted", ylabel="the judge's score", title=title)
    written = io.BytesIO()
    canvas.print_png(written)
    return Image.open(written).convert("RGB")
