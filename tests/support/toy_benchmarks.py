"""Benchmarks that somebody else wrote: one of a toy model and the brightness of its pictures, and one in the shape of GenEval."""

import dataclasses
import json
from types import SimpleNamespace

import toy_grpo

from unipic2_jax.evaluation.benchmark import BENCHMARKS
from unipic2_jax.evaluation.picture_benchmark import PictureBenchmark
from unipic2_jax.evaluation.question_benchmark import QuestionBenchmark
from unipic2_jax.shapes.heldout import SIZE


@dataclasses.dataclass(frozen=True)
class Toy(PictureBenchmark):
    prompts: int = 6
    samples: int = 2
    steps: int = 2

    def evaluations(self):
        shared = {"num_prompts": self.prompts, "samples": self.samples, "num_steps": self.steps, "batch_size": 5}
        size = {"height": toy_grpo.SIZE, "width": toy_grpo.SIZE}
        return {"toy": {"source": {"kind": "toy"}, "rewards": {"brightness": {}}, **shared, **size}}


@BENCHMARKS.register("geneval-like")
@dataclasses.dataclass(frozen=True)
class GenEvalLike(PictureBenchmark):
    """Drawings of the tiny model, marked by GenEval's reward with a detector, with a result file as GenEval's own scorer writes it.

    Attributes:
      prompts: of all six tags in turn.
    """

    prompts: int = 6
    steps: int = 2

    def evaluations(self):
        source = {"kind": "shapes", "task": "t2i", "split": "heldout"}
        rewards = {"geneval": {"detector": "shapes"}}
        options = {"num_prompts": self.prompts, "samples": 2, "num_steps": self.steps, "guidance_scale": 1.0}
        return {"geneval": {"source": source, "rewards": rewards, **options, **SIZE}}

    def files(self, items, marks):
        lines = [
            {"filename": path, "tag": item.tag, "prompt": item.task.prompt, "correct": correct == 1}
            for item, mark in zip(items, marks)
            for path, correct in zip(self.paths(item), mark.values.get("geneval_correct", []))
        ]
        return {"results.jsonl": "".join(json.dumps(line) + "\n" for line in lines)}


@dataclasses.dataclass(frozen=True)
class Sums(QuestionBenchmark):
    """Asks for sums; `Calculator` answers."""

    count: int = 150

    def asked(self):
        from unipic2_jax.data.questions import Question

        return [Question(None, f"{n}+1", str(n + 1), "odd" if n % 2 else "even") for n in range(self.count)]


class Calculator:
    """A chat model that errs at 7, and what it was asked."""

    def __init__(self):
        self.asked = []

    def __call__(self, conversations, max_new_tokens):
        texts = [talk[0]["content"][-1]["text"] for talk in conversations]
        self.asked += texts
        return ["?" if text == "7+1" else str(int(text.split("+")[0]) + 1) for text in texts]


def subject(identity="a", bundle=None, chat=None):
    """What `Subject` is to a benchmark."""
    return SimpleNamespace(bundle=bundle or toy_grpo.load(), chat=chat, identity={"model": identity}, loras=())
