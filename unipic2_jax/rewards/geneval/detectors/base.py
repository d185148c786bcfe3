"""What a detector is: images in, the objects that it sees in each of them out."""

from __future__ import annotations

import dataclasses
import functools
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from unipic2_jax.core.registry import Registry
from unipic2_jax.rewards.geneval.rules import Detection

# Kinds. A class takes the options of its detector.
DETECTORS = Registry("detector")

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What is looked for in one image.

    Attributes:
      classes: that the prompt mentions, in GenEval's words (`rewards.geneval.classes`).
      colors: those of them whose colours are asked for; others are not classified.
      threshold: what is not found with a confidence above it need not be returned.
    """

    classes: frozenset[str]
    colors: frozenset[str] = frozenset()
    threshold: float = 0.0


class Detector:
    """Finds objects. A subclass has `detect`; weights are loaded when it is first called."""

    def check(self, wanted: Sequence[Wanted]) -> None:
        """Whether it can look for this; weights are not loaded.

        Raises:
          ValueError: for a class that it does not know, or colours that it cannot tell.
        """
        del wanted

    def detect(self, images: Sequence[np.ndarray], wanted: Sequence[Wanted]) -> list[list[Detection]]:
        """What is seen in each uint8 [H, W, 3] image, of any class that the detector knows.

        Raises:
          ValueError: for what `check` refuses.
        """
        raise NotImplementedError


def make_detector(config: str | Mapping[str, Any]) -> Detector:
    """The detector of this kind, or the one that a kind with its options describes.

    Raises:
      ValueError: for an unknown kind or option.
    """
    return DETECTORS.make({"kind": config} if isinstance(config, str) else config)


def check_classes(wanted: Sequence[Wanted], known: Collection[str], detector: str) -> None:
    """Whether the detector knows all that is looked for.

    Raises:
      ValueError: when it does not.
    """
    unknown = sorted(set().union(*(one.classes for one in wanted)) - set(known))
    if unknown:
        raise ValueError(f"{detector} knows no '{unknown[0]}'; take prompts about what it knows, or another detector.")


def once(load: Callable[..., T]) -> Callable[..., T]:
    """`load`, called once for the same arguments by whatever number of threads: training and evaluation share weights."""
    cached, lock = functools.cache(load), threading.Lock()

    @functools.wraps(load)
    def call(*arguments: Any) -> T:
        with lock:
            return cached(*arguments)

    return call
