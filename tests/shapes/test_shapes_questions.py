"""Questions about scenes: one right answer each, and scenes of the right split."""

import json

import numpy as np
import pytest

from unipic2_jax.shapes.prompts import shows_held_out
from unipic2_jax.shapes.questions import ALL_TAGS, NUMBER_WORDS, QUESTION_WORDS, random_question
from unipic2_jax.shapes.sources import ShapesQuestions
from unipic2_jax.shapes.world import CELL, CELL_NAMES, CLASSES, GRID


def questions(tag, count=200, split="train"):
    rng = np.random.default_rng(1)
    return [random_question(rng, tag, split) for _ in range(count)]


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_scenes_belong_to_their_split(split):
    about_scenes = [q for q in questions(None, 400, split) if q.tag not in ("ground", "parse")]
    assert all(shows_held_out(q.scene) == (split == "heldout") for q in about_scenes)


def test_texts_are_grounded_and_taken_apart():
    for q in questions("ground"):
        instruction = q.question.removeprefix("locate: ")
        # The answer is the instruction, and where the objects are that it names.
        placed = {t: f"the {t.name} at the {CELL_NAMES[t.cell]}" for t in q.scene.things}
        named = [t for t in q.scene.things if placed[t] in q.answer]
        again = q.answer
        for thing in named:
            again = again.replace(placed[thing], f"the {thing.name}")
        assert again == instruction
        assert bool(named) == any(f"the {t.name}" in instruction for t in q.scene.things)
    answers = {q.question: (q.scene, q.answer) for q in questions("parse", 3000)}
    assert answers["list: two circles"] == (None, "two circle")
    assert answers["list: a black cross on pink"] == (None, "one black cross, on pink")
    assert answers["list: a circle above a cross"] == (None, "one cross, one circle above the cross")


def test_answers_are_true():
    for q in questions("count"):
        (shape,) = (s for s in CLASSES if s in q.question)
        assert NUMBER_WORDS.index(q.answer) == sum(t.shape == shape for t in q.scene.things)
    for q in questions("where"):
        (thing,) = (t for t in q.scene.things if f"the {t.name}?" in q.question)
        assert q.answer == f"at the {CELL_NAMES[thing.cell]}"
    for q in questions("places"):
        names = q.question.removeprefix("locate: ").split(", ")
        cells = {t.name: CELL_NAMES[t.cell] for t in q.scene.things}
        assert q.answer == ", ".join(f"{name} at the {cells[name]}" for name in names)
    for q in questions("color"):
        (thing,) = (t for t in q.scene.things if f"the {t.shape}?" in q.question)
        assert q.answer == thing.color
    for q in questions("size"):
        (thing,) = (t for t in q.scene.things if f"the {t.name}?" in q.question)
        assert q.answer == thing.size
    for q in questions("box"):
        ((entry,),) = (json.loads(q.answer),)
        (thing,) = (t for t in q.scene.things if t.name == entry["label"])
        left, top, right, bottom = entry["bbox_2d"]
        row, column = divmod(thing.cell, GRID)
        assert column * CELL <= left < right <= (column + 1) * CELL and row * CELL <= top < bottom <= (row + 1) * CELL
    for tag in ("caption", "read"):
        for q in questions(tag):
            places = [q.answer.index(f"{t.name} at the {CELL_NAMES[t.cell]}") for t in q.scene.things]
            assert places == sorted(places) and q.answer.count(" at the ") == len(places)
    assert {q.answer for q in questions("count", 400)} == set(NUMBER_WORDS)


def test_every_word_has_a_token():
    from unipic2_jax.shapes.pool import WORDS

    words = {*WORDS, *QUESTION_WORDS}
    used = " ".join(f"{q.question} {q.answer}" for q in questions(None, 500))
    letters = "".join(c if c.isalpha() else " " for c in used.replace("bbox_2d", "bbox d"))
    assert set(letters.split()) <= words
    assert not set(QUESTION_WORDS) & set(WORDS)


def test_unknown_kinds_and_splits_are_named():
    with pytest.raises(ValueError, match=f"use one of {', '.join(ALL_TAGS)}"):
        random_question(np.random.default_rng(0), "weather")
    with pytest.raises(ValueError, match="'weather' is not a kind of question; use some of"):
        ShapesQuestions(tags=("where", "weather"))
    asked = ShapesQuestions(tags=("where", "places", "where"))
    assert [asked.question(i).tag for i in range(4)] == ["where", "places", "where", "where"]
    with pytest.raises(ValueError, match="'test' is not a split"):
        random_question(np.random.default_rng(0), "count", "test")
