"""JSON that Python would take and others would not."""

import pytest

from unipic2_jax.core.strict import as_number, excerpt, read_json


@pytest.mark.parametrize("text", ["NaN", "[Infinity]", '{"a": 1, "a": 2}', "[" * 100_000, b"\xff", "", "{'a': 1}"])
def test_what_is_no_json(text):
    with pytest.raises(ValueError):
        read_json(text)


def test_numbers_are_finite_and_truth_is_none():
    assert read_json(b'{"a": [1, 2.5, null]}') == {"a": [1, 2.5, None]}
    assert [as_number(value) for value in (1, 2.5, -0.0)] == [1, 2.5, 0]
    for other in (True, None, "1", float("nan"), float("inf"), 10**400, [1]):
        assert as_number(other) is None


def test_excerpts_are_short_lines():
    assert excerpt("a\n b\tc") == "a b c" and excerpt(b"\xff") == "\ufffd"
    assert len(excerpt("x" * 1000)) == 120
