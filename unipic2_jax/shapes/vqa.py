"""The suite 'shapes-vqa': questions about held-out scenes and prompts, answered to the letter."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from unipic2_jax.data.questions import Question, make_questions
from unipic2_jax.evaluation.benchmark import BENCHMARKS
from unipic2_jax.evaluation.question_benchmark import QuestionBenchmark
from unipic2_jax.evaluation.vqa import HELD_OUT_SEED

# A model that understands answers at least this share of held-out questions.
ACCURACY_GATE = 0.9


@BENCHMARKS.register("shapes-vqa")
@dataclasses.dataclass(frozen=True)
class ShapesQuestionBenchmark(QuestionBenchmark):
    """What a model understands of the shapes world.

    Attributes:
      questions: held-out questions.
    """

    questions: int = 600

    def asked(self) -> Sequence[Question]:
        source = make_questions({"kind": "shapes", "split": "heldout"}, HELD_OUT_SEED)
        return [source.question(index) for index in range(self.questions)]

    def text(self, scores: Mapping[str, float], count: int) -> str:
        lines = [f"{tag:16}{share:10.3f}" for tag, share in scores.items()]
        return "\n".join([f"shapes-vqa: {count} held-out questions, exact answers", *lines])

    def gates(self, scores: Mapping[str, Any]) -> list[str]:
        right = scores["overall"]
        return [] if right >= ACCURACY_GATE else [f"Exact answers are {right:.3f}, below {ACCURACY_GATE}."]
