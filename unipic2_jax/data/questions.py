"""What a language model learns to answer: numbered questions about pictures."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

# Kind -> 'module:class'; a class takes (seed, **options) and is a QuestionSource.
QUESTIONS: dict[str, Any] = {
    "shapes": "unipic2_jax.data.shapes.sources:ShapesQuestions",
}


@dataclasses.dataclass(frozen=True, eq=False)
class Question:
    """A question about a picture (uint8 [H, W, 3]), the answer that is right, and its kind."""

    image: np.ndarray
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
    options = dict(config)
    kind = options.pop("kind", None)
    if kind not in QUESTIONS:
        raise ValueError(f"The source of questions {kind!r} does not exist; choose one of {', '.join(QUESTIONS)}.")
    maker = QUESTIONS[kind]
    if isinstance(maker, str):
        module, name = maker.split(":")
        maker = getattr(importlib.import_module(module), name)
    try:
        return maker(**{"seed": seed, **options})
    except TypeError as error:
        raise ValueError(f"The questions '{kind}' do not take these options ({error}); correct them.") from error
