"""What a reward is: images and what was asked for in, a score for each image out."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from unipic2_jax.data.prompts import PromptRecord

# Name -> 'module:class'; a class takes the options of its reward and is a Reward.
REWARDS: dict[str, Any] = {
    "shapes_t2i": "unipic2_jax.rewards.shapes:ShapesT2IReward",
    "shapes_edit": "unipic2_jax.rewards.shapes:ShapesEditReward",
}


class Scores(NamedTuple):
    """Scores of a batch.

    Attributes:
      values: float64 [B], what is maximised; NaN where scoring failed, which is not a score of 0: such samples are left out
        of their group's statistics and counted.
      details: further numbers by name, float64 [B] each, for reports ('correct', 'extras', ...).
    """

    values: np.ndarray
    details: dict[str, np.ndarray]


class Reward(Protocol):
    """Scores images."""

    def score(self, images: Sequence[np.ndarray], records: Sequence[PromptRecord]) -> Scores:
        """uint8 [H, W, 3] images with the record that each was made for."""
        ...


def make_reward(name: str, **options: Any) -> Reward:
    """The reward called `name`.

    Raises:
      ValueError: for a name that is not in `REWARDS`, or options that it does not take.
    """
    if name not in REWARDS:
        raise ValueError(f"The reward '{name}' does not exist; choose one of {', '.join(sorted(REWARDS))}.")
    maker = REWARDS[name]
    if isinstance(maker, str):
        module, attribute = maker.split(":")
        maker = getattr(importlib.import_module(module), attribute)
    try:
        return maker(**options)
    except TypeError as error:
        raise ValueError(f"The reward '{name}' does not take these options ({error}); correct them.") from error
