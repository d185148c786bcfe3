"""Encoded pictures for the tests of data, and what is common to all bad records."""

import io
import pickle

import numpy as np
import pytest
from PIL import Image

from unipic2_jax.pictures.decode import BadRecord, decode


def pixels(seed=0, height=12, width=20):
    """A smooth picture, which JPEG keeps well."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (3, 3, 3), np.uint8))
    return np.asarray(small.resize((width, height), Image.Resampling.BICUBIC))


def encoded(image, kind="PNG", **options):
    data = io.BytesIO()
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    image.save(data, kind, **options)
    return data.getvalue()


def seed_of(picture):
    """Which of the pictures `pixels(seed)` this is."""
    found = np.asarray(decode(picture), int)
    return min(range(40), key=lambda seed: np.abs(found - pixels(seed)).sum())


def reason_of(call):
    with pytest.raises(BadRecord) as caught:
        call()
    sentence = str(caught.value)
    assert "\n" not in sentence and sentence.endswith(".") and ";" in sentence, sentence
    assert pickle.loads(pickle.dumps(caught.value)).reason == caught.value.reason
    return caught.value.reason
