"""From rewards to advantages, on the host: how much better a sample is than its group."""

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
        own = values[members]
        if len(own):
            out[members] = (own - own.mean()) / (own.std() + epsilon) if np.ptp(own) else 0.0
    return out


def group_advantages(
    rewards: np.ndarray,
    groups: Sequence | np.ndarray | None = None,
    valid: np.ndarray | None = None,
    global_std: bool = False,
    clip: float = 5.0,
    epsilon: float = 1e-4,
) -> tuple[np.ndarray, dict[str, float]]:
    """`(reward - group mean) / (std + epsilon)`, clipped to +-`clip` (Flow-GRPO's per-prompt tracker).

    A failed reward (NaN, or `valid` False) counts neither in a mean nor in a std, and its advantage is 0, so it
    pushes the policy nowhere; it is not a reward of 0.

    Args:
      rewards: [P, G], one group per row, or [N] with `groups`.
      groups: [N] group keys (any comparable values): the prompt, or prompt and source image.
      valid: boolean, shaped like `rewards`.
      global_std: divide by the std of all valid rewards instead of the group's.
      clip: bound of an advantage's magnitude.
      epsilon: added to the std.

    Returns:
      Advantages float32 shaped like `rewards`, and stats: `reward_mean`, `reward_std` (over valid rewards; NaN when
      all failed), `group_std_mean`, `zero_variance_fraction` (groups whose valid rewards are all equal, which teach
      nothing; a group with no valid reward counts), `failed` (number of samples).

    Raises:
      ValueError: when shapes do not fit, or a valid reward is infinite.
    """
    rewards = np.asarray(rewards, np.float64)
    shape = rewards.shape
    if groups is None:
        if rewards.ndim != 2:
            raise ValueError(f"Rewards of shape {shape} come without groups; pass groups, or shape them [P, G].")
        inverse = np.repeat(np.arange(shape[0]), shape[1])
    else:
        if rewards.ndim != 1 or len(groups) != shape[0]:
            raise ValueError(f"There are {len(groups)} group keys for rewards of shape {shape}; give one per reward.")
        numbers: dict = {}
        inverse = np.array([numbers.setdefault(key, len(numbers)) for key in groups], np.int64)
    flat = rewards.reshape(-1)
    usable = ~np.isnan(flat)
    if valid is not None:
        usable &= np.asarray(valid, bool).reshape(-1)
    if np.isinf(flat[usable]).any():
        raise ValueError(f"{int(np.isinf(flat[usable]).sum())} rewards are infinite; a reward must be finite or NaN.")

    batch_std = float(np.std(flat[usable])) if usable.any() else float("nan")
    advantages = np.zeros_like(flat)
    stds = []
    for group in range(inverse.max(initial=-1) + 1):
        members = (inverse == group) & usable
        if not members.any():
            stds.append(0.0)
            continue
        own = flat[members]
        if np.ptp(own) == 0:  # decided by equality: mean and std of equal values carry rounding errors
            stds.append(0.0)
            continue
        stds.append(float(np.std(own)))
        advantages[members] = (own - own.mean()) / ((batch_std if global_std else stds[-1]) + epsilon)
    stats = {
        "reward_mean": float(flat[usable].mean()) if usable.any() else float("nan"),
        "reward_std": batch_std,
        "group_std_mean": float(np.mean(stds)) if stds else 0.0,
        "zero_variance_fraction": float(np.mean([s == 0.0 for s in stds])) if stds else 0.0,
        "failed": float((~usable).sum()),
    }
    return np.clip(advantages, -clip, clip).astype(np.float32).reshape(shape), stats
