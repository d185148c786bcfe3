"""Resizing inside a program against Pillow's."""

import jax
import numpy as np
import pytest
from PIL import Image

from unipic2_jax.pictures import bicubic


@pytest.mark.parametrize(
    ("old", "new"),
    [((64, 64), (56, 56)), ((16, 24), (28, 28)), ((100, 37), (28, 56)), ((60, 99), (100, 50)), ((5, 7), (56, 28))],
    ids=str,
)
@pytest.mark.parametrize("harsh", [False, True], ids=["noise", "black and white"])
def test_a_program_resizes_as_pillow_does_to_the_level(old, new, harsh):
    pixels = np.random.default_rng(0).integers(0, 256, (2, *old, 3), dtype=np.uint8)
    pixels = np.where(pixels > 127, 255, 0).astype(np.uint8) if harsh else pixels  # overshoots, and is clipped
    got = np.asarray(jax.jit(bicubic.resized, static_argnums=(1, 2))(pixels, *new))
    want = [np.asarray(Image.fromarray(p).resize(new[::-1], Image.Resampling.BICUBIC)) for p in pixels]
    np.testing.assert_array_equal(got, want)


def test_a_pillow_of_another_way_is_noticed(monkeypatch):
    monkeypatch.setattr(bicubic, "A", -0.75)
    bicubic.weights.cache_clear()
    bicubic.order.cache_clear()
    assert bicubic.order(20, 20, 28, 28) == ()
    with pytest.raises(ValueError, match="20 x 20 pixels in a way that is not known"):
        bicubic.resized(np.zeros((20, 20, 3), np.uint8), 28, 28)
    bicubic.weights.cache_clear()
    bicubic.order.cache_clear()
