"""Edits of the shapes world: an instruction, the scene before and a scene after, and the score of any result.

Seven types in ImgEdit's spirit. The score follows GEdit-Bench: instruction success and preservation of the rest apart, and
their geometric mean. Free choices (where an added object goes, how large it is) are left to the model.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from unipic2_jax.shapes.prompts import RELATIONS, held_out, relations, shows_held_out
from unipic2_jax.shapes.world import (
    BACKGROUNDS,
    CELL_NAMES,
    CLASSES,
    COLORS,
    NUM_CELLS,
    SIZES,
    Scene,
    Thing,
    random_scene,
)

EDIT_TYPES = ("add", "remove", "replace", "recolor", "background", "move", "arrange")
MAX_OBJECTS = 4


@dataclasses.dataclass(frozen=True)
class ShapesEdit:
    """An instruction with a source scene and one scene that fulfils it.

    `metadata` holds what the score needs: 'type' and, by type, 'cell' (of the object that is edited), 'color', 'shape',
    'background', 'to' (the cell that it moves to), 'relation' and 'anchor' (to which cell's object it moves relatively).
    """

    prompt: str
    metadata: dict[str, Any]
    source: Scene
    target: Scene


@dataclasses.dataclass(frozen=True)
class EditScore:
    """`instruction` and `preservation` in [0, 1]; `correct` when both are 1; `overall` is their geometric mean."""

    instruction: float
    preservation: float

    @property
    def correct(self) -> bool:
        return self.instruction == 1 and self.preservation == 1

    @property
    def overall(self) -> float:
        return math.sqrt(self.instruction * self.preservation)


def _candidate(rng: np.random.Generator, kind: str) -> tuple[ShapesEdit, str]:
    """An edit and the combination that it stands for."""

    def draw(options, but=()):
        options = [option for option in options if option not in but]
        return options[rng.integers(len(options))]

    least, most = {"add": (0, MAX_OBJECTS - 1), "remove": (2, MAX_OBJECTS), "arrange": (2, MAX_OBJECTS)}.get(
        kind, (1, MAX_OBJECTS)
    )
    source = random_scene(rng, int(rng.integers(least, most + 1)))
    ground = source.background
    metadata: dict[str, Any] = {"type": kind}
    # The object that is edited is named by colour and class, so it must be the only one of that name.
    names = [thing.name for thing in source.things]
    unique = [thing for thing in source.things if names.count(thing.name) == 1]
    if kind == "background":
        new = draw(BACKGROUNDS, (ground,))
        metadata["background"] = new
        text, key = f"change the background to {new}", f"background {ground} to {new} with {len(names)}"
        return ShapesEdit(text, metadata, source, Scene(new, source.things)), key
    if kind == "add":
        color, shape = draw(COLORS), draw(CLASSES)
        target = source.replace(cell := draw(source.free_cells), Thing(cell, shape, color, draw(SIZES)))
        metadata |= {"color": color, "shape": shape}
        return ShapesEdit(f"add a {color} {shape}", metadata, source, target), f"add {color} {shape} on {ground}"
    if not unique:
        return _candidate(rng, kind)
    old = draw(unique)
    metadata["cell"] = old.cell
    if kind == "remove":
        text, new, key = f"remove the {old.name}", None, f"remove {old.name} on {ground}"
    elif kind == "recolor":
        color = draw(COLORS, (old.color,))
        metadata["color"] = color
        text, new = f"make the {old.name} {color}", dataclasses.replace(old, color=color)
        key = f"recolor {old.name} to {color}"
    elif kind == "replace":
        color, shape = draw(COLORS), draw(CLASSES, (old.shape,))
        metadata |= {"color": color, "shape": shape}
        text = f"replace the {old.name} with a {color} {shape}"
        new, key = Thing(old.cell, shape, color, old.size), f"replace {old.name} with {color} {shape}"
    elif kind == "move":
        to = draw(source.free_cells)
        metadata["to"] = to
        text, key = f"move the {old.name} to the {CELL_NAMES[to]}", f"move {old.name} to {to}"
        moved = dataclasses.replace(old, cell=to)
        return ShapesEdit(text, metadata, source, _moved(source, old, moved)), key
    elif kind == "arrange":
        anchors = [thing for thing in unique if thing != old]
        if not anchors:
            return _candidate(rng, kind)
        anchor, relation = draw(anchors), draw(RELATIONS)
        moved = [dataclasses.replace(old, cell=cell) for cell in source.free_cells]
        moved = [thing for thing in moved if relation in relations(thing, anchor)]
        if not moved or relation in relations(old, anchor):
            return _candidate(rng, kind)
        metadata |= {"relation": relation, "anchor": anchor.cell}
        text = f"move the {old.name} {relation} the {anchor.name}"
        key = f"arrange {old.name} {relation} {anchor.name}"
        return ShapesEdit(text, metadata, source, _moved(source, old, draw(moved))), key
    else:
        raise ValueError(f"'{kind}' is not an edit type of the shapes world; use one of {', '.join(EDIT_TYPES)}.")
    return ShapesEdit(text, metadata, source, source.replace(old.cell, new)), key


def _moved(scene: Scene, old: Thing, new: Thing) -> Scene:
    return scene.replace(old.cell, None).replace(new.cell, new)


def random_edit(rng: np.random.Generator, kind: str | None = None, split: str = "train") -> ShapesEdit:
    """An edit of type `kind` (any by default).

    In 'train' neither the edit nor its scenes show a held-out combination; in 'heldout' the edit is a held-out one.
    """
    if split not in ("train", "heldout"):
        raise ValueError(f"'{split}' is not a split of the shapes world; use 'train' or 'heldout'.")
    kind = EDIT_TYPES[rng.integers(len(EDIT_TYPES))] if kind is None else kind
    while True:
        edit, key = _candidate(rng, kind)
        if split == "heldout" and held_out(key):
            return edit
        if (
            split == "train"
            and not held_out(key)
            and not shows_held_out(edit.source)
            and not shows_held_out(edit.target)
        ):
            return edit


def score_edit(result: Scene, source: Scene, metadata: dict[str, Any]) -> EditScore:
    """Scores the scene that was read from an edited image.

    instruction: share of the edit's clauses that hold (a replacement, for one: the place holds the class, and the colour).
    preservation: over the source's other objects and the background, the share that is unchanged, times 1 / (1 + extras)
      for objects where nothing should be.
    """
    kind = metadata["type"]
    edited = metadata.get("cell")
    others = [thing for thing in source.things if thing.cell != edited]
    free = [cell for cell in range(NUM_CELLS) if source.at(cell) is None]
    at = result.at(edited) if edited is not None else None
    allowed: set[int] = set()
    if kind == "background":
        clauses = [result.background == metadata["background"]]
    elif kind == "add":
        new = [thing for cell in free if (thing := result.at(cell))]
        fits = [(thing.shape == metadata["shape"]) + (thing.color == metadata["color"]) for thing in new]
        best = max(fits, default=0)
        clauses = [bool(new), best >= 1, best == 2]
        allowed = {new[fits.index(best)].cell} if new else set()
    elif kind == "remove":
        clauses = [at is None]
    elif kind == "recolor":
        before = source.at(edited)
        clauses = [
            at is not None and at.color == metadata["color"],
            at is not None and (at.shape, at.size) == (before.shape, before.size),
        ]
    elif kind == "replace":
        clauses = [at is not None and at.shape == metadata["shape"], at is not None and at.color == metadata["color"]]
    elif kind == "move":
        arrived = result.at(metadata["to"])
        clauses = [at is None, arrived == dataclasses.replace(source.at(edited), cell=metadata["to"])]
        allowed = {metadata["to"]}
    elif kind == "arrange":
        before, anchor = source.at(edited), source.at(metadata["anchor"])
        arrived = [new for cell in free if (new := result.at(cell)) == dataclasses.replace(before, cell=cell)]
        right = [new for new in arrived if metadata["relation"] in relations(new, anchor)]
        clauses = [at is None, bool(arrived), bool(right)]
        allowed = {new.cell for new in (right or arrived)[:1]}
    else:
        raise ValueError(f"'{kind}' is not an edit type of the shapes world; use one of {', '.join(EDIT_TYPES)}.")
    unchanged = [result.at(thing.cell) == thing for thing in others]
    if kind != "background":
        unchanged.append(result.background == source.background)
    extras = sum(result.at(cell) is not None for cell in free if cell not in allowed)
    preservation = (sum(unchanged) / len(unchanged) if unchanged else 1.0) / (1 + extras)
    return EditScore(sum(clauses) / len(clauses), preservation)
