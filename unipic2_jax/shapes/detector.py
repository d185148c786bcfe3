"""The verifier of the shapes world as a detector."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from unipic2_jax.rewards.geneval.detectors.base import DETECTORS, Detector, Wanted, check_classes
from unipic2_jax.rewards.geneval.rules import Detection
from unipic2_jax.shapes.prompts import detections
from unipic2_jax.shapes.verify import read_scenes
from unipic2_jax.shapes.world import CLASSES


@DETECTORS.register("shapes")
@dataclasses.dataclass(frozen=True)
class ShapesDetector(Detector):
    """Sees everything with full confidence, with its colour and size; what is no object is of the class 'unknown'."""

    def check(self, wanted: Sequence[Wanted]) -> None:
        check_classes(wanted, CLASSES, "The verifier of the shapes world")

    def detect(self, images: Sequence[np.ndarray], wanted: Sequence[Wanted]) -> list[list[Detection]]:
        self.check(wanted)
        return [detections(scene) for scene in read_scenes(np.stack(images))]
