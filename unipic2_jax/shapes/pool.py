"""Endless training data of the shapes world: example `i` of a seed is always the same, so a position is one number."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from unipic2_jax.rewards.geneval.rules import TAGS
from unipic2_jax.shapes.edits import EDIT_TYPES, ShapesEdit, random_edit
from unipic2_jax.shapes.prompts import ShapesPrompt, random_prompt
from unipic2_jax.shapes.world import Scene, random_scene

# Every word of the world's prompts; the tiny tokenizers give each one token.
WORDS = tuple(
    [
        "a",
        "above",
        "add",
        "and",
        "background",
        "below",
        "black",
        "blue",
        "bottom",
        "center",
        "change",
        "circle",
        "circles",
        "cross",
        "crosses",
        "cyan",
        "four",
        "gray",
        "green",
        "large",
        "left",
        "make",
        "move",
        "of",
        "on",
        "pink",
        "purple",
        "red",
        "remove",
        "replace",
        "right",
        "small",
        "square",
        "squares",
        "the",
        "three",
        "to",
        "top",
        "triangle",
        "triangles",
        "two",
        "white",
        "with",
        "yellow",
    ]
)
_PROMPT, _EDIT, _DENSE = range(3)


def prompt_example(seed: int, index: int, weights: Mapping[str, float] | None = None) -> ShapesPrompt:
    """Text-to-image training example number `index`; tags are drawn by `weights` (missing ones count 1)."""
    rng = np.random.default_rng([seed, _PROMPT, index])
    return random_prompt(rng, _draw_kind(rng, TAGS, weights))


def edit_example(seed: int, index: int, weights: Mapping[str, float] | None = None) -> ShapesEdit:
    """Edit training example number `index`; types are drawn by `weights` (missing ones count 1)."""
    rng = np.random.default_rng([seed, _EDIT, index])
    return random_edit(rng, _draw_kind(rng, EDIT_TYPES, weights))


def _draw_kind(rng: np.random.Generator, kinds: tuple[str, ...], weights: Mapping[str, float] | None) -> str:
    share = np.asarray([(weights or {}).get(kind, 1.0) for kind in kinds], np.float64)
    return kinds[rng.choice(len(kinds), p=share / share.sum())]


def dense_scene(seed: int, index: int) -> Scene:
    """Scene number `index` for the autoencoder: three in four are crowded (5 to 9 objects), which teaches it faster."""
    rng = np.random.default_rng([seed, _DENSE, index])
    crowded = rng.random() < 0.75
    return random_scene(rng, int(rng.integers(5, 10) if crowded else rng.integers(0, 5)))
