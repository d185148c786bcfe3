"""How sure a difference between two models is."""

from __future__ import annotations

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Means of two models over the same prompts, their difference and its confidence interval."""

    before: float
    after: float
    difference: float
    low: float
    high: float
    prompts: int  # pairs that counted
    dropped: int  # pairs without a value on one side

    @property
    def risen(self) -> bool:
        """The interval lies above zero."""
        return self.low > 0

    @property
    def fallen(self) -> bool:
        """The interval lies below zero."""
        return self.high < 0


def paired_bootstrap(before, after, *, level: float = 0.95, resamples: int = 10_000, seed: int = 0) -> Comparison:
    """Percentile bootstrap of the mean paired difference, resampling prompts.

    Args:
      before, after: [prompts] or [prompts, samples]. Samples of a prompt are averaged first: they are not independent,
        so the prompt is the unit that is drawn. NaN means that a score failed; a pair that lacks a side is dropped.
      level: coverage of the interval.

    Raises:
      ValueError: when the shapes differ or no pair is left.
    """
    before, after = np.asarray(before, np.float64), np.asarray(after, np.float64)
    if before.shape != after.shape:
        raise ValueError(f"Scores before {before.shape} and after {after.shape} are not pairs; score the same prompts.")
    before, after = (_mean_of_samples(side) for side in (before, after))
    valid = ~(np.isnan(before) | np.isnan(after))
    if not valid.any():
        raise ValueError("No prompt has a score on both sides; nothing can be compared.")
    before, after = before[valid], after[valid]
    difference = after - before
    rng = np.random.default_rng(seed)
    means = np.concatenate(
        [  # in parts, so that a thousand prompts do not need a matrix of ten million indices
            difference[rng.integers(0, len(difference), (part, len(difference)))].mean(axis=1)
            for part in [1000] * (resamples // 1000) + [resamples % 1000]
            if part
        ]
    )
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Comparison(
        before=float(before.mean()),
        after=float(after.mean()),
        difference=float(difference.mean()),
        low=float(low),
        high=float(high),
        prompts=int(valid.sum()),
        dropped=int((~valid).sum()),
    )


def _mean_of_samples(scores: np.ndarray) -> np.ndarray:
    """[prompts, samples] -> [prompts], over the samples that have a score; NaN where none has."""
    if scores.ndim == 1:
        return scores
    count = (~np.isnan(scores)).sum(axis=1)
    total = np.nansum(scores, axis=1)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)
