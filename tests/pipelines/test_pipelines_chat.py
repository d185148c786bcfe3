"""Conversations with a Qwen2.5-VL folder, from Python and from the command line."""

import json
import re

import jax
import numpy as np
import pytest
from PIL import Image
from qwen_reference import SMALL, processor
from test_pipelines_cli import command

from unipic2_jax.core.assets import TINY
from unipic2_jax.models import registry
from unipic2_jax.models.qwen import names as qwen
from unipic2_jax.models.qwen.generation import SamplingConfig
from unipic2_jax.pipelines.chat import ChatModel, parse_boxes
from unipic2_jax.weights import io, table


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vlm")
    rng = np.random.default_rng(0)
    draw = lambda x: (rng.standard_normal(x.shape) * (2 * x.shape[-2] ** -0.5 if len(x.shape) > 1 else 1)).astype("f")
    params = jax.tree.map(draw, registry.NETWORKS[SMALL.CLASS_NAME].abstract(SMALL))
    io.write_folder(folder, io.TRANSFORMERS_STEM, table.to_torch(qwen.rules(SMALL), params))
    kind = {"architectures": [SMALL.CLASS_NAME], "model_type": SMALL.MODEL_TYPE}
    (folder / "config.json").write_text(json.dumps({**kind, **SMALL.to_dict()}))
    processor(SMALL).save(folder)
    return folder


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    file = tmp_path_factory.mktemp("picture") / "a.png"
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (24, 40, 3), np.uint8)).save(file)
    return file


def user(*parts):
    content = [{"type": "text", "text": p} if isinstance(p, str) else {"type": "image", "image": p} for p in parts]
    return [{"role": "user", "content": content}]


def test_answers_stream_as_they_are_and_do_not_depend_on_the_batch(folder, picture):
    model = ChatModel.load(folder)
    pieces = []
    options = {"max_new_tokens": 12, "sampling": SamplingConfig(repetition_penalty=1.5)}
    question = user(Image.open(picture), "what is it?")
    (answer,) = model([question], on_text=pieces.append, **options)
    assert "".join(pieces).strip() == answer and len(pieces) > 1
    both = model([question, user("a much longer question without any picture at all")], **options)
    assert both[0] == answer and both[1] != answer


def test_boxes_come_back_in_the_picture_s_own_pixels(folder, picture):
    answer = 'Here: ```json\n[{"bbox_2d": [0, 8, 20, 16], "label": "red circle"}, {"bbox_2d": [4.0, 0, 8, 8]}]\n```'
    assert parse_boxes(answer) == [("red circle", (0, 8, 20, 16)), ("", (4.0, 0, 8, 8))]
    model = ChatModel.load(folder)
    with Image.open(picture) as image:
        twice = image.resize((80, 48))
        own, large = model.boxes(answer, image), model.boxes(answer, twice)
    # The tower sees at most 32 x 32 pixels' worth of either: 40 x 24 as it is, 80 x 48 at half its edges.
    np.testing.assert_allclose(own[0].box, (0, 8, 20, 16))
    np.testing.assert_allclose(large[0].box, (0, 16, 40, 32))
    for bad, message in (
        ("a red circle", "no JSON list of boxes"),
        ('[{"bbox_2d": [1, 2, 3', "no JSON list"),
        ('[{"bbox_2d": [1, 2, 3]}]', "is not a box"),
        ("[1, 2", "no JSON list"),
        ("[1, 2,]", "no whole JSON list"),
    ):
        with pytest.raises(ValueError, match=message):
            parse_boxes(bad)


def test_the_command_answers_once_or_line_by_line(folder, picture):
    options = {"max_new_tokens": 6}
    (answer,) = ChatModel.load(folder)([user(Image.open(picture), "what is it?")], **options)
    once = command("chat", f"model={folder}", f"image={picture}", "prompt=what is it?", "max_new_tokens=6")
    assert once.returncode == 0 and once.stdout.strip() == answer, once.stderr
    assert once.stderr.strip().endswith("Qwen2.5-VL of 3 layers")
    talk = command(
        "chat", f"model={folder}", f"images={picture}", "max_new_tokens=6", text_in="\ufeffwhat is it?\nand then?\n\n"
    )
    assert talk.returncode == 0 and talk.stdout.strip().startswith(answer) and len(talk.stdout) > len(once.stdout)


def test_what_cannot_be_chatted_with_is_said(folder, picture):
    with pytest.raises(FileNotFoundError, match="There is no model folder nowhere"):
        ChatModel.load("nowhere")
    with pytest.raises(ValueError, match="has text encoders only"):
        ChatModel.load(TINY)
    with pytest.raises(ValueError, match=re.escape("holds AutoencoderKL; chat needs a Qwen2.5-VL")):
        ChatModel.load(f"{TINY}/vae")
    model = ChatModel.load(folder)
    with pytest.raises(ValueError, match=r"5000 x 20 pixels is more than 200 times .*; crop it\.$"):
        model([user(Image.new("RGB", (5000, 20)), "what is it?")])
    with pytest.raises(ValueError, match="half a character in message 0"):
        model([user("what is \ud83d?")])
    for arguments, message in (
        ([f"model={folder}", "prompt=x", "json"], "--json answers one --prompt about one --image"),
        ([f"model={folder}", "prompt=x", f"image={picture}", "json", "max_new_tokens=3"], "no JSON list of boxes"),
    ):
        done = command("chat", *arguments)
        assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr, done.stderr
