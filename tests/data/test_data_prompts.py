"""Prompt files."""

import json

import numpy as np
import pytest
from PIL import Image

from unipic2_jax.data.prompts import FinitePromptSource, JSONLSource, PromptRecord, make_source


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
        ([{"prompt": "x"}, "{"], "Line 2 .* is not JSON"),
        ([{"tag": "x"}], "Line 1 .* has no prompt"),
        ([{"prompt": "x"}, "", {"prompt": "y"}], "Line 2 .* is empty"),
        ([{"prompt": "x"}, {"prompt": "y"}, "  \t", {"prompt": "z"}], "Line 3 .* is empty"),
        ([{"prompt": "x", "image": "none.png"}], "none.png, which does not exist"),
        ([{"prompt": "x", "image": "bad.png"}], "bad.png cannot be decoded"),
        ([{"prompt": "x"}, {"prompt": "x", "image": "bad.png"}], "some have none"),
        ([], "holds no prompts"),
        ([{"prompt": "x"}, {"prompt": "y", "image": 5}], "Line 2 .* has 5 as its image; write a path"),
        ([{"prompt": "x", "image": ["bad.png"]}], r"Line 1 .* has \['bad.png'\] as its image"),
        ([{"prompt": "x"}, '{"prompt": "y", "n": ' + "9" * 5000 + "}"], "Line 2 .* is not JSON"),
    ],
)
def test_bad_files_get_one_sentence(tmp_path, rows, words):
    (tmp_path / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n and nothing")
    with pytest.raises((ValueError, FileNotFoundError), match=words) as error:
        JSONLSource(write(tmp_path / "a.jsonl", rows)).batch(0, 1)
    assert "\n" not in str(error.value)


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
