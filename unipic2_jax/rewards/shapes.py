"""Rewards of the shapes world: the verifier reads the picture, GenEval's or GEdit's rules judge what it read."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from unipic2_jax.data.prompts import PromptRecord
from unipic2_jax.data.shapes.edits import score_edit
from unipic2_jax.data.shapes.prompts import detections
from unipic2_jax.data.shapes.sources import scene_from_dict
from unipic2_jax.data.shapes.verify import read_scenes
from unipic2_jax.rewards.base import Reward, Scores, mix_scores
from unipic2_jax.rewards.geneval import score


@dataclasses.dataclass(frozen=True)
class ShapesT2IReward(Reward):
    """GenEval's partial credit with exact counts, and one more clause where the prompt names the background.

    Attributes:
      strict_weight: share of the strict verdict (everything right, nothing extra) in the value; partial credit is the rest.
    """

    strict_weight: float = 0.5

    def score(self, images: Sequence[np.ndarray], records: Sequence[PromptRecord]) -> Scores:
        partial, correct, extras = [], [], []
        for scene, record in zip(read_scenes(np.stack(images)), records, strict=True):
            verdict = score(detections(scene), record.metadata, exact=True)
            reward, right = verdict.reward, verdict.correct
            if "background" in record.metadata:
                same = scene.background == record.metadata["background"]
                reward, right = 0.8 * reward + 0.2 * same, right and same
            partial.append(reward)
            correct.append(right)
            extras.append(verdict.extras)
        return mix_scores(self.strict_weight, partial, correct, {"extras": np.asarray(extras, np.float64)})


@dataclasses.dataclass(frozen=True)
class ShapesEditReward(Reward):
    """Geometric mean of instruction success and preservation, as GEdit-Bench's overall score.

    Attributes:
      strict_weight: as in `ShapesT2IReward`.
    """

    strict_weight: float = 0.5

    def score(self, images: Sequence[np.ndarray], records: Sequence[PromptRecord]) -> Scores:
        verdicts = [
            score_edit(scene, scene_from_dict(record.metadata["source"]), record.metadata)
            for scene, record in zip(read_scenes(np.stack(images)), records, strict=True)
        ]
        details = {
            "instruction": np.asarray([verdict.instruction == 1 for verdict in verdicts], np.float64),
            "preservation": np.asarray([verdict.preservation for verdict in verdicts], np.float64),
        }
        overall, correct = [v.overall for v in verdicts], [v.correct for v in verdicts]
        return mix_scores(self.strict_weight, overall, correct, details)
