"""GenEval as a reward: a detector says what is in the picture, GenEval's rules judge it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from unipic2_jax.data.prompts import PromptRecord
from unipic2_jax.rewards.base import REWARDS, Calls, Reward, Scores, mix_scores
from unipic2_jax.rewards.geneval.detectors.base import Wanted, make_detector
from unipic2_jax.rewards.geneval.rules import Detection, GenEvalScore, Rules, check_metadata, counted, score


def geneval_tasks(records: Sequence[PromptRecord]) -> list[dict[str, Any]]:
    """Metadata of records, with their prompts.

    Raises:
      ValueError: when GenEval's rules cannot be applied to it.
    """
    tasks = [{"prompt": record.prompt, **record.metadata} for record in records]
    for task in tasks:
        check_metadata(task)
    return tasks


@REWARDS.register("geneval")
class GenEvalReward(Reward):
    """Partial credit by default; `correct`, GenEval's own verdict, is among the details, and so is `extras`.

    Attributes:
      detector: kind, or kind and options (`rewards.geneval.detectors.base.DETECTORS`).
      exact: objects that nobody asked for are errors too. GenEval lets them pass, so its own verdict needs False.
      strict_weight: share of the verdict in the value; partial credit is the rest.
      rules: fields of `rewards.geneval.rules.Rules`; options that are not named above.
    """

    calls = Calls(batch_size=32)  # what fails, as for want of memory, fails for these

    def __init__(
        self,
        detector: str | Mapping[str, Any] = "mask2former",
        *,
        exact: bool = False,
        strict_weight: float = 0.0,
        **rules: Any,
    ):
        if not 0 <= strict_weight <= 1:
            raise ValueError(f"strict_weight is {strict_weight}; use a share of 0 to 1.")
        self.exact, self.strict_weight, self.rules = exact, strict_weight, Rules(**rules)
        self.detector = make_detector(detector)

    def check(self, records: Sequence[PromptRecord]) -> None:
        self.detector.check([self._wanted(task) for task in geneval_tasks(records)])

    def score(self, images: Sequence[np.ndarray], records: Sequence[PromptRecord]) -> Scores:
        verdicts = [verdict for verdict, _ in self.judged(images, records)]
        extras = np.asarray([verdict.extras for verdict in verdicts], np.float64)
        partial, correct = [verdict.reward for verdict in verdicts], [verdict.correct for verdict in verdicts]
        return mix_scores(self.strict_weight, partial, correct, {"extras": extras})

    def judged(
        self, images: Sequence[np.ndarray], records: Sequence[PromptRecord]
    ) -> list[tuple[GenEvalScore, dict[str, list[Detection]]]]:
        """Of each image the verdict, and the detections that counted for it, by class."""
        tasks = geneval_tasks(records)
        found = self.detector.detect(images, [self._wanted(task) for task in tasks]) if tasks else []
        return [
            (score(detections, task, exact=self.exact, rules=self.rules), counted(detections, task, self.rules))
            for detections, task in zip(found, tasks, strict=True)
        ]

    def _wanted(self, metadata: Mapping[str, Any]) -> Wanted:
        include, exclude = metadata["include"], metadata.get("exclude", ())
        return Wanted(
            classes=frozenset(clause["class"] for clause in (*include, *exclude)),
            colors=frozenset(clause["class"] for clause in include if "color" in clause),
            threshold=self.rules.confidence(metadata),
        )
