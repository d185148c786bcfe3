"""The verifier of the shapes world as a detector."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from unipic2_jax.data.shapes.prompts import detections
from unipic2_jax.data.shapes.verify import read_scenes
from unipic2_jax.data.shapes.world import CLASSES
from unipic2_jax.rewards.detectors.base import Detector, Wanted, check_classes
from unipic2_jax.rewards.geneval import Detection


@dataclasses.dataclass(frozen=True)
class ShapesDetector(Detector):
    """Sees everything with full confidence, with its colour and size; what is no object is of the class 'unknown'."""

    def check(self, wanted: Sequence[Wanted]) -> None:
        check_classes(wanted, CLASSES, "The verifier of the shapes world")

    def detect(self, images: Sequence[np.ndarray], wanted: Sequence[Wanted]) -> list[list[Detection]]:
        self.check(wanted)
        return [detections(scene) for scene in read_scenes(np.stack(images))]
