"""GenEval's rules on given detections, and the shapes rewards on top of them."""

import numpy as np
import pytest

from unipic2_jax.data.prompts import make_source
from unipic2_jax.rewards.base import make_reward
from unipic2_jax.rewards.geneval.rules import Detection, relative_position, score
from unipic2_jax.shapes.sources import scene_from_dict
from unipic2_jax.shapes.world import Scene, render


def at(name, x, y, color=None, side=10):
    return Detection(name, (x - side / 2, y - side / 2, x + side / 2, y + side / 2), color)


def test_relative_position_of_the_four_directions_and_diagonals():
    middle = at("b", 50, 50)
    assert relative_position(at("a", 20, 50), middle) == {"left of"}
    assert relative_position(at("a", 80, 50), middle) == {"right of"}
    assert relative_position(at("a", 50, 20), middle) == {"above"}
    assert relative_position(at("a", 50, 80), middle) == {"below"}
    assert relative_position(at("a", 80, 80), middle) == {"right of", "below"}
    assert relative_position(at("a", 51, 50), middle) == set()  # within a tenth of the summed extents
    assert relative_position(at("a", 60, 90), middle) == {"below"}  # too steep to be 'right of' as well


def test_counting_is_strict_about_too_few_and_too_many():
    metadata = {"include": [{"class": "cup", "count": 2}], "exclude": [{"class": "cup", "count": 3}]}
    cups = [at("cup", x, 0) for x in (0, 20, 40)]
    assert not score(cups[:1], metadata).correct
    assert score(cups[:2], metadata).correct
    assert not score(cups, metadata).correct
    assert score(cups[:1], metadata).reward == 0.5


def test_extras_pass_in_geneval_and_fail_when_exact():
    metadata = {"include": [{"class": "cup", "count": 1}]}
    found = [at("cup", 0, 0), at("dog", 20, 0), at("cup", 40, 0)]
    assert score(found, metadata).correct
    exact = score(found, metadata, exact=True)
    assert not exact.correct and exact.extras == 2 and exact.reward < score(found[:1], metadata, exact=True).reward == 1


def test_colour_and_position_clauses():
    metadata = {
        "include": [
            {"class": "cup", "count": 1, "color": "red"},
            {"class": "dog", "count": 1, "color": "blue", "position": ["right of", 0]},
        ]
    }
    good = [at("cup", 0, 0, "red"), at("dog", 50, 0, "blue")]
    assert score(good, metadata).correct and score(good, metadata).reward == 1
    swapped = [at("cup", 0, 0, "blue"), at("dog", 50, 0, "red")]
    assert not score(swapped, metadata).correct and score(swapped, metadata).reward == pytest.approx(3 / 5)
    wrong_side = [at("cup", 0, 0, "red"), at("dog", -50, 0, "blue")]
    assert score(wrong_side, metadata).reward == pytest.approx(4 / 5)
    assert score([], metadata).reward == 0


def test_position_must_point_back():
    metadata = {"include": [{"class": "cup", "count": 1, "position": ["above", 1]}, {"class": "dog", "count": 1}]}
    with pytest.raises(ValueError, match="does not come before"):
        score([at("cup", 0, 0)], metadata)


@pytest.mark.parametrize("task", ["t2i", "edit"])
def test_shapes_rewards_rank_blank_below_right(task):
    records = make_source({"kind": "shapes", "task": task}, 0).batch(0, 12)
    reward = make_reward(f"shapes_{task}")
    blank = [render(Scene("white", ()))] * len(records)
    low = reward.score(blank, records)
    assert low.values.shape == (12,) and np.isfinite(low.values).all() and low.values.mean() < 0.5
    if task == "edit":
        same = reward.score([record.image for record in records], records)
        assert (same.details["preservation"] == 1).all() and (same.details["correct"] == 0).all()
        sources = [render(scene_from_dict(record.metadata["source"])) for record in records]
        assert all((a == record.image).all() for a, record in zip(sources, records))


def test_unknown_reward_and_option():
    with pytest.raises(ValueError, match="does not exist"):
        make_reward("beauty")
    with pytest.raises(ValueError, match="does not take"):
        make_reward("shapes_t2i", softness=1)
