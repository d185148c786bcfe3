"""The suites 'geneval' and 'geneval:rewritten': 553 prompts, four pictures of each, a detector and GenEval's rules.

    OUT/works/00000/metadata.jsonl, samples/00000.png ...    what GenEval's own scorer reads
    OUT/results.jsonl                                        what it writes, a line for each picture

Source: djghosh13/geneval (Ghosh et al., 2023, MIT). The rewritten prompts say the same at length, with the same clauses; they are BAGEL's
(ByteDance-Seed/BAGEL, Apache 2.0). Papers report either, under one name: our reports name which.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from unipic2_jax.data.prompts import PromptRecord
from unipic2_jax.evaluation.benchmark import BENCHMARKS, Item, Mark
from unipic2_jax.evaluation.picture_benchmark import PictureBenchmark
from unipic2_jax.parallel.mesh import make_mesh
from unipic2_jax.parallel.processes import gather_json, own_share
from unipic2_jax.rewards.geneval.reward import GenEvalReward

PROMPTS = 553
# As marks have it: the verdict of the rules, and what of a prompt is there.
CORRECT, PARTIAL = "geneval_correct", "geneval"


@BENCHMARKS.register("geneval")
@dataclasses.dataclass(frozen=True)
class GenEvalBenchmark(PictureBenchmark):
    """GenEval's official prompts.

    Attributes:
      samples: pictures of a prompt; published figures are of four.
      steps: sampling steps.
      guidance: guidance scale; 1 switches guidance off.
      size: height and width of the pictures, in pixels.
      seed: of the noise.
      batch_size: pictures that are made at once.
      detector: mask2former (as published), tflite, or another one that registered itself.
      detector_model: its folder, file or hub id; '': its own default.
      detector_clip: folder or hub id of the CLIP that tells colours; '': its own default.
      detector_device: cuda or cpu; '': its own default.
      threshold: confidence above which a detection counts; the published one is for mask2former.
      counting_threshold: the same for prompts that count.
    """

    samples: int = 4
    steps: int = 50
    guidance: float = 3.5
    size: int = 512
    seed: int = 0
    batch_size: int = 16
    detector: str = "mask2former"
    detector_model: str = ""
    detector_clip: str = ""
    detector_device: str = ""
    threshold: float = 0.3
    counting_threshold: float = 0.9

    def source(self) -> dict[str, Any]:
        """Where the prompts come from, as `data.prompts.make_source` takes it."""
        return {"kind": "geneval", "shuffle": False}

    def prompts_are(self) -> str:
        """Which prompts, for the report."""
        return "the official prompts"

    def evaluations(self) -> dict[str, dict[str, Any]]:
        named = {"model": self.detector_model, "clip": self.detector_clip, "device": self.detector_device}
        detector = {"kind": self.detector, **{name: value for name, value in named.items() if value}}
        rules = {"threshold": self.threshold, "counting_threshold": self.counting_threshold}
        return {
            "geneval": {
                "source": self.source(),
                "rewards": {"geneval": {"detector": detector, **rules}},
                "num_prompts": PROMPTS,
                "samples": self.samples,
                "height": self.size,
                "width": self.size,
                "num_steps": self.steps,
                "guidance_scale": self.guidance,
                "seed": self.seed,
                "batch_size": self.batch_size,
            }
        }

    def _marks(self, works: Path, items: Sequence[Item], part: str) -> list[Mark]:
        """Marks with what was found as notes, which the reward alone does not tell; each process marks its share."""
        reward, mesh = self._scorers[part].entries["geneval"].reward, make_mesh()
        assert isinstance(reward, GenEvalReward)
        share = own_share(len(items), mesh)
        loaded = [self._loaded(works, item) for item in items[share]]
        right = [place for place, (_, record) in enumerate(loaded) if not record.error]
        judged = iter(reward.judged(*_flat([loaded[place] for place in right])))
        marks = []
        for item, (pictures, record) in zip(items[share], loaded, strict=True):
            if record.error:
                marks.append({"key": item.key, "values": _missing(len(pictures)), "errors": [record.error]})
                continue
            verdicts = [next(judged) for _ in pictures]
            values = {
                PARTIAL: [verdict.reward for verdict, _ in verdicts],
                CORRECT: [float(verdict.correct) for verdict, _ in verdicts],
            }
            notes = {
                "reasons": ["\n".join(verdict.reasons) for verdict, _ in verdicts],
                "details": [_boxes(found) for _, found in verdicts],
            }
            marks.append({"key": item.key, "values": values, "notes": notes})
        return [Mark(**mark) for marks_of_share in gather_json(marks, mesh) for mark in marks_of_share]

    def headline(self, scores: Mapping[str, Any]) -> dict[str, float]:
        return {"overall": overall(scores["geneval"])}

    def text(self, scores: Mapping[str, Any]) -> str:
        by_tag = tags(scores["geneval"])
        if not by_tag:
            return f"GenEval on {self.prompts_are()}: no picture has a mark"
        lines = [f"{tag:16}{value:10.3f}" for tag, value in by_tag.items()]
        asked = f"{min(self.limit or PROMPTS, PROMPTS)} prompts x {self.samples} samples, detector {self.detector}"
        failed = scores["geneval"].get(f"geneval/{PARTIAL}_failed", 0)
        over = [f"{failed} pictures have no mark, and the means are over the others"] if failed else []
        total = f"{'overall':16}{overall(scores['geneval']):10.3f}"
        return "\n".join([f"GenEval on {self.prompts_are()}: {asked}", total, *lines, *over])

    def files(self, items: Sequence[Item], marks: Sequence[Mark]) -> dict[str, str]:
        lines = []
        for item, mark in zip(items, marks, strict=True):
            metadata = {name: value for name, value in item.task.metadata.items() if name != "index"}
            for place, (path, correct) in enumerate(zip(self.paths(item), mark.values.get(CORRECT, ()))):
                if correct is None:
                    continue
                line = {
                    "filename": path,
                    "tag": item.tag,
                    "prompt": item.task.prompt,
                    "correct": correct == 1,
                    "reason": mark.notes["reasons"][place],
                    "metadata": json.dumps({**metadata, "prompt": item.task.prompt}),
                    "details": json.dumps(mark.notes["details"][place]),
                }
                lines.append(json.dumps(line) + "\n")
        return {"results.jsonl": "".join(lines)}


@BENCHMARKS.register("geneval:rewritten")
@dataclasses.dataclass(frozen=True)
class RewrittenBenchmark(GenEvalBenchmark):
    """The same 553 things, asked for at length; a model that was trained on long prompts scores higher on them."""

    def source(self) -> dict[str, Any]:
        return {"kind": "geneval", "shuffle": False, "rewritten": True}

    def prompts_are(self) -> str:
        return "the rewritten prompts"


def tags(scores: Mapping[str, float]) -> dict[str, float]:
    """Tag -> share of correct pictures."""
    prefix = f"geneval/{CORRECT}/"
    return {name.removeprefix(prefix): value for name, value in scores.items() if name.startswith(prefix)}


def overall(scores: Mapping[str, float]) -> float:
    """GenEval's score: the mean over tags, which have different numbers of pictures.

    Raises:
      KeyError: when there are none.
    """
    by_tag = tags(scores)
    if not by_tag:
        raise KeyError(CORRECT)
    return float(np.mean(list(by_tag.values())))


def _flat(loaded: Sequence[tuple[list[np.ndarray], PromptRecord]]) -> tuple[list[np.ndarray], list[PromptRecord]]:
    """Pictures, and the record of each."""
    return [p for pictures, _ in loaded for p in pictures], [record for pictures, record in loaded for _ in pictures]


def _missing(samples: int) -> dict[str, list[None]]:
    return {PARTIAL: [None] * samples, CORRECT: [None] * samples}


def _boxes(found: Mapping[str, Sequence[Any]]) -> dict[str, list[list[float]]]:
    """Class -> (x0, y0, x1, y1, confidence) of what counted, as the official result lines have it."""
    return {
        name: [[*map(float, one.box), float(one.confidence)] for one in of_class] for name, of_class in found.items()
    }
