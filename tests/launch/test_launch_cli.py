"""What commands share."""

import logging

import jax.numpy as jnp
import pytest

from launch import cli
from unipic2_jax.models import attention


@pytest.fixture
def logger():
    found = logging.getLogger("unipic2_jax")
    before = found.level, found.propagate, found.handlers
    yield found
    found.setLevel(before[0])
    found.propagate, found.handlers = before[1:]


def test_the_kernel_of_attention_is_shown_once(logger, capsys):
    cli.show_log()
    cli.show_log()  # does not show everything twice
    attention._say.cache_clear()
    x = jnp.ones((1, 4, 2, 8))
    for _ in range(2):
        attention.attention(x, x, x)
    assert capsys.readouterr().err == "attention on cpu: xla\n"
