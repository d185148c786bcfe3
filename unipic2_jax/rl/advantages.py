"""From rewards to advantages, on the host: how much better a sample is than its group."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


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
