"""ImgEdit's arithmetic against a re-statement, on thousands of answers of which many are malformed."""

import numpy as np
import pytest

from unipic2_jax.evaluation.imgedit_rules import means, read_marks

NAMES = ("Prompt Compliance", "Visual Naturalness", "Physical & Detail Coherence")
# How a line may look -> whether the published reader takes it.
STYLES = {"{0}: {1}": True, "{0}: {1}/5": False, "**{0}:** {1}": False, "{0}: {1}.": False, "{0}: **{1}**": False}
PROSE = ("Brief reasoning: the sky is blue now.", "Brief reasoning: 3 dogs: one is gone", "", "It is 4 of 5, I think.")


def test_thousands_of_answers():
    rng = np.random.default_rng(0)
    taken = {True: 0, False: 0}
    for _ in range(4000):
        marks = rng.choice(
            8, size=rng.choice([2, 3, 3, 3, 3, 4]), p=(0.02, 0.2, 0.2, 0.2, 0.2, 0.14, 0.02, 0.02)
        ).tolist()
        styles = [
            list(STYLES)[place] for place in rng.choice(len(STYLES), size=len(marks), p=(0.8, 0.05, 0.05, 0.05, 0.05))
        ]
        lines = [style.format(NAMES[place % 3], mark) for place, (style, mark) in enumerate(zip(styles, marks))]
        answer = "\n".join([str(rng.choice(PROSE)), *lines])
        for as_published in (False, True):
            seen = [mark for style, mark in zip(styles, marks) if STYLES[style] or not as_published]
            if len(seen) == 3 and all(1 <= mark <= 5 for mark in seen):
                assert read_marks(answer, as_published) == tuple(seen), answer
                taken[as_published] += 1
            else:
                with pytest.raises(ValueError, match="marks"):
                    read_marks(answer, as_published)
    assert taken[False] > taken[True] > 500


def test_the_means_of_random_marks():
    rng = np.random.default_rng(1)
    for _ in range(200):
        count = int(rng.integers(1, 60))
        types = {str(key): f"type {rng.integers(9)}" for key in range(count + 5)}
        marks = {str(key): rng.integers(1, 6, size=3).tolist() for key in range(count)}
        found = means(marks, types)
        of_items = [round(sum(three) / 3, 2) for three in marks.values()]
        names = {types[key] for key in marks}
        for name in names:
            own = [mean for key, mean in zip(marks, of_items) if types[key] == name]
            assert found[name] == pytest.approx(sum(own) / len(own), abs=0.0051)
        assert found["items"] == pytest.approx(sum(of_items) / count)
        assert found["types"] == pytest.approx(sum(found[name] for name in names) / len(names))
        assert set(found) == names | {"types", "items"}
    assert means({}, {"1": "add"}) == {}
