"""Prompt files."""

import json

import numpy as np
import pytest
from PIL import Image

from unipic2_jax.data import prompts
from unipic2_jax.data.prompts import UNREAD, FinitePromptSource, JSONLSource, PromptRecord, look_through, make_source
from unipic2_jax.data.records import make_records
from unipic2_jax.data.text import read_lines
from unipic2_jax.pipelines.jobs import Job, read_jobs


def write(path, rows, end="\n"):
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + end)
    return str(path)


def test_geneval_lines_become_records_and_the_last_one_needs_no_newline(tmp_path):
    rows = [{"tag": "counting", "include": [{"class": "cat", "count": i}], "prompt": f"{i} cats"} for i in range(5)]
    source = JSONLSource(write(tmp_path / "a.jsonl", rows, end=""), shuffle=False)
    records = source.batch(0, 7)
    assert [r.prompt for r in records] == [f"{i} cats" for i in (0, 1, 2, 3, 4, 0, 1)]
    assert records[2].metadata == {"index": 2, **rows[2]} and records[2].image is None


def test_newlines_at_the_end_and_separators_inside_of_a_text_are_no_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "a\u2028b"}\n{"prompt": "c"}\n\n', encoding="utf-8")
    assert [row["prompt"] for row in JSONLSource(str(path)).rows] == ["a\u2028b", "c"]


def test_every_pass_visits_every_line_once_in_a_new_order_that_only_seed_and_step_decide(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"prompt": str(i)} for i in range(6)])
    draw = lambda seed, step: [r.prompt for r in make_source({"kind": "jsonl", "path": path}, seed).batch(step, 4)]
    prompts = [prompt for step in range(3) for prompt in draw(3, step)]
    assert sorted(prompts[:6]) == sorted(prompts[6:]) == [str(i) for i in range(6)]
    assert prompts[:6] != prompts[6:] and draw(3, 2) == prompts[8:] and draw(4, 0) != draw(3, 0)


