"""Seeds of any sign and size."""

import jax
import numpy as np
import pytest

from unipic2_jax.flow.seeds import folded
from unipic2_jax.models import sampling
from unipic2_jax.training import config as config_lib


@pytest.mark.parametrize("seed, meant", [(0, 0), (2**32 - 1, 2**32 - 1), (2**32, 0), (-1, 2**32 - 1), (2**70 + 3, 3)])
def test_a_seed_is_its_remainder(seed, meant):
    assert folded(seed) == meant == folded(np.array(seed, object).item())
    keys = sampling.image_keys([seed])
    np.testing.assert_array_equal(jax.random.key_data(keys), jax.random.key_data(sampling.image_keys([meant])))


@pytest.mark.parametrize("seed", [1.5, None, "3"])
def test_what_is_no_whole_number_is_a_sentence(seed):
    with pytest.raises(ValueError, match=r"^config\.seed is .*, and it must be a whole number\.$"):
        folded(seed, "config.seed")


def test_every_seed_of_a_configuration_is_folded():
    data = {"heldout": {"source": {"kind": "shapes"}, "seed": -3}}
    stage = {"kind": "grpo", "evaluations": data}
    config = config_lib.validate(config_lib.make_config({"seed": -1, "schedule": ("edit",), "stages": {"edit": stage}}))
    assert config.seed == 2**32 - 1 and config.stages.edit.evaluations.heldout.seed == 2**32 - 3
