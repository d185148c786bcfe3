"""Agreement of predictions with a judge."""

import numpy as np
import pytest

from unipic2_jax.evaluation.agreement import agreement, reliability, reliability_picture


def test_numbers_are_those_of_their_definitions():
    predicted, scores = np.array([0.1, 0.4, 0.35, 0.8]), np.array([0.0, 0.5, 0.5, 1.0])
    found = agreement(predicted, scores, ["a", "a", "b", "b"])
    assert found.pearson == pytest.approx(np.corrcoef(predicted, scores)[0, 1])
    # Ranks 1, 3, 2, 4 against 1, 2.5, 2.5, 4.
    assert found.spearman == pytest.approx(np.corrcoef([1, 3, 2, 4], [1, 2.5, 2.5, 4])[0, 1])
    assert found.pairs == 1 and found.group_pairs == 1
    assert agreement(-predicted, scores).pairs == 0
    # One pair of five is turned round, another is tied.
    found = agreement([0.5, 0.4, 0.4, 0.4], [0.0, 0.5, 0.5, 1.0], ["a", "a", "b", "b"])
    assert found.pairs == pytest.approx(1 / 5) and found.group_pairs == pytest.approx(0.5 / 2)


def test_many_pairs_are_counted_in_parts():
    rng = np.random.default_rng(0)
    scores = rng.permutation(3000) / 3000
    assert agreement(scores, scores).pairs == 1
    assert abs(agreement(rng.random(3000), scores).pairs - 0.5) < 0.05


def test_calibration():
    scores = np.repeat([0.25, 0.75], 50)
    calibrated = agreement(scores, scores)
    assert calibrated.calibration_error == 0 and calibrated.bins == ((0.25, 0.25, 50), (0.75, 0.75, 50))
    assert agreement(scores + 0.2, scores).calibration_error == pytest.approx(0.2)
    assert reliability(np.array([1.0, 0.95]), np.array([1.0, 0.0])) == ((0.975, 0.5, 2),)
    assert reliability_picture(calibrated.bins, "held-out").mode == "RGB"


def test_a_constant_has_no_correlation_and_bad_lists_are_said():
    found = agreement(np.full(4, 0.5), np.linspace(0, 1, 4))
    assert np.isnan(found.spearman) and set(found.numbers()) == {"pairs", "calibration_error"}
    assert found.pairs == 0.5
    with pytest.raises(ValueError, match="two lists of one length"):
        agreement([0.1], [0.1, 0.2])
    with pytest.raises(ValueError, match="must be finite"):
        agreement([0.1, np.nan], [0.1, 0.2])
