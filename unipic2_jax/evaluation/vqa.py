"""Exact-match accuracy of a vision-language model that answers questions about pictures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from unipic2_jax.data.questions import Question
from unipic2_jax.models.qwen.processor import user_message
from unipic2_jax.pipelines.chat import ChatModel

# Held-out questions are numbered by this seed, which training never uses.
HELD_OUT_SEED = 2**31 + 1


def conversation(question: Question) -> list[dict[str, Any]]:
    """What the model is asked."""
    pictures = [] if question.image is None else [Image.fromarray(question.image)]
    return [user_message(pictures, question.question)]


def answer_questions(
    model: ChatModel, questions: Sequence[Question], *, batch_size: int = 64, max_new_tokens: int = 48
) -> list[str]:
    """The model's likeliest answers, in order."""
    made = answers_by_batch(model, questions, batch_size=batch_size, max_new_tokens=max_new_tokens)
    return [answer for part in made for answer in part]


def answers_by_batch(
    model: ChatModel, questions: Sequence[Question], *, batch_size: int = 64, max_new_tokens: int = 48
) -> Iterator[list[str]]:
    """The answers to the next questions, as they come."""
    for start in tqdm(range(0, len(questions), batch_size), desc="answering", disable=None):
        part = list(questions[start : start + batch_size])
        # A short last batch is filled up, so that it does not cost another compilation.
        asked = part + [part[-1]] * (min(batch_size, len(questions)) - len(part))
        yield model([conversation(q) for q in asked], max_new_tokens=max_new_tokens)[: len(part)]


def score_answers(questions: Sequence[Question], answers: Sequence[str]) -> tuple[np.ndarray, dict[str, float]]:
    """Whether each answer is exactly right, and the share of right ones: 'overall' first, then by kind."""
    right = np.array([q.answer == answer for q, answer in zip(questions, answers, strict=True)])
    tags = np.array([q.tag for q in questions])
    return right, {"overall": float(right.mean()), **{t: float(right[tags == t].mean()) for t in dict.fromkeys(tags)}}
