"""What a vision-language model learns to answer: numbered questions about pictures and texts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from unipic2_jax.core.registry import Registry

# Kinds. A class takes (seed, **options) and is a QuestionSource.
QUESTIONS = Registry("source of questions")


@dataclasses.dataclass(frozen=True, eq=False)
class Question:
    """A question about a picture (uint8 [H, W, 3]; None: about a text), the answer that is right, and its kind."""

    image: np.ndarray | None
    question: str
    answer: str
    tag: str = ""


class QuestionSource(Protocol):
    """An endless sequence; question `index` is always the same."""

    def question(self, index: int) -> Question: ...


def make_questions(config: Mapping[str, Any], seed: int) -> QuestionSource:
    """The source that `config` describes: its `kind`, and that kind's options.

    Raises:
      ValueError: for an unknown kind or option.
    """
    return QUESTIONS.make(config, seed=seed)
