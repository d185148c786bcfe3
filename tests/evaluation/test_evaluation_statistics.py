"""The paired bootstrap."""

import numpy as np
import pytest

from unipic2_jax.evaluation.statistics import paired_bootstrap


def test_interval_is_that_of_the_normal_approximation():
    rng = np.random.default_rng(0)
    before = rng.normal(0, 1, 400)
    after = before + rng.normal(0.1, 0.5, 400)
    found = paired_bootstrap(before, after)
    spread = 1.96 * (after - before).std(ddof=1) / 20
    assert found.difference == pytest.approx((after - before).mean())
    assert found.low == pytest.approx(found.difference - spread, abs=0.006)
    assert found.high == pytest.approx(found.difference + spread, abs=0.006)
    assert paired_bootstrap(before, after) == found
    assert paired_bootstrap(after, before).high == pytest.approx(-found.low, abs=0.006)


def test_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(300):
        found = paired_bootstrap(np.zeros(50), rng.normal(0.3, 1, 50), resamples=1000)
        covered += found.low <= 0.3 <= found.high
    assert 0.90 < covered / 300 < 0.98


def test_samples_of_a_prompt_are_one_unit():
    """Copies of a sample must not make the interval narrower."""
    rng = np.random.default_rng(2)
    before, after = rng.normal(0, 1, 60), rng.normal(0.2, 1, 60)
    one = paired_bootstrap(before, after)
    copies = paired_bootstrap(np.repeat(before[:, None], 8, 1), np.repeat(after[:, None], 8, 1))
    assert (copies.low, copies.high, copies.prompts) == pytest.approx((one.low, one.high, 60))


def test_failed_scores_are_dropped_not_zero():
    found = paired_bootstrap([[0.5, np.nan], [np.nan, np.nan], [0.1, 0.3]], [[0.7, 0.7], [1.0, 1.0], [np.nan, 0.4]])
    assert (found.prompts, found.dropped) == (2, 1)
    assert found.difference == pytest.approx(0.2)
    assert found.risen and not found.fallen


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(ValueError, match="not pairs"):
        paired_bootstrap([1.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="nothing can be compared"):
        paired_bootstrap([np.nan], [1.0])
