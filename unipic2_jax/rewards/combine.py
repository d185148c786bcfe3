"""Several rewards of a sample as one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

# What can be done with a reward's scores before they are weighted.
NORMALIZATIONS = ("none", "group", "batch")


def combine_rewards(
    rewards: Mapping[str, np.ndarray],
    weights: Sequence[tuple[str, float]] = (),
    asked: Mapping[str, np.ndarray] | None = None,
) -> np.ndarray:
    """The weighted sum of named rewards [N], float64. A sample that failed (NaN) in one reward has failed.

    Args:
      asked: name -> bool [N], the samples that a reward is about; it counts for no other. None: all are about all. A sample
        that no reward is about has failed.

    Raises:
      ValueError: when a weight names an unknown reward, or several rewards come without weights.
    """
    if not weights:
        if len(rewards) != 1:
            raise ValueError(f"The rewards {', '.join(rewards)} come without weights; set `weights`.")
        weights = ((next(iter(rewards)), 1.0),)
    unknown = [name for name, _ in weights if name not in rewards]
    if unknown:
        raise ValueError(f"The weights name {', '.join(unknown)}, but the rewards are {', '.join(rewards)}.")
    columns = np.stack([weight * np.asarray(rewards[name], np.float64) for name, weight in weights])
    if asked is None:
        return columns.sum(axis=0)
    about = np.stack([np.asarray(asked[name], bool) for name, _ in weights])
    return np.where(about.any(axis=0), np.where(about, columns, 0.0).sum(axis=0), np.nan)


def normalize(values: np.ndarray, groups: Sequence, how: str, epsilon: float = 1e-4) -> np.ndarray:
    """Scores [N] with mean 0 and std 1, so that rewards of different scales can be weighted; NaN stays NaN.

    Args:
      groups: [N] group keys.
      how: 'none' changes nothing; 'group': within each group; 'batch': over all. Equal scores become 0.
      epsilon: added to the std.
    """
    values = np.asarray(values, np.float64)
    if how == "none":
        return values
    keys = list(groups) if how == "group" else [None] * len(values)
    out = np.full_like(values, np.nan)
    for key in dict.fromkeys(keys):
        members = np.array([other == key for other in keys], bool) & ~np.isnan(values)
        group_values = values[members]
        if len(group_values):
            out[members] = (
                (group_values - group_values.mean()) / (group_values.std() + epsilon) if np.ptp(group_values) else 0.0
            )
    return out
