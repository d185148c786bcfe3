"""What a reward is: images and what was asked for in, a score for each image out."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np

from unipic2_jax.core.registry import Registry
from unipic2_jax.data.prompts import PromptRecord

# Kinds. A class takes the options of its reward.
REWARDS = Registry("reward")


class RewardError(RuntimeError):
    """Scoring failed for a reason outside this program: a server, a network, an answer that says nothing. One sentence.

    What a reward raises beside this is a mistake in the program and ends the run.

    Attributes:
      retry_after: seconds that the other side asked to be left alone; None: it did not.
    """

    def __init__(self, sentence: str, retry_after: float | None = None):
        super().__init__(sentence)
        self.retry_after = retry_after


class Scores(NamedTuple):
    """Scores of a batch.

    Attributes:
      values: float64 [B], what is maximised; NaN where scoring failed, which is not a score of 0: such samples are left out
        of their group's statistics and counted.
      details: further numbers by name, float64 [B] each, for reports ('correct', 'extras', ...).
      errors: sample -> the sentence that says why its score is NaN, where that is known.
    """

    values: np.ndarray
    details: dict[str, np.ndarray]
    errors: Mapping[int, str] = MappingProxyType({})


def mix_scores(
    strict_weight: float, partial: Sequence[float], correct: Sequence[bool], details: Mapping[str, np.ndarray]
) -> Scores:
    """Scores [B] of verdicts that are given twice: `strict_weight` of the strict one, partial credit for the rest."""
    soft, strict = np.asarray(partial, np.float64), np.asarray(correct, np.float64)
    return Scores((1 - strict_weight) * soft + strict_weight * strict, {"correct": strict, "partial": soft, **details})


@dataclasses.dataclass(frozen=True)
class Calls:
    """How a reward is called; `rewards.scoring` sees to it. A reward has its own defaults, a configuration overrules them.

    Attributes:
      batch_size: images in a call; 0: all at once. A groupwise reward gets one group.
      concurrency: calls at a time.
      timeout: seconds a call may take, beside `Reward.longest_wait`; 0: as long as it likes.
      retries: further tries of a call that failed, with growing pauses.
      backoff: seconds before the first of these; doubles, with jitter, up to a minute.
      breaker: so many calls failing one after the other, each after all its tries, and for `pause` seconds no more are made; 0: never.
      pause: seconds.
      patience: seconds that the other side may ask to be left alone before another try; a call fails when it asks for more.
    """

    batch_size: int = 0
    concurrency: int = 1
    timeout: float = 0.0
    retries: int = 0
    backoff: float = 1.0
    breaker: int = 0
    pause: float = 60.0
    patience: float = 300.0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            low = 1 if field.name == "concurrency" else 0
            if getattr(self, field.name) < low:
                raise ValueError(f"A reward's {field.name} is {getattr(self, field.name)}; use {low} or more.")


class Reward:
    """Scores images. A subclass has `score`; docs/extending/reward.md walks through one.

    Attributes:
      groupwise: a call gets the images of one group, all for the same record, and may compare them.
      on_mesh: it computes on the devices that the model is trained on. It is then made with `mesh` and `precision`, gets the
        images of this process's devices, perhaps none, and is called by all processes at the same place instead of in the background, once
        and without `calls`: it splits its work itself.
      calls: how it is called by default.
      request_timeout: seconds that it waits for an answer itself; a call's timeout has to be longer.
      identity: what decides its scores and is not said by its options, as what it read from the environment or a file.
      transport: names of options that decide nothing about its scores.
    """

    groupwise: bool = False
    on_mesh: bool = False
    calls: Calls = Calls()
    request_timeout: float = 0.0
    identity: Mapping[str, str] = MappingProxyType({})
    transport: tuple[str, ...] = ()

    def deciding(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """The options it was made with that decide its scores, and `identity`."""
        return {name: value for name, value in options.items() if name not in self.transport} | dict(self.identity)

    def longest_wait(self, calls: Calls, count: int) -> float:
        """Seconds that a call about so many images may wait for its turn, which are not counted as its time."""
        del calls, count
        return 0.0

    def check(self, records: Sequence[PromptRecord]) -> None:
        """Whether what is made for these records can be scored; asked before a run, when pictures are not read yet.

        Args:
          records: those of edits have `data.prompts.UNREAD` as their image.

        Raises:
          ValueError: one sentence with the prompt, when it cannot.
        """
        del records

    def score(self, images: Sequence[np.ndarray], records: Sequence[PromptRecord]) -> Scores:
        """uint8 [H, W, 3] images with the record that each was made for: its prompt, source image and metadata.

        Raises:
          RewardError: when all of them failed for the same reason.
        """
        raise NotImplementedError

    def prepare(self, images: Sequence[np.ndarray], records: Sequence[PromptRecord]) -> Any:
        """What `score_prepared` needs of the host alone. Asked of a reward `on_mesh`, in a thread and as soon as there are pictures, so
        that it is ready when the devices are: it computes nothing on them and waits for no other process."""
        return images, records

    def score_prepared(self, prepared: Any) -> Scores:
        """`score` of what `prepare` made."""
        return self.score(*prepared)


def check_package(package: str, requirements: str, what: str) -> None:
    """Whether an optional package is there.

    Raises:
      ValueError: when it is not.
    """
    if importlib.util.find_spec(package) is None:
        raise ValueError(
            f"{what} needs the package '{package}', which is not installed; run pip install -r {requirements}."
        )


def make_reward(kind: str, mesh: jax.sharding.Mesh | None = None, **options: Any) -> Reward:
    """The reward of this kind; `mesh` is for those that compute on it.

    Raises:
      ValueError: for a kind that is not in `REWARDS`, or options that it does not take.
    """
    given = {"mesh": mesh} if REWARDS.find(kind).on_mesh else {}
    return REWARDS.make({"kind": kind, **options}, **given)
