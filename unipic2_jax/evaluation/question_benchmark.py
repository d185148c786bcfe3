"""Benchmarks that ask questions about pictures and texts: `works/answers.jsonl` has a line with key and answer for each."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from unipic2_jax.core.files import append_rows, read_rows
from unipic2_jax.data.questions import Question
from unipic2_jax.evaluation.benchmark import Benchmark, Item, Mark, Report, Subject, digest
from unipic2_jax.evaluation.vqa import answers_by_batch
from unipic2_jax.parallel.processes import is_main

ANSWERS = "answers.jsonl"
RIGHT = "right"  # the name of the mark


@dataclasses.dataclass(frozen=True)
class QuestionBenchmark(Benchmark):
    """A subclass has `asked`, and `correct` where an answer need not be the right one to the letter.

    Attributes:
      batch_size, max_new_tokens: of what is answered at a time, and of an answer.
    """

    batch_size: ClassVar[int] = 64
    max_new_tokens: ClassVar[int] = 48

    def asked(self) -> Sequence[Question]:
        """All questions."""
        raise NotImplementedError

    def correct(self, question: Question, answer: str) -> float:
        """The mark of an answer, 0 to 1."""
        return float(question.answer == answer)

    def text(self, scores: Mapping[str, float], count: int) -> str:
        """The numbers for the terminal."""
        return "\n".join([f"{count} questions", *(f"{tag:16}{share:10.3f}" for tag, share in scores.items())])

    def headline(self, scores: Mapping[str, Any]) -> dict[str, float]:
        return {"overall": scores["overall"]}

    # ---- What a benchmark of questions need not say.

    def items(self) -> list[Item]:
        return [Item(f"{number:05}", q.tag, q, number=number) for number, q in enumerate(self.asked())]

    def check(self, subject: Subject | None) -> None:
        if subject and subject.loras:
            raise ValueError(
                "This benchmark asks the vision-language model, which no LoRA of the transformer changes; leave --lora out."
            )

    def settings(self) -> dict[str, Any]:
        return {"max_new_tokens": self.max_new_tokens}

    def made(self, works: Path, items: Sequence[Item]) -> set[str]:
        return set(self._answers(works, items))

    def make(self, subject: Subject, works: Path, items: Sequence[Item]) -> None:
        size, waiting = min(self.batch_size, len(items)), iter(items)
        options = {"batch_size": size, "max_new_tokens": self.max_new_tokens}
        for answers in answers_by_batch(subject.chat, [item.task for item in items], **options):
            rows = [
                {"key": item.key, "asked": _asked(item), "question": item.task.question, "answer": answer}
                for item, answer in zip(itertools.islice(waiting, len(answers)), answers, strict=True)
            ]
            if is_main():
                append_rows(works / ANSWERS, rows)

    def digests(self, works: Path, items: Sequence[Item]) -> dict[str, str]:
        answers = self._answers(works, items)
        return {item.key: digest(_asked(item), item.task.answer, answers[item.key]) for item in items}

    def mark(self, works: Path, items: Sequence[Item]) -> Iterator[list[Mark]]:
        answers = self._answers(works, items)
        yield [Mark(item.key, values={RIGHT: [self.correct(item.task, answers[item.key])]}) for item in items]

    def report(self, works: Path, items: Sequence[Item], marks: Sequence[Mark]) -> Report:
        answers = self._answers(works, items)
        sound = [(item, mark.values[RIGHT][0]) for item, mark in zip(items, marks, strict=True) if mark.values]
        right, tags = np.array([mark for _, mark in sound]), np.array([item.tag for item, _ in sound])
        scores = {"overall": float(right.mean()), **{t: float(right[tags == t].mean()) for t in dict.fromkeys(tags)}}
        lines = [
            {"tag": item.tag, "question": item.task.question, "right": item.task.answer, "answer": answers[item.key]}
            for item, _ in sound
        ]
        return Report(
            scores, self.text(scores, len(sound)), files={ANSWERS: "".join(json.dumps(line) + "\n" for line in lines)}
        )

    def _answers(self, works: Path, items: Sequence[Item]) -> dict[str, str]:
        """Key -> the last answer to that question; one to another question, as with other options, is none. Rows that others wrote
        need not say what was asked.
        """
        asked = {item.key: _asked(item) for item in items}
        rows = [row for row in read_rows(works / ANSWERS) if row["key"] in asked]
        return {row["key"]: row["answer"] for row in rows if row.get("asked", asked[row["key"]]) == asked[row["key"]]}


def _asked(item: Item) -> str:
    """Tells questions apart: by text and picture."""
    image = item.task.image
    return digest(item.task.question, b"" if image is None else np.ascontiguousarray(image).tobytes())
