"""A detector in one .tflite file, such as EfficientDet-Lite: boxes only, on the CPU, without PyTorch. Optional: ai-edge-litert."""

from __future__ import annotations

import dataclasses
import threading
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from unipic2_jax.data.text import decoded, read_text
from unipic2_jax.rewards.base import check_package
from unipic2_jax.rewards.geneval.classes import class_name
from unipic2_jax.rewards.geneval.detectors.base import DETECTORS, Detector, Wanted, check_classes, once
from unipic2_jax.rewards.geneval.detectors.colors import add_colors, load_colors
from unipic2_jax.rewards.geneval.detectors.torch_models import check_folder, check_torch, in_memory, own_device
from unipic2_jax.rewards.geneval.rules import Detection

NO_CLASS = "???"  # stands in label files for the gaps in COCO's numbers


def read_labels(model: str, labels: str | None) -> list[str]:
    """Class names by number, from a file with one on each line, or from the one that is packed into the model.

    Raises:
      ValueError: when there is none in it.
    """
    if labels is not None:
        return _names(read_text(labels))
    if zipfile.is_zipfile(model):
        with zipfile.ZipFile(model) as packed:
            texts = [name for name in packed.namelist() if name.endswith(".txt")]
            if len(texts) == 1:
                return _names(decoded(packed.read(texts[0])))
    raise ValueError(f"The detector {model} does not hold the names of its classes; give a file of them as 'labels'.")


def _names(text: str) -> list[str]:
    return [class_name(line.strip()) for line in text.removesuffix("\n").split("\n")]


load_labels = once(read_labels)


class TFLiteModel:
    """An interpreter, which serves one thread at a time.

    The model takes uint8 [1, h, w, 3] and ends with TFLite's detection post-processing, which has dropped what overlaps:
    boxes [1, N, 4] as (top, left, bottom, right) in shares of the image, classes [1, N], confidences [1, N], count [1].
    """

    def __init__(self, model: str, labels: str | None, threads: int):
        from ai_edge_litert.interpreter import Interpreter

        self.names = load_labels(model, labels)
        try:
            self.interpreter = Interpreter(model, num_threads=threads)
        except ValueError as error:
            raise ValueError(f"The file {model} is no TFLite model ({error}); check the file.") from error
        self.interpreter.allocate_tensors()
        (self.input,), self.outputs = self.interpreter.get_input_details(), self.interpreter.get_output_details()
        forms = [tuple(output["shape"][2:]) if len(output["shape"]) > 1 else None for output in self.outputs]
        if self.input["dtype"] != np.uint8 or forms != [(4,), (), (), None]:
            raise ValueError(
                f"The model {model} does not end with TFLite's detection post-processing or takes no uint8; "
                "give an EfficientDet-Lite with both."
            )
        self._lock = threading.Lock()

    def __call__(self, image: np.ndarray, threshold: float) -> list[Detection]:
        """What is seen in a uint8 [H, W, 3] image with a confidence above the threshold."""
        height, width = self.input["shape"][1:3]
        pixels = np.asarray(Image.fromarray(image).resize((int(width), int(height)), Image.Resampling.BILINEAR))
        with self._lock:
            self.interpreter.set_tensor(self.input["index"], pixels[None])
            self.interpreter.invoke()
            boxes, classes, scores, count = (self.interpreter.get_tensor(o["index"])[0] for o in self.outputs)
        tall, wide = image.shape[:2]
        detections = []
        for (top, left, bottom, right), number, score in zip(boxes[: int(count)], classes, scores):
            x0, x1 = (min(max(float(edge) * wide, 0.0), float(wide)) for edge in (left, right))
            y0, y1 = (min(max(float(edge) * tall, 0.0), float(tall)) for edge in (top, bottom))
            if score > threshold and x1 > x0 and y1 > y0:
                detections.append(Detection(self.names[int(number)], (x0, y0, x1, y1), confidence=float(score)))
        return detections


load_tflite = once(TFLiteModel)


@DETECTORS.register("tflite")
@dataclasses.dataclass(frozen=True)
class TFLiteDetector(Detector):
    """A detector for machines without PyTorch. Its confidences are lower than those of Mask2Former: choose thresholds for it.

    Attributes:
      model: .tflite file.
      labels: file with a class name on each line; None: the model file holds them.
      clip: folder or hub id of a CLIP that tells colours, which needs PyTorch; None: prompts with colours are refused.
      device: of CLIP.
      threads: of an image's pass.
      batch_size: crops in a pass of CLIP.
    """

    model: str
    labels: str | None = None
    clip: str | None = None
    device: str = "cpu"
    threads: int = 1
    batch_size: int = 8

    def __post_init__(self) -> None:
        check_package("ai_edge_litert", "requirements-geneval.txt", "The detector 'tflite'")
        for file in (self.model, self.labels):
            if file is not None and not Path(file).is_file():
                raise FileNotFoundError(f"The detector's file {file} does not exist; check the path.")
        if self.clip is not None:
            check_torch(self.device, "The colour classifier of the detector 'tflite'")
            check_folder(self.clip, "CLIP")
        if min(self.threads, self.batch_size) < 1:
            raise ValueError(
                f"The detector has threads={self.threads} and batch_size={self.batch_size}; use 1 or more of each."
            )

    def check(self, wanted: Sequence[Wanted]) -> None:
        names = load_labels(self.model, self.labels)
        check_classes(wanted, set(names) - {NO_CLASS}, f"The detector {self.model}")
        if self.clip is None and any(one.colors for one in wanted):
            raise ValueError(
                f"A prompt asks for colours, which the detector {self.model} cannot tell; name a CLIP as its 'clip'."
            )

    def detect(self, images: Sequence[np.ndarray], wanted: Sequence[Wanted]) -> list[list[Detection]]:
        self.check(wanted)
        network = load_tflite(self.model, self.labels, self.threads)
        detections = [network(image, one.threshold) for image, one in zip(images, wanted, strict=True)]
        if not any(one.colors for one in wanted):
            return detections
        device = own_device(self.device)
        with in_memory(f"CLIP {self.clip} on {device}"):
            return add_colors(images, detections, wanted, load_colors(self.clip, device), self.batch_size)
