"""Pictures that stay 8 bits until they are in a program against transformers' image processor, to the bit."""

import jax
import numpy as np
import pytest
from PIL import Image
from qwen_reference import SMALL, processor

from unipic2_jax.models.qwen.pictures import Levels, Look
from unipic2_jax.models.qwen.processor import pixel_limits, user_message
from unipic2_jax.models.qwen.vision import pack_images

PROCESSOR = processor(SMALL)


def picture(width, height, seed):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def asked(rows):
    return [[user_message(row, text)] for row, text in zip(rows, ("a", "bcd", "e"))]


def same(given, rows, pixels=None):
    """Whether the program sees the floats that transformers makes."""
    limits = {} if pixels is None else {"size": pixel_limits(pixels, pixels)}
    made = PROCESSOR.image_processor(images=[p for row in rows for p in row], return_tensors="np", **limits)
    media = {SMALL.image_token_id: (made["pixel_values"], made["image_grid_thw"])}
    want = pack_images(SMALL.vision_config, given.input_ids, media, given.vision.frames.shape[1])
    got = jax.jit(lambda vision: vision.patches.patches(vision.frames))(given.vision)
    np.testing.assert_array_equal(got, want.patches)
    for name in ("places", "frames", "tokens"):
        np.testing.assert_array_equal(getattr(given.vision, name), getattr(want, name))


@pytest.mark.parametrize("slots", [(), (0,), (1,), (0, 1)], ids=str)
@pytest.mark.parametrize("pixels", [None, 400], ids=["limits", "pixels"])
def test_patches_are_those_of_transformers_wherever_they_are_made(slots, pixels):
    rows = [[picture(20, 44, seed), picture(37, 21, seed + 9)] for seed in range(3)]
    given = PROCESSOR(asked(rows), pixels=pixels, in_program=slots)
    levels = given.vision.patches
    assert (
        isinstance(levels, Levels)
        and [x.shape[1:3] for x in levels.pixels]
        == [(44, 20), (21, 37)][slice(min(slots, default=0), max(slots, default=-1) + 1)]
    )
    assert (levels.windows is None) == (slots == (0, 1)) and (levels.index is None) == (slots == ())
    assert all(leaf.dtype in (np.uint8, np.int32) for leaf in jax.tree.leaves(given.vision))
    same(given, rows, pixels)


def test_pictures_of_several_sizes_or_counts_are_made_by_the_host():
    rows = [[picture(20, 44, 0), picture(24, 16, 1)], [picture(36, 36, 2), picture(24, 16, 3)]]
    given = PROCESSOR(asked(rows), in_program=(0, 1))
    assert [x.shape for x in given.vision.patches.pixels] == [(2, 16, 24, 3)]
    same(given, rows)
    rows = [[picture(24, 16, 1)], [], [picture(24, 16, 3), picture(24, 16, 4)]]
    given = PROCESSOR(asked(rows), in_program=(0, 1))
    assert given.vision.patches.pixels == ()
    same(given, rows)


def test_the_look_is_the_processors():
    look = Look.of(PROCESSOR.image_processor)
    assert look == Look.of(processor(SMALL).image_processor) and hash(look) is not None
    other = processor(SMALL).image_processor
    other.image_mean = [0.5] * 3
    assert Look.of(other) != look
    other.do_resize = False
    assert Look.of(other) is None and Look.of(object()) is None


def test_what_comes_twice_is_prepared_once(monkeypatch):
    from unipic2_jax.models.qwen import processor as module

    counted = []
    monkeypatch.setattr(module, "to_pil", lambda p, to_pil=module.to_pil: counted.append(p) or to_pil(p))
    monkeypatch.setattr(module, "host_patches", lambda *a, make=module.host_patches: counted.append(a) or make(*a))
    array = np.asarray(picture(20, 44, 0))
    PROCESSOR([[user_message([array], "draw it")] for _ in range(5)])
    assert len(counted) == 2
