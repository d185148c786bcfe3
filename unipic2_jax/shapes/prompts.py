"""Text-to-image prompts of the shapes world, in GenEval's six tags and metadata format, with scenes that fulfil them.

A *combination* is what a scene shows, in the words of a tag: 'three circles on pink', 'a red circle and a blue square'.
One in eight is held out: no training scene shows a held-out combination, whatever its caption says.
"""

from __future__ import annotations

import dataclasses
import itertools
import zlib
from typing import Any

import numpy as np

from unipic2_jax.rewards.geneval.rules import TAGS, Detection, relative_position
from unipic2_jax.shapes.world import BACKGROUNDS, CLASSES, COLORS, NUM_CELLS, SIZES, Scene, Thing

NUMBERS = {2: "two", 3: "three", 4: "four"}
PLURALS = {"circle": "circles", "square": "squares", "triangle": "triangles", "cross": "crosses"}
RELATIONS = ("left of", "right of", "above", "below")
HELD_OUT_ONE_IN = 8
# Chosen so that every tag and edit type holds out close to its eighth.
HELD_OUT_SALT = 1661


@dataclasses.dataclass(frozen=True)
class ShapesPrompt:
    """A prompt, its GenEval metadata (with the background as an extra field), and a scene that fulfils it."""

    prompt: str
    metadata: dict[str, Any]
    scene: Scene


def held_out(combination: str) -> bool:
    """Whether a combination belongs to the held-out eighth; a pure function of its text."""
    return zlib.crc32(f"{HELD_OUT_SALT} {combination}".encode()) % HELD_OUT_ONE_IN == 0


def detections(scene: Scene) -> list[Detection]:
    """The scene's objects as GenEval's scorer takes them."""
    return [Detection(thing.shape, thing.box, thing.color, thing.size) for thing in scene.things]


def relations(a: Thing, b: Thing) -> set[str]:
    """Where `a` lies as seen from `b`, by GenEval's rule."""
    return relative_position(Detection(a.shape, a.box), Detection(b.shape, b.box))


def _position_key(a: str, relation: str, b: str, background: str) -> str:
    # 'a left of b' is 'b right of a': one key for both.
    if relation in ("left of", "above"):
        a, b, relation = b, a, {"left of": "right of", "above": "below"}[relation]
    return f"position {a} {relation} {b} on {background}"


def combinations(scene: Scene) -> list[str]:
    """Every combination that the scene shows, under every tag."""
    things, ground = scene.things, scene.background
    shapes = {thing.shape for thing in things}
    keys = []
    if len(things) == 1:
        (thing,) = things
        keys += [f"single_object {thing.size} {thing.shape} on {ground}", f"colors {thing.name} on {ground}"]
    elif len(shapes) == 1:
        keys.append(f"counting {len(things)} {things[0].shape} on {ground}")
    for a, b in itertools.combinations(things, 2):
        if a.shape != b.shape:
            keys.append("color_attr " + " and ".join(sorted((a.name, b.name))))
            if len(things) == 2:
                keys.append("two_object " + " and ".join(sorted((a.shape, b.shape))) + f" on {ground}")
                keys += [_position_key(a.shape, relation, b.shape, ground) for relation in sorted(relations(a, b))]
    return keys


def shows_held_out(scene: Scene) -> bool:
    """Whether any combination in the scene is held out."""
    return any(held_out(key) for key in combinations(scene))


def _draw(rng: np.random.Generator, options) -> Any:
    options = list(options)
    return options[rng.integers(len(options))]


def _things(rng: np.random.Generator, attributes: list[tuple[str, str, str]]) -> tuple[Thing, ...]:
    cells = rng.permutation(NUM_CELLS)[: len(attributes)]
    return tuple(Thing(int(cell), *attribute) for cell, attribute in zip(cells, attributes))


def _candidate(rng: np.random.Generator, tag: str, mention_background: bool) -> tuple[ShapesPrompt, str]:
    """A prompt of the tag with a scene, and the combination that the prompt names."""
    ground, colors, sizes = _draw(rng, BACKGROUNDS), list(COLORS), list(SIZES)
    first, second = (CLASSES[i] for i in rng.permutation(len(CLASSES))[:2])
    color_a, color_b, size_a, size_b = _draw(rng, colors), _draw(rng, colors), _draw(rng, sizes), _draw(rng, sizes)
    include: list[dict[str, Any]] = [{"class": first, "count": 1}]
    two = lambda: _things(rng, [(first, color_a, size_a), (second, color_b, size_b)])
    if tag == "single_object":
        things = _things(rng, [(first, color_a, size_a)])
        include[0]["size"] = size_a
        text, key = f"a {size_a} {first}", f"single_object {size_a} {first} on {ground}"
    elif tag == "colors":
        things = _things(rng, [(first, color_a, size_a)])
        include[0]["color"] = color_a
        text, key = f"a {color_a} {first}", f"colors {color_a} {first} on {ground}"
    elif tag == "counting":
        count = _draw(rng, NUMBERS)
        things = _things(rng, [(first, _draw(rng, colors), _draw(rng, sizes)) for _ in range(count)])
        include[0]["count"] = count
        text, key = f"{NUMBERS[count]} {PLURALS[first]}", f"counting {count} {first} on {ground}"
    elif tag == "two_object":
        things = two()
        include.append({"class": second, "count": 1})
        text, key = f"a {first} and a {second}", "two_object " + " and ".join(sorted((first, second))) + f" on {ground}"
    elif tag == "color_attr":
        things = two()
        include = [{"class": first, "count": 1, "color": color_a}, {"class": second, "count": 1, "color": color_b}]
        text = f"a {color_a} {first} and a {color_b} {second}"
        key = "color_attr " + " and ".join(sorted((f"{color_a} {first}", f"{color_b} {second}")))
    elif tag == "position":
        relation = _draw(rng, RELATIONS)
        things = two()
        while relation not in relations(*things):
            things = two()
        # GenEval names the reference object first: the placed object's clause points back to it.
        include = [{"class": second, "count": 1}, {"class": first, "count": 1, "position": [relation, 0]}]
        text, key = f"a {first} {relation} a {second}", _position_key(first, relation, second, ground)
    else:
        raise ValueError(f"'{tag}' is not a GenEval tag; use one of {', '.join(TAGS)}.")
    metadata: dict[str, Any] = {"tag": tag, "include": include}
    if mention_background:
        text += f" on {ground}"
        metadata["background"] = ground
    metadata["prompt"] = text
    return ShapesPrompt(text, metadata, Scene(ground, things)), key


def random_prompt(rng: np.random.Generator, tag: str | None = None, split: str = "train") -> ShapesPrompt:
    """A prompt of `tag` (any by default).

    In 'train' neither the prompt nor its scene shows a held-out combination, and half of the prompts name the background.
    In 'heldout' the prompt names a held-out combination.
    """
    tag = _draw(rng, TAGS) if tag is None else tag
    while True:
        mention = split == "heldout" or bool(rng.integers(2))
        candidate, key = _candidate(rng, tag, mention)
        if split == "heldout" and held_out(key):
            return candidate
        if split == "train" and not held_out(key) and not shows_held_out(candidate.scene):
            return candidate
        if split not in ("train", "heldout"):
            raise ValueError(f"'{split}' is not a split of the shapes world; use 'train' or 'heldout'.")
