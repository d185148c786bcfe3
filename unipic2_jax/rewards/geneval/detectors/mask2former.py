"""GenEval's detector: Mask2Former trained on COCO instances, with masks, and CLIP for colours. In PyTorch, optional."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from unipic2_jax.rewards.geneval.classes import class_name
from unipic2_jax.rewards.geneval.detectors.base import DETECTORS, Detector, Wanted, check_classes, once
from unipic2_jax.rewards.geneval.detectors.colors import add_colors, load_colors
from unipic2_jax.rewards.geneval.detectors.torch_models import (
    check_folder,
    check_torch,
    in_memory,
    load_network,
    load_part,
    load_processor,
    own_device,
)
from unipic2_jax.rewards.geneval.rules import Detection

if TYPE_CHECKING:
    import torch

# Pairs of query and class that can become detections of an image (`max_per_image` of the original's configuration).
MOST_PAIRS = 100


def instances(
    class_logits: torch.Tensor,
    mask_logits: torch.Tensor,
    padded: tuple[int, int],
    resized: tuple[int, int],
    size: tuple[int, int],
    threshold: float,
) -> list[tuple[int, float, np.ndarray]]:
    """(class, confidence, bool mask [H, W]) of what one image's queries see, by mmdetection's `MaskFormerFusionHead`.

    A query may be several classes at once. The confidence is the class's probability times the mean probability of the
    mask's pixels.

    Args:
      class_logits: [Q, C + 1], of which the last is 'nothing'.
      mask_logits: [Q, h, w].
      padded: pixels (height, width) of what the network was given,
      resized: of the image in its top left corner,
      size: and of the image itself, for which the masks are.
      threshold: only what is found with a confidence above.
    """
    from torch.nn.functional import interpolate

    scores = class_logits.softmax(-1)[:, :-1]
    best, places = scores.flatten().topk(min(MOST_PAIRS, scores.numel()))
    likely = best > threshold  # masks can only lower it
    best, places = best[likely], places[likely]
    if not len(best):
        return []
    masks = mask_logits[places // scores.shape[1]][None]
    masks = interpolate(masks, padded, mode="bilinear", align_corners=False)[..., : resized[0], : resized[1]]
    masks = interpolate(masks, size, mode="bilinear", align_corners=False)[0]
    inside = masks > 0
    area = inside.sum((1, 2))
    confidence = best * (masks.sigmoid() * inside).sum((1, 2)) / (area + 1e-6)
    classes = places % scores.shape[1]
    return [
        (int(classes[i]), float(confidence[i]), inside[i].cpu().numpy())
        for i in range(len(best))
        if area[i] and confidence[i] > threshold
    ]


def detection(name: str, confidence: float, mask: np.ndarray) -> Detection:
    """From a mask [H, W] that has some true pixels: the box around them, whose ends are exclusive, and its part of the mask."""
    columns, rows = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
    x0, y0, x1, y1 = (int(edge) for edge in (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1))
    box = (float(x0), float(y0), float(x1), float(y1))
    return Detection(name, box, confidence=confidence, mask=mask[y0:y1, x0:x1].copy())


class Mask2Former:
    """The network with its image processor and the names of its classes."""

    def __init__(self, model: str, device: str):
        from transformers import Mask2FormerForUniversalSegmentation

        self.network, self.device = load_network(Mask2FormerForUniversalSegmentation, model, device), device
        self.processor = load_processor(model)
        self.names = {number: class_name(label) for number, label in self.network.config.id2label.items()}

    def __call__(self, images: Sequence[np.ndarray], thresholds: Sequence[float]) -> list[list[Detection]]:
        """What is seen in a batch of uint8 [H, W, 3] images."""
        import torch

        inputs = self.processor(list(images), return_tensors="pt", input_data_format="channels_last")
        with torch.no_grad():
            output = self.network(inputs["pixel_values"].to(self.device), inputs["pixel_mask"].to(self.device))
        detections = []
        for i, (image, threshold) in enumerate(zip(images, thresholds)):
            covered = inputs["pixel_mask"][i]
            seen = instances(
                output.class_queries_logits[i],
                output.masks_queries_logits[i],
                tuple(covered.shape),
                (int(covered.any(1).sum()), int(covered.any(0).sum())),
                image.shape[:2],
                threshold,
            )
            detections.append([detection(self.names[number], confidence, mask) for number, confidence, mask in seen])
        return detections


load_mask2former = once(Mask2Former)


def read_names(model: str) -> frozenset[str]:
    """Classes of the network, from its configuration alone."""
    from transformers import AutoConfig

    return frozenset(map(class_name, load_part(AutoConfig, model).id2label.values()))


load_names = once(read_names)


@DETECTORS.register("mask2former")
@dataclasses.dataclass(frozen=True)
class Mask2FormerDetector(Detector):
    """Mask2Former of `transformers`, in GenEval with a Swin-S.

    Attributes:
      model: folder or hub id.
      clip: the same for colours.
      device: 'cuda' (the process's own GPU), 'cuda:1', or 'cpu', where a picture takes many seconds.
      batch_size: pictures, and crops of them, in a pass.
    """

    model: str = "facebook/mask2former-swin-small-coco-instance"
    clip: str = "openai/clip-vit-large-patch14"
    device: str = "cuda"
    batch_size: int = 8

    def __post_init__(self) -> None:
        check_torch(self.device, "The detector 'mask2former'")
        check_folder(self.model, "Mask2Former")
        check_folder(self.clip, "CLIP")
        if self.batch_size < 1:
            raise ValueError(f"The detector's batch_size is {self.batch_size}; use 1 or more.")

    def check(self, wanted: Sequence[Wanted]) -> None:
        check_classes(wanted, load_names(self.model), f"The detector {self.model}")

    def detect(self, images: Sequence[np.ndarray], wanted: Sequence[Wanted]) -> list[list[Detection]]:
        self.check(wanted)
        device = own_device(self.device)
        with in_memory(f"The detector {self.model} on {device}"):
            network = load_mask2former(self.model, device)
            detections: list[list[Detection]] = []
            for start in range(0, len(images), self.batch_size):
                part = slice(start, start + self.batch_size)
                detections += network(images[part], [one.threshold for one in wanted[part]])
            if not any(one.colors for one in wanted):
                return detections
            return add_colors(images, detections, wanted, load_colors(self.clip, device), self.batch_size)
