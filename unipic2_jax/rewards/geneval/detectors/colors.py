"""Colours of found objects: CLIP chooses among ten names for a crop, as in GenEval.

Prompts, background and order of steps: djghosh13/geneval, `evaluation/evaluate_images.py`; the classifier's weights are the
mean over prompts of normalised text embeddings, as its CLIP benchmark makes them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from unipic2_jax.rewards.geneval.detectors.base import Wanted, once
from unipic2_jax.rewards.geneval.detectors.torch_models import load_network, load_part, load_processor
from unipic2_jax.rewards.geneval.rules import COLORS, Detection

if TYPE_CHECKING:
    import torch

TEMPLATES = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object")
# What a mask leaves out becomes #999999.
GREY = 0x99


def crop(image: np.ndarray, detection: Detection) -> np.ndarray:
    """The box's pixels of a uint8 [H, W, 3] image, one at least, grey outside of the mask where there is one."""
    x0, y0, x1, y1 = (round(edge) for edge in detection.box)
    x0, y0 = min(max(x0, 0), image.shape[1] - 1), min(max(y0, 0), image.shape[0] - 1)
    inside = image[y0 : max(y1, y0 + 1), x0 : max(x1, x0 + 1)]
    return inside if detection.mask is None else np.where(detection.mask[..., None], inside, np.uint8(GREY))


class ColorClassifier:
    """CLIP of `transformers` with GenEval's prompts."""

    def __init__(self, model: str, device: str):
        from transformers import AutoTokenizer, CLIPModel

        self.clip, self.device = load_network(CLIPModel, model, device), device
        self.processor, self.tokenizer = load_processor(model), load_part(AutoTokenizer, model)
        self._weights: dict[str, torch.Tensor] = {}

    def weights(self, name: str) -> torch.Tensor:
        """Unit vectors [colours, D] of a class."""
        import torch
        from torch.nn.functional import normalize

        if name not in self._weights:
            texts = [template.format(color=color, name=name) for color in COLORS for template in TEMPLATES]
            tokens = self.tokenizer(texts, padding=True, return_tensors="pt").to(self.device)
            with torch.no_grad():
                pooled = self.clip.text_model(**tokens).pooler_output
                embedded = normalize(self.clip.text_projection(pooled), dim=-1)
            mean = embedded.reshape(len(COLORS), len(TEMPLATES), -1).mean(1)
            self._weights[name] = normalize(mean, dim=-1)
        return self._weights[name]

    def __call__(self, crops: Sequence[np.ndarray], names: Sequence[str], batch_size: int) -> list[str]:
        """The colour of each uint8 [h, w, 3] crop, given the class of what is in it."""
        import torch
        from torch.nn.functional import normalize

        colors = []
        for start in range(0, len(crops), batch_size):
            part = list(crops[start : start + batch_size])
            pixels = self.processor(part, return_tensors="pt", input_data_format="channels_last")["pixel_values"]
            with torch.no_grad():
                pooled = self.clip.vision_model(pixels.to(self.device)).pooler_output
                embedded = normalize(self.clip.visual_projection(pooled), dim=-1)
            for row, name in zip(embedded, names[start : start + batch_size]):
                colors.append(COLORS[int((self.weights(name) @ row).argmax())])
        return colors


load_colors = once(ColorClassifier)


def add_colors(
    images: Sequence[np.ndarray],
    found: Sequence[Sequence[Detection]],
    wanted: Sequence[Wanted],
    classifier: ColorClassifier,
    batch_size: int,
) -> list[list[Detection]]:
    """The detections, those of classes whose colours are asked for with a colour."""
    places = [
        (i, j)
        for i, detections in enumerate(found)
        for j, detection in enumerate(detections)
        if detection.name in wanted[i].colors
    ]
    crops = [crop(images[i], found[i][j]) for i, j in places]
    colors: Mapping[tuple[int, int], str] = dict(
        zip(places, classifier(crops, [found[i][j].name for i, j in places], batch_size))
    )
    return [
        [dataclasses.replace(detection, color=colors.get((i, j))) for j, detection in enumerate(detections)]
        for i, detections in enumerate(found)
    ]
