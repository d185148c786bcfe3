"""What a language model learns to answer: numbered questions about pictures and texts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from unipic2_jax.data.kinds import make_kind

# Kind -> 'module:class'; a class takes (seed, **options) and is a QuestionSource.
QUESTIONS: dict[str, Any] = {
    "shapes": "unipic2_jax.data.shapes.sources:ShapesQuestions",
}


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
    return make_kind(QUESTIONS, "source of questions", config, seed=seed)
