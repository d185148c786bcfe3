"""Rewards of the shapes world: the verifier reads the picture, GenEval's or GEdit's rules judge what it read."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence

import numpy as np

from unipic2_jax.data.prompts import PromptRecord
from unipic2_jax.rewards.base import REWARDS, Reward, Scores, mix_scores
from unipic2_jax.rewards.geneval.reward import GenEvalReward
from unipic2_jax.rewards.geneval.rules import score
from unipic2_jax.shapes.edits import score_edit
from unipic2_jax.shapes.prompts import detections
from unipic2_jax.shapes.sources import scene_from_dict
from unipic2_jax.shapes.verify import read_scenes


@REWARDS.register("shapes_t2i")
@dataclasses.dataclass(frozen=True)
class ShapesT2IReward(Reward):
    """GenEval's partial credit with exact counts, and one more clause where the prompt names the background.

    Attributes:
      strict_weight: share of the strict verdict (everything right, nothing extra) in the value; partial credit is the rest.
      noise, seed: see `noisy`.
    """

    strict_weight: float = 0.5
    noise: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_noise(self.noise)

    def check(self, records: Sequence[PromptRecord]) -> None:
        GenEvalReward("shapes").check(records)

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
        scores = mix_scores(self.strict_weight, partial, correct, {"extras": np.asarray(extras, np.float64)})
        return noisy(scores, images, self.noise, self.seed)


@REWARDS.register("shapes_edit")
@dataclasses.dataclass(frozen=True)
class ShapesEditReward(Reward):
    """Geometric mean of instruction success and preservation, as GEdit-Bench's overall score.

    Attributes:
      strict_weight, noise, seed: as in `ShapesT2IReward`.
    """

    strict_weight: float = 0.5
    noise: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_noise(self.noise)

    def check(self, records: Sequence[PromptRecord]) -> None:
        for record in records:
            try:
                source = scene_from_dict(record.metadata["source"])
                score_edit(source, source, record.metadata)
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                raise ValueError(
                    f"What {record.prompt!r} has as metadata is no edit of the shapes world; use its own prompts."
                ) from error

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
        return noisy(mix_scores(self.strict_weight, overall, correct, details), images, self.noise, self.seed)


# Details that a judge would give; the others are for those who watch, and stay true.
JUDGED = ("instruction", "preservation")


def check_noise(noise: float) -> None:
    """Raises a ValueError for a deviation that is none."""
    if not noise >= 0:
        raise ValueError(f"noise is {noise}; use 0 or more.")


def noisy(scores: Scores, images: Sequence[np.ndarray], noise: float, seed: int) -> Scores:
    """Scores of a verifier as a judge gives them that errs: Gaussian noise of this deviation, clipped to [0, 1].

    It is a function of the seed and the picture: who asks again gets the same answer. Value and `JUDGED` err independently.
    """
    if not noise:
        return scores
    digests = [hashlib.blake2b(np.ascontiguousarray(image).tobytes(), digest_size=8).digest() for image in images]
    drawn = [
        np.random.default_rng([seed, int.from_bytes(d, "little")]).normal(0, noise, 1 + len(JUDGED)) for d in digests
    ]
    errors = np.asarray(drawn, np.float64).reshape(-1, 1 + len(JUDGED))
    judged = {name: column for name, column in zip(JUDGED, errors[:, 1:].T) if name in scores.details}
    details = {name: np.clip(scores.details[name] + column, 0, 1) for name, column in judged.items()}
    return scores._replace(values=np.clip(scores.values + errors[:, 0], 0, 1), details={**scores.details, **details})
