"""Data of the right shapes and no content, for plans and benchmarks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from unipic2_jax.data.buckets import ASPECTS, MULTIPLE, Bucket
from unipic2_jax.data.examples import EXAMPLES, EndlessExamples, Example
from unipic2_jax.data.prompts import SOURCES, PromptRecord
from unipic2_jax.rewards.base import REWARDS, Reward, Scores

# About as long as a caption or an instruction is.
PROMPT = "a photograph of nothing in particular, taken on a grey afternoon with a lens that is a little too long for it"


@EXAMPLES.register("blank")
class BlankExamples(EndlessExamples):
    """Black squares, and with `all_aspects` other rectangles as often, of about as many pixels."""

    def __init__(
        self,
        seed: int = 0,
        task: str = "t2i",
        resolution: int = 512,
        multiple: int = MULTIPLE,
        all_aspects: bool = False,
    ):
        del seed
        super().__init__(task, resolution, multiple)
        if all_aspects:
            self.buckets = {Bucket(aspect, int(task == "edit")): 1.0 for aspect in ASPECTS}
        picture = np.zeros((resolution, resolution, 3), np.uint8)
        self.only = Example(picture, PROMPT, (picture,) if task == "edit" else ())

    def example(self, index: int) -> Example:
        """The same for every number."""
        del index
        return self.only


@SOURCES.register("blank")
class BlankSource:
    """Prompts that say nothing, with a black picture to edit or without."""

    def __init__(self, seed: int = 0, task: str = "t2i"):
        del seed
        picture = np.zeros((64, 64, 3), np.uint8) if task == "edit" else None
        self.record = PromptRecord(PROMPT, picture)

    def batch(self, step: int, count: int) -> list[PromptRecord]:
        """The same for every step."""
        del step
        return [self.record] * count


@REWARDS.register("blank")
class BlankReward(Reward):
    """The same for every picture."""

    def score(self, images: Sequence[np.ndarray], records: Sequence[PromptRecord]) -> Scores:
        del records
        return Scores(np.zeros(len(images)), {})
