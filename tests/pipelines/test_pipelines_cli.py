"""The commands, as a person types them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pipelines_common import small_bundle

from unipic2_jax.core.assets import TINY
from unipic2_jax.pictures.sheet import contact_sheet
from unipic2_jax.pipelines import jobs, save_bundle

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_bundle(small_bundle(), tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    file = tmp_path_factory.mktemp("source") / "in.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (3, 3, 3), np.uint8)).resize((48, 32)).save(file)
    return file


def command(name, *arguments, text_in=None):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "JAX_PLATFORMS": "cpu"}
    line = [sys.executable, "-m", f"launch.{name}", *(f"--{a}" for a in arguments)]
    return subprocess.run(line, capture_output=True, text=True, env=environment, cwd=ROOT, input=text_in)


def test_generate_into_a_folder(model, tmp_path):
    (tmp_path / "prompts.txt").write_text("two green crosses\n\na blue square")  # the last line has no end
    out = tmp_path / "pictures"
    done = command(
        "generate", f"model={model}", "prompt=a red circle", f"prompts_file={tmp_path / 'prompts.txt'}", f"out={out}",
        "steps=2", "num_images=2", "seed=5", "height=16", "batch_size=4",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "step/s" in done.stderr  # the progress bar
    lines = [json.loads(line) for line in (out / "images.jsonl").read_text().splitlines()]
    assert [(line["file"], line["prompt"], line["seed"]) for line in lines] == [
        ("0000_0.png", "a red circle", 5),
        ("0000_1.png", "a red circle", 6),
        ("0001_0.png", "two green crosses", 7),
        ("0001_1.png", "two green crosses", 8),
        ("0002_0.png", "a blue square", 9),
        ("0002_1.png", "a blue square", 10),
    ]
    made = {Image.open(out / line["file"]).tobytes() for line in lines}
    assert len(made) == 6 and Image.open(out / "0000_0.png").size == (24, 16)
    assert Image.open(out / "sheet.png").width > 2 * 24
    assert str(out / "sheet.png") in done.stdout
    # The same seed alone gives the same picture.
    one = tmp_path / "one.png"
    done = command(
        "generate", f"model={model}", "prompt=two green crosses", f"out={one}", "steps=2", "seed=7", "height=16"
    )
    assert done.returncode == 0, done.stderr
    difference = np.asarray(Image.open(one), int) - np.asarray(Image.open(out / "0001_0.png"), int)
    assert np.abs(difference).max() <= 1


def test_edit_from_a_file_of_edits(model, source, tmp_path):
    lines = [
        {"input_images": [source.name], "instruction": "make the circle green"},
        {"image": source.name, "prompt": "remove the square"},
    ]
    file = source.parent / "edits.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    out = tmp_path / "edits.png"
    done = command("edit", f"model={model}", f"prompts_file={file}", f"out={out}", "steps=2", "guidance=1")
    assert done.returncode == 0, done.stderr
    # A row per edit: the source and what became of it. The source is twice as large as the edits.
    assert Image.open(out).size[0] > 2 * 48


def bad(name, arguments, sentence):
    return pytest.param(name, arguments, sentence, id=sentence[:30])


@pytest.mark.parametrize(
    ("name", "arguments", "sentence"),
    [
        bad("generate", ["prompt=x", "model=/no/such/model"], "There is no model folder /no/such/model"),
        bad("generate", ["prompts_file=missing.txt"], "There is no prompts file missing.txt"),
        bad("edit", ["prompt=x", "image={broken}"], "cannot be decoded"),
        bad("edit", ["prompt=x"], "There is no picture to edit"),
        bad("edit", ["prompt=x", "image={source}", "model={model}", "height=17"], "height 17 is not a multiple"),
    ],
)
def test_mistakes_are_one_sentence(name, arguments, sentence, model, source, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(source.read_bytes()[:60])
    arguments = [a.format(broken=broken, source=source, model=model) for a in arguments]
    done = command(name, *arguments, f"out={tmp_path / 'out.png'}")
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("error: ") and sentence in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out.png").exists()


def test_prompt_files(tmp_path):
    file = tmp_path / "edits.jsonl"
    (tmp_path / "x.png").touch()
    file.write_text('{"prompt": "a", "image": "x.png"}\n{"instruction": "b"}')
    assert jobs.read_jobs(file) == [jobs.Job("a", (str(tmp_path / "x.png"),)), jobs.Job("b")]
    for content, sentence in (
        ('{"prompt": "a"}\n{"prompt": ', "no valid JSON in line 2 of .*edits.jsonl"),
        ('{"words": "a"}', "no prompt in line 1 of .*; add a text called 'prompt'"),
        ('{"prompt": "a", "image": 3}', "picture in line 1 of .* is no path but int"),
        ('{"prompt": "a", "image": "y.png"}', "y.png of line 1 of .* does not exist"),
        ('{"prompt": "\\ud83d"}', "half a character in line 1 of .*"),
        ("\n\n", "holds no prompt"),
    ):
        file.write_text(content)
        with pytest.raises(ValueError, match=sentence):
            jobs.read_jobs(file)
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"Line 1 of .*edits.jsonl is not text in UTF-8"):
        jobs.read_jobs(file)
    (tmp_path / "a.txt").write_bytes("\ufeffone\r\n\r\n two\u2028three \r\n".encode())
    assert jobs.read_jobs(tmp_path / "a.txt") == [jobs.Job("one"), jobs.Job("two\u2028three")]
    file.write_text('{"image": "x.png", "text": "make it red"}')
    assert jobs.read_jobs(file, task="edit") == [jobs.Job("make it red", (str(tmp_path / "x.png"),))]


def test_targets(tmp_path):
    assert jobs.check_target(tmp_path / "a" / "x.PNG").parent.is_dir()
    assert jobs.check_target(tmp_path / "b").is_dir()
    assert jobs.check_target(tmp_path / "v1.5").is_dir()
    for name in ("x.gif", "x.TIFF"):
        with pytest.raises(ValueError, match=r"ends as a picture that is not written here; use one of \.png"):
            jobs.check_target(tmp_path / name)
        assert not (tmp_path / name).exists()
    (tmp_path / "c").touch()
    (tmp_path / "d.png").mkdir()
    with pytest.raises(FileExistsError, match="is a file; give a folder"):
        jobs.check_target(tmp_path / "c")
    with pytest.raises(IsADirectoryError, match="is a folder although"):
        jobs.check_target(tmp_path / "d.png")


def test_contact_sheet():
    red, blue = np.zeros((2, 8, 8, 3), np.uint8)
    red[..., 0], blue[..., 2] = 255, 255
    sheet = contact_sheet([red, blue, red], ["a red one", "b " * 200, ""], columns=2, scale=10)
    assert sheet.size[0] == 2 * 80 + 3 * 8
    pixels = np.asarray(sheet)
    np.testing.assert_array_equal(pixels[8:88, 8:88], np.broadcast_to([255, 0, 0], (80, 80, 3)))
    np.testing.assert_array_equal(pixels[8:88, 96:176], np.broadcast_to([0, 0, 255], (80, 80, 3)))
    below = pixels[88:]
    assert (below[:, 8:88].min(axis=-1) < 100).any()  # a caption
    assert contact_sheet([red]).size == (8 * 24 + 16, 8 * 24 + 16)  # enlarged until legible
    with pytest.raises(ValueError, match="at least one image"):
        contact_sheet([])
    with pytest.raises(ValueError, match="2 images got 1 captions"):
        contact_sheet([red, blue], ["a"])


def test_the_shipped_model_has_a_fixed_place():
    assert TINY.endswith("unipic2_jax/assets/tiny")
