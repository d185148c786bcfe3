"""Questions about scenes and prompts of the shapes world, with the one answer that counts as right."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable

import numpy as np

from unipic2_jax.shapes.edits import random_edit
from unipic2_jax.shapes.prompts import PLURALS, random_prompt, shows_held_out
from unipic2_jax.shapes.world import CELL_NAMES, CLASSES, Scene, Thing, random_scene

NUMBER_WORDS = ("zero", "one", "two", "three", "four")
MAX_THINGS = 4


@dataclasses.dataclass(frozen=True)
class ShapesQuestion:
    """A question about what `scene` shows (None: about a text alone), its answer, and its kind (one of `ALL_TAGS`)."""

    scene: Scene | None
    tag: str
    question: str
    answer: str


def describe(thing: Thing, *, size: bool = False) -> str:
    """'red circle at the top left', with its size if wanted."""
    return f"{thing.size + ' ' if size else ''}{thing.name} at the {CELL_NAMES[thing.cell]}"


def _article(name: str) -> str:
    return f"a {name}"


def _caption(rng: np.random.Generator, scene: Scene) -> tuple[str, str]:
    del rng
    names = [_article(describe(thing)) for thing in scene.things]
    listed = " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else names[0]
    return "describe the image.", f"{listed} on {scene.background}"


def _count(rng: np.random.Generator, scene: Scene) -> tuple[str, str]:
    shapes = [*CLASSES, *(thing.shape for thing in scene.things)]
    shape = shapes[rng.integers(len(shapes))]
    count = sum(thing.shape == shape for thing in scene.things)
    return f"how many {PLURALS[shape]} are there?", NUMBER_WORDS[count]


def _alone(things: tuple[Thing, ...], key: Callable[[Thing], str]) -> list[Thing]:
    """Things that no other one shares `key` with."""
    keys = [key(thing) for thing in things]
    return [thing for thing, own in zip(things, keys) if keys.count(own) == 1]


def _pick(rng: np.random.Generator, things: list[Thing]) -> Thing | None:
    return things[rng.integers(len(things))] if things else None


def _where(rng: np.random.Generator, scene: Scene) -> tuple[str, str] | None:
    thing = _pick(rng, _alone(scene.things, lambda t: t.name))
    return thing and (f"where is the {thing.name}?", f"at the {CELL_NAMES[thing.cell]}")


def _places(rng: np.random.Generator, scene: Scene) -> tuple[str, str] | None:
    things = _alone(scene.things, lambda t: t.name)
    if not things:
        return None
    # In any order: in that of the cells, a reader could count along instead of looking where each one is.
    things = [things[i] for i in rng.permutation(len(things))]
    return f"locate: {', '.join(thing.name for thing in things)}", ", ".join(map(describe, things))


def _color(rng: np.random.Generator, scene: Scene) -> tuple[str, str] | None:
    thing = _pick(rng, _alone(scene.things, lambda t: t.shape))
    return thing and (f"what color is the {thing.shape}?", thing.color)


def _size(rng: np.random.Generator, scene: Scene) -> tuple[str, str] | None:
    thing = _pick(rng, _alone(scene.things, lambda t: t.name))
    return thing and (f"how large is the {thing.name}?", thing.size)


def _box(rng: np.random.Generator, scene: Scene) -> tuple[str, str] | None:
    thing = _pick(rng, _alone(scene.things, lambda t: t.name))
    if thing is None:
        return None
    box = {"bbox_2d": [int(edge) for edge in thing.box], "label": thing.name}
    return f"locate the {thing.name}. answer in json.", json.dumps([box])


def _read(rng: np.random.Generator, scene: Scene) -> tuple[str, str]:
    del rng
    return "list every object.", ", ".join(describe(thing, size=True) for thing in scene.things)


def _ground(rng: np.random.Generator, split: str) -> tuple[Scene, str, str]:
    """An instruction; the answer says where the objects are that it names."""
    edit = random_edit(rng, None, split)
    answer = edit.prompt
    for thing in edit.source.things:
        answer = answer.replace(f"the {thing.name}", f"the {describe(thing)}")
    return edit.source, f"locate: {edit.prompt}", answer


def _parse(rng: np.random.Generator, split: str) -> tuple[None, str, str]:
    """A request for a picture; the answer says what it asks for, object by object."""
    metadata = random_prompt(rng, None, split).metadata
    parts = []
    for clause in metadata["include"]:
        words = (NUMBER_WORDS[clause["count"]], clause.get("size"), clause.get("color"), clause["class"])
        parts.append(" ".join(word for word in words if word))
        if "position" in clause:
            relation, other = clause["position"]
            parts[-1] += f" {relation} the {metadata['include'][other]['class']}"
    if "background" in metadata:
        parts.append(f"on {metadata['background']}")
    return None, f"list: {metadata['prompt']}", ", ".join(parts)


_SCENE_MAKERS = {
    "caption": _caption,
    "count": _count,
    "where": _where,
    "color": _color,
    "size": _size,
    "box": _box,
    "read": _read,
}
_TEXT_MAKERS = {"ground": _ground, "parse": _parse}
QUESTION_TAGS = (*_SCENE_MAKERS, *_TEXT_MAKERS)
# What only training asks: several questions of `QUESTION_TAGS` in one.
_EXERCISE_MAKERS = {"places": _places}
ALL_TAGS = (*QUESTION_TAGS, *_EXERCISE_MAKERS)
# Words of questions and answers that no prompt has.
QUESTION_WORDS = (
    *(
        "answer",
        "are",
        "at",
        "bbox",
        "color",
        "d",
        "describe",
        "every",
        "how",
        "image",
        "in",
        "is",
        "json",
        "label",
        "list",
    ),
    *("locate", "many", "object", "one", "there", "what", "where", "zero"),
)


def random_question(
    rng: np.random.Generator, tag: str | None = None, split: str = "train", most: int = MAX_THINGS
) -> ShapesQuestion:
    """A question of kind `tag` (any of `QUESTION_TAGS` if None); about a scene alone, it has at most `most` objects.

    In 'train' neither a scene nor a prompt or an instruction shows a held-out combination. In 'heldout' the scene shows one,
    or the prompt or instruction asks for one.

    Raises:
      ValueError: for an unknown kind or split.
    """
    if tag is not None and tag not in ALL_TAGS:
        raise ValueError(f"'{tag}' is not a kind of question; use one of {', '.join(ALL_TAGS)}.")
    if split not in ("train", "heldout"):
        raise ValueError(f"'{split}' is not a split of the shapes world; use 'train' or 'heldout'.")
    tag = QUESTION_TAGS[rng.integers(len(QUESTION_TAGS))] if tag is None else tag
    if tag in _TEXT_MAKERS:
        scene, question, answer = _TEXT_MAKERS[tag](rng, split)
        return ShapesQuestion(scene, tag, question, answer)
    while True:
        scene = random_scene(rng, int(rng.integers(1, most + 1)))
        if tag == "count" and rng.integers(2):
            # Objects of one class, or large counts would hardly ever be right.
            shape = CLASSES[rng.integers(len(CLASSES))]
            scene = Scene(scene.background, tuple(dataclasses.replace(thing, shape=shape) for thing in scene.things))
        if shows_held_out(scene) != (split == "heldout"):
            continue
        if made := (_SCENE_MAKERS | _EXERCISE_MAKERS)[tag](rng, scene):
            return ShapesQuestion(scene, tag, *made)