def test_edits_bring_their_image_and_group_by_it(tmp_path):
    for name, value in (("a.png", 10), ("b.png", 20)):
        Image.fromarray(np.full((4, 4), value, np.uint8)).save(tmp_path / name)
    path = write(tmp_path / "m.jsonl", [{"instruction": "add a cat", "image": name} for name in ("a.png", "b.png")])
    first, second = JSONLSource(path, shuffle=False).batch(0, 2)
    assert first.image.shape == (4, 4, 3) and first.prompt == second.prompt and first.key != second.key
    assert PromptRecord("x").key == PromptRecord("x").key == "x"


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"prompt": "x"}, "{"], "no valid JSON in line 2 of .*a.jsonl"),
        ([{"tag": "x"}], "no prompt in line 1 of .*; add a text called"),
        ([{"prompt": "x"}, "", {"prompt": "y"}], "Line 2 .* is empty"),
        ([{"prompt": "x"}, {"prompt": "y"}, "  \t", {"prompt": "z"}], "Line 3 .* is empty"),
        ([{"prompt": "x", "image": "none.png"}], "none.png of line 1 of .* does not exist; correct the path"),
        ([{"prompt": "x", "image": "bad.png"}], "bad.png of line 1 of .* cannot be decoded"),
        ([{"prompt": "x"}, {"prompt": "x", "image": "bad.png"}], "some have none"),
        ([], "holds no prompts"),
        ([{"prompt": "x"}, {"prompt": "y", "image": 5}], "picture in line 2 of .* is no path but int; write a path"),
        ([{"prompt": "x", "image": ["bad.png", 3]}], "picture in line 1 of .* is no path but int"),
        (
            [{"prompt": "x", "input_images": ["bad.png", "bad.png"]}],
            "Line 1 .* has 2 pictures to edit and one is taken",
        ),
        ([{"prompt": "x", "output_image": "bad.png"}], "'output_image' but no input_images in line 1"),
        ([{"prompt": "x"}, {"prompt": "x", "before": "bad.png"}], "picture under 'before' in line 2 of .*a.jsonl, and"),
        (
            [{"prompt": "x", "source_image": "bad.png", "control_image": "bad.png"}],
            "Both 'source_image' and 'control_im",
        ),
        (
            [{"prompt": "half of \ud83d"}],
            r"half a character in line 1 of .* \(the lone surrogate U\+D83D at character 9\)",
        ),
        ([{"prompt": "x"}, '{"prompt": "y", "n": ' + "9" * 5000 + "}"], "no valid JSON in line 2 of .*a.jsonl"),
    ],
)
def test_bad_files_get_one_sentence(tmp_path, rows, words):
    (tmp_path / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n and nothing")
    with pytest.raises((ValueError, FileNotFoundError), match=words) as error:
        look_through(JSONLSource(write(tmp_path / "a.jsonl", rows)))
    assert "\n" not in str(error.value)


def test_a_byte_order_mark_and_windows_lines_and_paths_are_understood(tmp_path):
    (tmp_path / "images").mkdir()
    Image.fromarray(np.full((4, 4), 50, np.uint8)).save(tmp_path / "images" / "a.png")
    rows = [{"prompt": "one", "image": "images\\a.png"}, {"prompt": "two\u2028three", "image": "images/a.png"}]
    lines = "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / "m.jsonl").write_bytes(f"\ufeff{lines}\r\n".encode())
    records = JSONLSource(str(tmp_path / "m.jsonl"), shuffle=False).batch(0, 2)
    assert [record.prompt for record in records] == ["one", "two\u2028three"]
    assert all(record.image.max() == 50 for record in records)
    assert read_lines(tmp_path / "m.jsonl") == list(enumerate(lines.split("\r\n"), 1))
    # A file whose name has a backslash in it is there under that name.
    Image.fromarray(np.full((4, 4), 60, np.uint8)).save(tmp_path / "images\\a.png")
    assert JSONLSource(str(tmp_path / "m.jsonl"), shuffle=False).batch(0, 1)[0].image.max() == 60


SOURCE, RESULT = "before.png", "after.png"


@pytest.mark.parametrize(
    ("row", "image", "prompt"),
    [
        ({"input_images": [SOURCE], "instruction": "do", "output_image": RESULT}, SOURCE, "do"),
        ({"image": RESULT, "control_image": SOURCE, "prompt": "do"}, SOURCE, "do"),  # ai-toolkit, Kontext trainers
        ({"image_path": RESULT, "control_path": SOURCE, "caption": "do"}, SOURCE, "do"),  # musubi-tuner
        ({"image_path": RESULT, "control_path_0": SOURCE, "caption": "do"}, SOURCE, "do"),
        ({"image": RESULT, "edit_image": SOURCE, "prompt": "do"}, SOURCE, "do"),  # DiffSynth
        ({"image": RESULT, "kontext_images": SOURCE, "prompt": "do"}, SOURCE, "do"),
        ({"image": RESULT, "conditioning_image": SOURCE, "text": "do"}, SOURCE, "do"),  # diffusers
        ({"original_image": SOURCE, "edit_prompt": "do", "edited_image": RESULT, "edited_prompt": "no"}, SOURCE, "do"),
        ({"source_image": SOURCE, "target_image": RESULT, "caption": "no", "instruction": "do"}, SOURCE, "do"),
        ({"src_img": SOURCE, "edited_img": RESULT, "edited_prompt_list": ["no", "do"]}, SOURCE, "do"),  # OmniEdit
        ({"source_img": SOURCE, "target_img": RESULT, "mask_img": RESULT, "instruction": "do"}, SOURCE, "do"),
        ({"image": SOURCE, "edited_image": RESULT, "prompt": "do"}, SOURCE, "do"),
        ({"input": SOURCE, "output": RESULT, "edit": "do"}, SOURCE, "do"),
        ({"image": SOURCE, "prompt": "do"}, SOURCE, "do"),  # a task alone
        ({"image": RESULT, "caption": "a cat"}, None, "a cat"),  # a picture with its caption
        ({"prompt": "a cat", "input": "text", "url": "http://x/a.png", "output": ["x"]}, None, "a cat"),
    ],
)
def test_one_table_says_what_is_what_for_data_prompts_and_lists_of_edits(row, image, prompt, tmp_path):
    for name, value in ((SOURCE, 10), (RESULT, 20)):
        Image.fromarray(np.full((4, 4), value, np.uint8)).save(tmp_path / name)
    path = write(tmp_path / "m.jsonl", [row])
    (record,) = JSONLSource(path).batch(0, 1)
    assert record.prompt == prompt and (record.image is None) == (image is None)
    assert image is None or (record.image == 10).all()
    assert read_jobs(path) == [Job(prompt, (str(tmp_path / image),) if image else ())]
    if RESULT not in row.values():
        return
    example = make_records({"kind": "jsonl", "path": path})[0]
    assert (example.image, example.prompt) == (tmp_path / RESULT, prompt)
    assert example.references == ((tmp_path / SOURCE,) if image else ())


def test_pictures_are_looked_through_once_before_a_run(tmp_path, monkeypatch):
    for name in "abc":
        Image.fromarray(np.full((4, 4), 10, np.uint8)).save(tmp_path / f"{name}.png")
    sound = (tmp_path / "b.png").read_bytes()
    for name in "bc":
        (tmp_path / f"{name}.png").write_bytes(sound[:40])
    path = write(tmp_path / "m.jsonl", [{"prompt": "x", "image": f"{name}.png"} for name in "abbc"])
    source = make_source(
        {"kind": "turns", "sources": {"a": {"kind": "jsonl", "path": path}, "s": {"kind": "shapes"}}}, 0
    )
    memory = tmp_path / "looked_through.txt"
    for _ in range(2):
        with pytest.raises(
            ValueError, match=r"b\.png of line 2 of .*m\.jsonl cannot be .*\(1 others are broken too\)\.$"
        ):
            look_through(source, memory)
    for name in "bc":
        (tmp_path / f"{name}.png").write_bytes(sound)
    decoded = []
    monkeypatch.setattr(prompts, "decode", lambda path, name: decoded.append(path.name))
    look_through(source, memory)
    assert sorted(decoded) == ["a.png", "b.png", "c.png"]
    look_through(source, memory)  # remembered
    assert len(decoded) == 3


def test_a_picture_that_breaks_later_is_a_record_that_says_so(tmp_path):
    for name in "ab":
        Image.fromarray(np.full((4, 4), 10, np.uint8)).save(tmp_path / f"{name}.png")
    path = write(tmp_path / "m.jsonl", [{"prompt": name, "image": f"{name}.png"} for name in "ab"])
    source = JSONLSource(path, shuffle=False)
    (tmp_path / "b.png").unlink()
    sound, broken = source.batch(3, 2)
    assert not sound.error and sound.image.max() == 10
    assert broken.prompt == "b" and broken.error.endswith(
        "b.png of line 2 of " + path + " does not exist; correct the path."
    )
    assert (broken.image == UNREAD).all()
    again = JSONLSource(path, shuffle=False).batch(3, 2)[1]
    assert (again.key, again.error) == (broken.key, broken.error)


def test_bytes_that_are_no_text_are_found_in_their_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes('{"prompt": "Café"}\r\n{"prompt": "b"}\n'.encode() + '{"prompt": "Café"}\n'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"^Line 3 of .*a.jsonl is not text in UTF-8; save"):
        JSONLSource(str(path))
    path.write_bytes(path.read_bytes()[:36])
    assert [row["prompt"] for row in JSONLSource(str(path)).rows] == ["Café", "b"]


def test_the_tasks_of_finite_sources_can_be_looked_through_without_their_pictures(tmp_path):
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / "a.png")
    edits = write(
        tmp_path / "edits.jsonl", [{"prompt": "add a cat", "image": "a.png"}, {"prompt": "b", "image": "a.png"}]
    )
    (tmp_path / "a.png").write_bytes(b"nothing that could be decoded")
    texts = write(tmp_path / "texts.jsonl", [{"prompt": "c", "n": 1}])
    sources = {"e": {"kind": "jsonl", "path": edits}, "s": {"kind": "shapes"}, "t": {"kind": "jsonl", "path": texts}}
    found = list(make_source({"kind": "turns", "sources": sources}, 0).tasks())
    assert [place for place, _ in found] == [f"Line 1 of {edits}", f"Line 2 of {edits}", f"Line 1 of {texts}"]
    records = [record for _, record in found]
    assert [record.prompt for record in records] == ["add a cat", "b", "c"]
    assert [record.image is None for record in records] == [False, False, True]
    assert records[2].metadata == {"index": 0, "prompt": "c", "n": 1, "dataset": "t"}
    assert not isinstance(make_source({"kind": "shapes"}, 0), FinitePromptSource)


def test_unknown_sources_and_options_get_one_sentence(tmp_path):
    with pytest.raises(ValueError, match="'jsonk' does not exist"):
        make_source({"kind": "jsonk"}, 0)
    with pytest.raises(ValueError, match="does not take these options"):
        make_source({"kind": "jsonl", "file": "x"}, 0)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        make_source({"kind": "jsonl", "path": str(tmp_path / "x")}, 0)


def test_sources_take_turns():
    source = make_source(
        {"kind": "turns", "sources": {task: {"kind": "shapes", "task": task} for task in ("edit", "t2i")}}, 3
    )
    alone = {task: make_source({"kind": "shapes", "task": task}, 3) for task in ("edit", "t2i")}
    for step, task in enumerate(("edit", "t2i", "edit", "t2i")):
        found, wanted = source.batch(step, 3), alone[task].batch(step // 2, 3)
        assert [record.key for record in found] == [record.key for record in wanted]
        assert all(record.metadata["dataset"] == task for record in found)
        assert all({**old.metadata, "dataset": task} == new.metadata for old, new in zip(wanted, found))
    with pytest.raises(ValueError, match="turns has no sources"):
        make_source({"kind": "turns", "sources": {}}, 0)
