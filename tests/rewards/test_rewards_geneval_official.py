"""GenEval's rules against another implementation of them, on the official prompts and on random ones."""

import numpy as np
import pytest
from geneval_reference import official_rows, random_detections, verdict

from unipic2_jax.rewards.geneval.classes import CLASSES
from unipic2_jax.rewards.geneval.prompts import generate
from unipic2_jax.rewards.geneval.rules import COLORS, RELATIONS, Detection, Rules, counted, score

CUP = {"class": "cup", "count": 1}


def seen(name, box, color, confidence):
    return Detection(name, box, color, confidence=confidence)


def odd_rows(rng, count):
    """Metadata as GenEval's format allows it and its prompts do not have it: several clauses of all kinds, excluded classes."""
    few = CLASSES[:6]
    for _ in range(count):
        include = []
        for place in range(rng.integers(1, 5)):
            clause = {"class": str(rng.choice(few)), "count": int(rng.integers(1, 4))}
            if rng.random() < 0.4:
                clause["color"] = str(rng.choice(COLORS))
            if place and rng.random() < 0.4:
                clause["position"] = [str(rng.choice(RELATIONS)), int(rng.integers(place))]
            include.append(clause)
        exclude = [{"class": str(rng.choice(few)), "count": int(rng.integers(1, 5))} for _ in range(rng.integers(2))]
        yield {"tag": str(rng.choice(["counting", "two_object"])), "include": include, "exclude": exclude, "prompt": ""}


def check(rng, row, **options):
    detections = random_detections(rng, row, seen)
    ours, theirs = score(detections, row, rules=Rules(**options)), verdict(detections, row, **options)
    assert (ours.correct, ours.extras) == (theirs[0], theirs[2]), (row, detections, ours.reasons)
    assert ours.reward == pytest.approx(theirs[1], abs=1e-12), (row, detections)
    assert ours.correct == (not ours.reasons)
    return ours.correct


def test_official_prompts():
    rng = np.random.default_rng(0)
    right = [check(rng, row) for row in official_rows() for _ in range(6)]
    assert 0.2 < np.mean(right) < 0.8, "the pictures must be neither hopeless nor perfect to try the rules"


def test_random_prompts():
    rng = np.random.default_rng(1)
    rows = generate(dict.fromkeys(("two_object", "counting", "colors", "position", "color_attr"), 120), seed=2)
    right = [check(rng, row) for row in rows for _ in range(3)]
    assert 0.2 < np.mean(right) < 0.8


def test_any_metadata():
    rng = np.random.default_rng(2)
    right = [check(rng, row) for row in odd_rows(rng, 4000)]
    assert 0.02 < np.mean(right) < 0.98


def test_overlap_as_an_option():
    rng = np.random.default_rng(3)
    fewer = 0
    for row in official_rows()[::4]:
        for max_overlap in (0.2, 0.5, 0.9):
            check(rng, row, max_overlap=max_overlap, most=int(rng.integers(1, 17)))
            detections = random_detections(rng, row, seen)
            kept = counted(detections, row, Rules(max_overlap=max_overlap))
            fewer += sum(map(len, kept.values())) < sum(map(len, counted(detections, row).values()))
    assert fewer > 20


def test_partial_credit_is_full_where_the_verdict_is_right():
    rng = np.random.default_rng(4)
    for row in official_rows():
        for exact in (False, True):
            found = score(random_detections(rng, row, seen), row, exact=exact)
            assert found.correct == (found.reward == 1)


def test_confidence_decides_what_counts_and_in_which_order():
    one = {"tag": "colors", "include": [{"class": "cup", "count": 1, "color": "red"}], "prompt": "a red cup"}
    cup = lambda color, confidence: Detection("cup", (0, 0, 9, 9), color, confidence=confidence)
    assert not score([cup("red", 0.3)], one).correct, "exactly at the threshold is not above it"
    assert score([cup("red", 0.31)], one).correct
    assert not score([cup("red", 0.5), cup("blue", 0.6)], one).correct
    assert score([cup("blue", 0.5), cup("red", 0.6)], one).correct
    assert score([cup("red", 0.2)], one, rules=Rules(threshold=0.1)).correct

    two = {
        "tag": "counting",
        "include": [{"class": "cup", "count": 2}],
        "exclude": [{"class": "cup", "count": 3}],
        "prompt": "",
    }
    assert score([cup(None, 0.95), cup(None, 0.91), cup(None, 0.9)], two).correct
    three = score([cup(None, 0.95)] * 3, two)
    assert not three.correct and three.reward == 0.5 and three.extras == 1
    assert sum(map(len, counted([cup(None, 0.95)] * 40, two).values())) == 16


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "x"}, "says nothing of what to find"),
        ({"prompt": "x", "include": [{"class": "cup"}]}, "no 'count'"),
        ({"prompt": "x", "include": [{"class": "cup", "count": 0}]}, "use 1 or more"),
        ({"prompt": "x", "include": [{"class": "cup", "count": "2"}]}, "Clause 0 of 'x' wants '2' cup; use 1 or more"),
        ({"prompt": "x", "include": [{"class": "cup", "count": 2.0}]}, "wants 2.0 cup"),
        ({"prompt": "x", "include": [{"class": "cup", "count": True}]}, "wants True cup"),
        ({"prompt": "x", "include": [{"class": ["cup"], "count": 1}]}, r"has the class \['cup'\]; write its name"),
        ({"prompt": "x", "include": "cat"}, "'x' has as 'include' is no list of clauses"),
        ({"prompt": "x", "include": ["cat"]}, "'x' has as 'include' is no list of clauses"),
        ({"prompt": "x", "include": {"class": "cup", "count": 1}}, "'x' has as 'include' is no list of clauses"),
        ({"prompt": "x", "include": [CUP], "exclude": None}, "'x' has as 'exclude' is no list of clauses"),
        (
            {"prompt": "x", "include": [CUP], "exclude": [{"class": "cup"}]},
            "Clause 1 of 'x' has no 'class' or no 'count'",
        ),
        (
            {"prompt": "x", "include": [CUP], "exclude": [{"class": "cup", "count": "3"}]},
            "Clause 1 of 'x' wants '3' cup",
        ),
        ({"prompt": "x", "include": [CUP | {"color": "crimson"}]}, "the color 'crimson'; use one of red, orange"),
        ({"prompt": "x", "include": [CUP | {"color": ["red"]}]}, r"the color \['red'\]"),
        (
            {"prompt": "x", "include": [CUP, CUP | {"position": ["to the right of", 0]}]},
            "'to the right of', 0.*left of",
        ),
        ({"prompt": "x", "include": [CUP, CUP | {"position": ["above"]}]}, "Clause 1 of 'x' has the position"),
        ({"prompt": "x", "include": [CUP, CUP | {"position": "above"}]}, "the position 'above'"),
        (
            {"prompt": "x", "include": [CUP, CUP | {"position": ["above", "0"]}]},
            "clause '0', which does not come before",
        ),
        ({"prompt": "x", "include": [CUP, CUP | {"position": ["above", 1]}]}, "clause 1, which does not come before"),
        ({"prompt": "x", "include": [CUP, CUP | {"position": ["above", -1]}]}, "clause -1, which does not come before"),
    ],
)
def test_metadata_without_rules_gets_one_sentence(row, words):
    with pytest.raises(ValueError, match=words):
        score([], row)


@pytest.mark.parametrize("field", [{"threshold": 1.5}, {"max_overlap": -1}, {"most": 0}])
def test_rules_refuse_impossible_numbers(field):
    with pytest.raises(ValueError, match=next(iter(field))):
        Rules(**field)
