"""The shapes world: rendering, reading back, prompts, edits and the split."""

import dataclasses

import numpy as np
import pytest

from unipic2_jax.rewards.geneval.rules import TAGS, score
from unipic2_jax.shapes.edits import EDIT_TYPES, random_edit, score_edit
from unipic2_jax.shapes.pool import WORDS, dense_scene, edit_example, prompt_example
from unipic2_jax.shapes.prompts import combinations, detections, held_out, random_prompt, shows_held_out
from unipic2_jax.shapes.sources import ShapesSource, scene_from_dict, scene_to_dict
from unipic2_jax.shapes.verify import UNKNOWN, read_scenes
from unipic2_jax.shapes.world import CELL, NUM_CELLS, Scene, Thing, random_scene, render


def scenes(count, seed=0):
    rng = np.random.default_rng(seed)
    return [random_scene(rng, int(rng.integers(0, NUM_CELLS + 1))) for _ in range(count)]


def test_verifier_is_exact_on_clean_renders():
    truth = scenes(1500)
    assert read_scenes(np.stack([render(scene) for scene in truth])) == truth


def test_verifier_survives_noise_and_blur():
    truth = scenes(300, 1)
    images = np.stack([render(scene) for scene in truth]).astype(np.float32)
    blurred = (images + np.roll(images, 1, 1) + np.roll(images, 1, 2) + np.roll(images, (1, 1), (1, 2))) / 4
    for changed in (images + np.random.default_rng(2).normal(0, 6, images.shape), 0.6 * images + 0.4 * blurred):
        seen = read_scenes(np.clip(np.rint(changed), 0, 255).astype(np.uint8))
        assert np.mean([a == b for a, b in zip(truth, seen)]) > 0.97


def test_what_is_no_object_is_seen_as_unknown():
    blank = render(Scene("white", ()))
    smear = blank.copy()
    smear[2:14, 2:5] = (215, 40, 40)  # a bar, which is no class of the world
    shifted = np.roll(render(Scene("white", (Thing(4, "square", "blue"),))), CELL // 2, axis=1)  # half off its cell
    odd = render(Scene("white", (Thing(0, "square", "red"),)))
    odd[1:15, 1:15] = (255, 128, 0)  # a colour that has no name here
    bar, halves, orange = read_scenes(np.stack([smear, shifted, odd]))
    assert [thing.shape for thing in bar.things] == [UNKNOWN]
    assert len(halves.things) == 2 and all(thing.shape == UNKNOWN for thing in halves.things)
    assert orange.things[0].color == UNKNOWN
    assert read_scenes(blank[None])[0].things == ()


def test_two_coloured_object_is_not_read_as_either():
    image = render(Scene("white", (Thing(4, "square", "red"),)))
    image[16:32, 24:32] = render(Scene("white", (Thing(4, "square", "green"),)))[16:32, 24:32]
    assert read_scenes(image[None])[0] != Scene("white", (Thing(4, "square", "red"),))


def test_verifier_refuses_other_sizes():
    with pytest.raises(ValueError, match="48 x 48"):
        read_scenes(np.zeros((1, 64, 64, 3), np.uint8))


def test_two_objects_cannot_share_a_cell():
    with pytest.raises(ValueError, match="share a cell"):
        Scene("white", (Thing(1, "circle", "red"), Thing(1, "cross", "blue")))


@pytest.mark.parametrize("split", ["train", "heldout"])
@pytest.mark.parametrize("tag", TAGS)
def test_prompts_are_fulfilled_by_their_scenes(tag, split):
    rng = np.random.default_rng(3)
    for _ in range(40):
        found = random_prompt(rng, tag, split)
        assert found.metadata["tag"] == tag
        assert score(detections(found.scene), found.metadata, exact=True).correct
        assert set(found.prompt.split()) <= set(WORDS)
        if split == "train":
            assert not shows_held_out(found.scene)
        else:
            assert any(held_out(key) for key in combinations(found.scene))


@pytest.mark.parametrize("kind", EDIT_TYPES)
def test_edits_are_fulfilled_by_their_targets_and_not_by_doing_nothing(kind):
    rng = np.random.default_rng(4)
    for split in ("train", "heldout"):
        for _ in range(40):
            edit = random_edit(rng, kind, split)
            assert score_edit(edit.target, edit.source, edit.metadata).correct
            untouched = score_edit(edit.source, edit.source, edit.metadata)
            assert untouched.instruction < 1 and untouched.preservation == 1
            assert set(edit.prompt.split()) <= set(WORDS)
            assert len(edit.prompt.split()) <= 9


def test_edit_score_sees_damage_and_extras():
    source = Scene("white", (Thing(0, "circle", "red"), Thing(4, "square", "blue")))
    metadata = {"type": "recolor", "cell": 0, "color": "green"}
    done = source.replace(0, Thing(0, "circle", "green"))
    assert score_edit(done, source, metadata).correct
    damaged = score_edit(done.replace(4, Thing(4, "square", "purple")), source, metadata)
    assert damaged.instruction == 1 and damaged.preservation == 0.5
    cluttered = score_edit(done.replace(8, Thing(8, UNKNOWN, "red", UNKNOWN)), source, metadata)
    assert cluttered.instruction == 1 and cluttered.preservation == 0.5
    other_ground = score_edit(dataclasses.replace(done, background="pink"), source, metadata)
    assert other_ground.preservation == 0.5 and not other_ground.correct


def test_splits_and_kinds_that_do_not_exist():
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="not a split"):
        random_prompt(rng, "colors", "test")
    with pytest.raises(ValueError, match="not a split"):
        random_edit(rng, "add", "test")
    with pytest.raises(ValueError, match="not a GenEval tag"):
        random_prompt(rng, "colour")
    with pytest.raises(ValueError, match="not an edit type"):
        random_edit(rng, "paint")
    with pytest.raises(ValueError, match="no task"):
        ShapesSource(task="video")


def test_examples_are_functions_of_their_number():
    for make in (prompt_example, edit_example, dense_scene):
        assert make(0, 5) == make(0, 5)
        assert make(0, 5) != make(0, 6)
        assert make(0, 5) != make(1, 5)


def test_source_goes_through_the_tags_and_never_repeats_a_step():
    for task, tags in (("t2i", TAGS), ("edit", EDIT_TYPES)):
        source = ShapesSource(seed=1, task=task, split="heldout")
        records = source.batch(3, len(tags))
        assert [record.metadata["tag"] for record in records] == list(tags)
        assert [r.prompt for r in records] == [r.prompt for r in ShapesSource(1, task, "heldout").batch(3, len(tags))]
        assert [r.key for r in records] != [r.key for r in source.batch(4, len(tags))]
        assert all((record.image is None) == (task == "t2i") for record in records)


def test_scenes_survive_json():
    for scene in scenes(20):
        assert scene_from_dict(scene_to_dict(scene)) == scene


def test_source_takes_turns_as_told():
    records = ShapesSource(task="edit", tags=("move", "arrange", "move")).batch(0, 4)
    assert [record.metadata["tag"] for record in records] == ["move", "arrange", "move", "move"]
    with pytest.raises(ValueError, match="has no tag 'colors'"):
        ShapesSource(task="edit", tags=("colors",))
