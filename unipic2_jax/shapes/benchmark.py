"""The suite 'shapes': drawing and editing, on combinations that no training example shows."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from unipic2_jax.evaluation.benchmark import BENCHMARKS
from unipic2_jax.evaluation.picture_benchmark import PictureBenchmark
from unipic2_jax.shapes.heldout import evaluations

# What the shipped checkpoint must reach before reinforcement: room above it, something to stand on below.
OVERALL_GATE = (0.5, 0.85)
TAG_GATE = 0.2
# Task -> (the detail that gates ask for, what it is called).
GATED = {"t2i": ("correct", "GenEval-shapes"), "edit": ("instruction", "Instruction success")}


@BENCHMARKS.register("shapes")
@dataclasses.dataclass(frozen=True)
class ShapesBenchmark(PictureBenchmark):
    """Both tasks on held-out prompts, read by the verifier.

    Attributes:
      prompts: held-out prompts per task.
      samples: pictures per prompt.
      steps: sampling steps.
      guidance: guidance scale; 1 switches guidance off.
    """

    prompts: int = 200
    samples: int = 4
    steps: int = 20
    guidance: float = 1.0

    def evaluations(self) -> dict[str, dict[str, Any]]:
        return evaluations(self.prompts, self.samples, self.steps, self.guidance)

    def headline(self, scores: Mapping[str, Any]) -> dict[str, float]:
        return {task: summarize(task, dict(scores[task]), "correct")["overall"] for task in GATED}

    def text(self, scores: Mapping[str, Any]) -> str:
        lines = []
        for task, metrics in scores.items():
            strict, loose = summarize(task, metrics, "correct"), {}
            if task == "edit":
                loose = summarize(task, metrics, "instruction")
            asked = f"{min(self.limit or self.prompts, self.prompts)} held-out prompts x {self.samples} samples"
            lines += ["", f"{task}: {asked}", f"{'':16}{'correct':>10}" + (f"{'instruction':>13}" if loose else "")]
            lines += [
                f"{tag:16}{value:10.3f}" + (f"{loose[tag]:13.3f}" if loose else "") for tag, value in strict.items()
            ]
        return "\n".join(lines)

    def gates(self, scores: Mapping[str, Any]) -> list[str]:
        return [
            sentence
            for task, (detail, what) in GATED.items()
            for sentence in failed_gates(summarize(task, scores[task], detail), what)
        ]


def summarize(name: str, metrics: Mapping[str, float], detail: str) -> dict[str, float]:
    """{tag: mean} of one detail of `Evaluator.run`'s metrics, with 'overall', the mean of the tags' means, first."""
    prefix = f"{name}/shapes_{name}_{detail}/"
    tags = {key.removeprefix(prefix): value for key, value in metrics.items() if key.startswith(prefix)}
    return {"overall": float(np.mean(list(tags.values()))), **tags}


def failed_gates(scores: Mapping[str, float], what: str) -> list[str]:
    """One sentence for each gate that a task's scores miss."""
    low, high = OVERALL_GATE
    missed = []
    if not low <= scores["overall"] <= high:
        missed.append(f"{what} overall is {scores['overall']:.3f}, outside [{low}, {high}].")
    missed += [
        f"{what} of '{tag}' is {value:.3f}, not above {TAG_GATE}."
        for tag, value in scores.items()
        if tag != "overall" and value <= TAG_GATE
    ]
    return missed
