"""The reward of written text, with a real reader of text on drawn pictures."""

import importlib.util
import threading

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from unipic2_jax.data.prompts import PromptRecord
from unipic2_jax.rewards.base import make_reward
from unipic2_jax.rewards.ocr import OCRReward, similarity, target_text
from unipic2_jax.rewards.scoring import Scorer, make_entries

needs_reader = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("rapidocr_onnxruntime", "rapidfuzz")),
    reason="rapidocr-onnxruntime or rapidfuzz is not installed (requirements-ocr.txt)",
)


def drawn(*lines, color="navy", ground="white"):
    image = Image.new("RGB", (256, 256), ground)
    for number, line in enumerate(lines):
        ImageDraw.Draw(image).text((16, 80 + 56 * number), line, fill=color, font=ImageFont.load_default(36))
    return np.asarray(image)


@pytest.fixture(scope="module")
def reward():
    return make_reward("ocr")


@needs_reader
def test_good_text_scores_high_wrong_text_low_and_no_text_nothing(reward):
    record = PromptRecord('a sign that says "Hello World"')
    images = [drawn("Hello World"), drawn("Hello", "World"), drawn("Help World"), drawn("XYZ"), drawn()]
    scores = reward.score(images, [record] * len(images))
    assert scores.values[0] == scores.values[1] == 1 and scores.details["correct"].tolist() == [1, 1, 0, 0, 0]
    assert 0.6 < scores.values[2] < 1 and scores.values[3] < 0.2 and scores.values[4] == 0


@needs_reader
def test_the_text_of_the_metadata_goes_before_that_of_the_prompt(reward):
    image = drawn("OPEN 24", color="yellow", ground="black")
    records = [PromptRecord('a "door"', metadata={"text": "open 24"}), PromptRecord('a "door"')]
    scores = reward.score([image, image], records)
    assert scores.values[0] == 1 and scores.values[1] < 0.8


@needs_reader
def test_colours_reach_the_reader_in_its_order(monkeypatch):
    """It reads red on blue either way, so what it is given is looked at instead."""
    given = []
    monkeypatch.setattr(OCRReward, "_engine", lambda self: lambda image: given.append(image) or (None, None))
    image = drawn("Hi", color=(10, 20, 30))
    assert make_reward("ocr").read(image) == ""
    assert (given[0][..., 0] == image[..., 2]).all() and given[0].flags.c_contiguous


@needs_reader
def test_calls_at_a_time_have_an_engine_each_and_give_it_back(monkeypatch):
    made, together = [], threading.Barrier(3)

    def read(image):
        together.wait(20)
        return [(None, "hello", 0.9)], None

    def engine(self):
        made.append(read)
        return read

    monkeypatch.setattr(OCRReward, "_engine", engine)
    entries = make_entries({"ocr": {"batch_size": 1, "concurrency": 3}})
    images, records = [drawn("")] * 9, [PromptRecord('"Hello"')] * 9
    assert (Scorer(entries).score(images, records).values["ocr"] == 1).all()
    assert len(made) == 3


@pytest.mark.skipif(importlib.util.find_spec("rapidfuzz") is None, reason="rapidfuzz is not installed")
@pytest.mark.parametrize(
    ("read", "wanted", "score"),
    [
        ("hello", "hello", 1.0),
        ("HEL LO", "hel\nlo", 1.0),  # neither case nor white space counts
        ("say hello to all", "Hello", 1.0),  # among other text
        ("hallo", "hello", 0.8),
        ("", "hello", 0.0),
        ("nothing like it", "hello", 0.0),  # not below 0, however much there is
        ("helo", "hello", 0.8),
    ],
)
def test_similarity_by_hand(read, wanted, score):
    assert similarity(read, wanted) == pytest.approx(score)


def test_what_is_to_be_written():
    assert target_text('a "blue door" and a "cat"', {}) == "blue door"
    assert target_text("a sign “Café”", {}) == "Café"
    assert target_text("a sign", {"text": "Exit"}) == "Exit"
    for prompt, metadata in (("a sign", {}), ('a " " sign', {}), ("a sign", {"text": ""}), ('a "b"', {"text": 3})):
        with pytest.raises(ValueError, match="names no text to write"):
            target_text(prompt, metadata)


@needs_reader
def test_prompts_without_text_are_found_before_a_run(reward):
    reward.check([PromptRecord('a "door"'), PromptRecord("a door", metadata={"text": "open"})])
    with pytest.raises(ValueError, match="'a door' names no text to write"):
        reward.check([PromptRecord('a "door"'), PromptRecord("a door")])


@needs_reader
def test_options_out_of_range():
    with pytest.raises(ValueError, match="min_confidence=2"):
        make_reward("ocr", min_confidence=2)
    with pytest.raises(ValueError, match="threads=0"):
        make_reward("ocr", threads=0)


def test_without_the_reader_one_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs the package 'rapidocr_onnxruntime', .* requirements-ocr.txt"):
        make_reward("ocr")
