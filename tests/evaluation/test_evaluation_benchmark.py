"""The seam for benchmarks: nothing is made or marked twice, nothing that failed is a number, and a stranger's suite is a command."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import toy_benchmarks
import toy_grpo
from PIL import Image
from toy_benchmarks import Calculator, Sums, Toy
from toy_grpo import Brightness

from unipic2_jax.core.files import append_rows, read_rows
from unipic2_jax.evaluation import benchmark as library
from unipic2_jax.rewards.base import RewardError

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def no_trouble():
    yield
    Brightness.trouble = None


@pytest.fixture(scope="module")
def subject():
    return toy_benchmarks.subject(bundle=toy_grpo.load())


@pytest.fixture(scope="module")
def whole(subject, tmp_path_factory):
    """What a run without interruption leaves."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, library.run(Toy(), subject, folder)


def pictures(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted((folder / "works").rglob("*.png"))}


def count_marked(counts):
    def trouble(values):
        counts.append(len(values))
        return values

    return trouble


class Killed(BaseException):
    pass


def test_an_interruption_makes_nothing_twice(subject, whole, tmp_path, monkeypatch):
    saved = []

    def save(self, works, item, made, save=Toy.save, most=3):
        if len(saved) == most:
            raise Killed
        saved.append(item.key)
        save(self, works, item, made)

    with monkeypatch.context() as patched:
        patched.setattr(Toy, "save", save)
        with pytest.raises(Killed):
            library.run(Toy(), subject, tmp_path)
        first = pictures(tmp_path)
        assert len(first) == 3 * 2
        patched.setattr(Toy, "save", lambda *given: save(*given, most=99))
        report = library.run(Toy(), subject, tmp_path)
    assert saved == [f"{number:05}" for number in range(6)]  # each once
    assert pictures(tmp_path) == pictures(whole[0])
    assert report.scores == whole[1].scores
    assert (tmp_path / "scores.json").read_bytes() == (whole[0] / "scores.json").read_bytes()


def test_marks_survive_a_kill_and_failures_are_asked_again(whole, tmp_path):
    folder, report = whole
    file = tmp_path / "marks.jsonl"
    file.write_bytes((folder / "marks.jsonl").read_bytes()[:-30])  # cut in the middle of the last line
    counts = []
    Brightness.trouble = count_marked(counts)
    score = lambda: library.run(Toy(), None, tmp_path, works=folder / "works", generate=False)
    assert score().scores == report.scores and counts == [2]
    assert score().scores == report.scores and counts == [2]  # all are known
    assert len(read_rows(file)) == 6

    file.unlink()

    def fails(values):
        raise RewardError("The judge is asleep.")

    Brightness.trouble = fails
    found = score()
    assert len(found.failed) == 6 and found.failed[0] == "00000: brightness: The judge is asleep."
    assert "toy/brightness" not in found.scores["toy"] and found.scores["toy"]["toy/brightness_failed"] == 12
    assert "6 items have no mark." in Toy().missed(found)
    Brightness.trouble = None
    assert score().scores == report.scores and not score().failed


def test_a_picture_that_is_missing_or_damaged_is_no_number(whole, tmp_path):
    folder, _ = whole
    works = tmp_path / "works"
    for path, content in pictures(folder).items():  # as somebody else's program may have written it: no metadata
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(content)
    (works / "00001/samples/00001.png").unlink()
    (works / "00002/samples/00000.png").write_bytes(b"no picture")
    found = library.run(Toy(), None, tmp_path / "out", works=works, generate=False)
    assert [sentence.split(":")[0] for sentence in found.failed] == ["00001", "00002"]
    assert "nothing was made" in found.failed[0] and "00000.png" in found.failed[1]
    marks = {mark.key: mark for mark in Toy().score(works, tmp_path / "out/marks.jsonl")}
    assert marks["00002"].values["brightness"] == [None, None]
    kept = [
        value for key, mark in marks.items() if key not in ("00001", "00002") for value in mark.values["brightness"]
    ]
    assert found.scores["toy"]["toy/brightness"] == pytest.approx(np.mean(kept))
    # Another picture is another mark; and a folder of something else is refused.
    Image.new("RGB", (4, 4), "white").save(works / "00002/samples/00000.png")
    found = library.run(Toy(), None, tmp_path / "out", works=works, generate=False)
    assert len(found.failed) == 1
    (works / "00003/metadata.jsonl").write_text('{"prompt": "something else"}')
    (tmp_path / "out/marks.jsonl").unlink()
    found = library.run(Toy(), None, tmp_path / "out", works=works, generate=False)
    assert "is about another prompt" in found.failed[1]
    with pytest.raises(ValueError, match="holds none of the 6 works"):
        library.run(Toy(), None, tmp_path / "out", works=tmp_path, generate=False)


def test_works_of_another_model_are_never_mixed(subject, whole, tmp_path):
    library.run(Toy(limit=2), subject, tmp_path, score=False)
    assert set(pictures(tmp_path)) < set(pictures(whole[0])) and not (tmp_path / "scores.json").exists()
    library.run(Toy(), subject, tmp_path, score=False)  # a quick look is the beginning of the whole
    assert pictures(tmp_path) == pictures(whole[0]) and not (tmp_path / "works.1").exists()
    library.run(Toy(steps=3), subject, tmp_path, score=False)
    assert pictures(tmp_path) != pictures(whole[0]) and len(list((tmp_path / "works.1").rglob("*.png"))) == 12
    library.run(Toy(steps=3), toy_benchmarks.subject("b", bundle=subject.bundle), tmp_path, score=False)
    assert (tmp_path / "works.2").is_dir()


def test_questions_are_asked_once(tmp_path):
    chat = Calculator()
    subject, ask = toy_benchmarks.subject(bundle=object(), chat=chat), lambda: library.run(Sums(), subject, tmp_path)
    assert ask().scores == {"overall": 149 / 150, "even": 1.0, "odd": 74 / 75}
    assert len(set(chat.asked)) == 150
    answers = tmp_path / "works/answers.jsonl"
    answers.write_bytes(answers.read_bytes()[: answers.read_bytes().rfind(b"\n", 0, -200) + 9])  # the last few are lost
    lost = 150 - len(read_rows(answers))
    chat.asked.clear()
    assert ask().scores["overall"] == 149 / 150 and 0 < len(chat.asked) == lost < 10
    assert len(read_rows(answers)) == 150
    assert {row["key"] for row in read_rows(answers)} == {f"{n:05}" for n in range(150)}
    rows = read_rows(answers)
    rows[3]["asked"] = "another picture"  # as with other options in the same folder
    answers.write_text("".join(json.dumps(row) + "\n" for row in rows))
    chat.asked.clear()
    assert ask().scores["overall"] == 149 / 150 and len(chat.asked) == 1
    assert Sums().missed(ask(), {"overall": 1.0}) == ["overall is 0.993, below the baseline's 1.000."]


def test_an_even_sample():
    tags = ["a"] * 10 + ["b"] * 2 + ["c"] * 5
    assert library.even_sample(tags, 6) == [0, 9, 10, 11, 12, 16]
    assert [tags[i] for i in library.even_sample(tags, 9)] == ["a"] * 4 + ["b"] * 2 + ["c"] * 3
    assert library.even_sample(tags, 99) == list(range(17))


def test_half_a_line_is_cut_off_before_another_is_added(tmp_path):
    file = tmp_path / "rows.jsonl"
    append_rows(file, [{"a": 1}, {"b": "\u2028"}])
    with open(file, "ab") as end:
        end.write(b'{"c": ')
    assert read_rows(file) == [{"a": 1}, {"b": "\u2028"}]
    append_rows(file, [{"d": 4}])
    assert read_rows(file) == [{"a": 1}, {"b": "\u2028"}, {"d": 4}] and file.read_bytes().count(b"\n") == 3


def test_unknown_names_get_the_nearest_one():
    with pytest.raises(ValueError, match=r"benchmark 'shapes-vqua' does not exist; did you mean 'shapes-vqa'\?"):
        library.make_benchmark("shapes-vqua")
    with pytest.raises(ValueError, match=r"'shapes' has no option 'promts'; did you mean 'prompts'\?"):
        library.make_benchmark("shapes", {"promts": 3})
    with pytest.raises(ValueError, match="samples is 0; use 1 or more"):
        library.make_benchmark("shapes", {"samples": 0})


def test_the_example_of_the_walk_through(tmp_path, monkeypatch):
    page = (ROOT / "docs/extending/benchmark.md").read_text()
    (code,) = (part.split("```")[0] for part in page.split("```python") if "class CountingBenchmark" in part)
    (tmp_path / "counting_of_the_page.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module("counting_of_the_page")
    benchmark = library.make_benchmark("shapes-counting", {"questions": 5, "most": 2})
    del library.BENCHMARKS["shapes-counting"]
    question = benchmark.items()[0].task
    assert question.question.startswith("how many") and benchmark.correct(question, question.answer) == 1
    near = {"zero": "one", "one": "two", "two": "one"}[question.answer]
    assert benchmark.correct(question, near) == 0.5 and benchmark.correct(question, "many") == 0


def evaluate(*arguments):
    """`launch.evaluate` where a stranger's module has been imported, as an entry point would import it."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests/support'}", "JAX_PLATFORMS": "cpu"}
    code = "import sys, runpy, toy_benchmarks; runpy.run_module('launch.evaluate', run_name='__main__', alter_sys=True)"
    line = [sys.executable, "-c", code, *(f"--{a}" for a in arguments)]
    return subprocess.run(line, capture_output=True, text=True, env=environment, cwd=ROOT)


def test_a_stranger_s_suite_is_a_command(tmp_path):
    made = evaluate("suite=geneval-like", "prompts=6", f"out={tmp_path / 'a'}", "generate_only")
    works = tmp_path / "a/works"
    assert made.returncode == 0 and made.stdout == "", made.stderr
    # GenEval's own scorer: folders of digits, one JSON object, files of digits.
    assert sorted(folder.name for folder in works.iterdir()) == [f"{number:05}" for number in range(6)]
    metadata = [json.loads((folder / "metadata.jsonl").read_text()) for folder in sorted(works.iterdir())]
    assert {"tag", "include", "prompt"} <= metadata[0].keys() and len({row["tag"] for row in metadata}) == 6
    assert all(len(list((folder / "samples").glob("*.png"))) == 2 for folder in works.iterdir())

    scored = evaluate("suite=geneval-like", f"out={tmp_path / 'b'}", "score_only", f"works={works}", "gates")
    assert scored.returncode == 0 and "all gates passed" in scored.stdout, scored.stderr
    scores = json.loads((tmp_path / "b/scores.json").read_text())
    lines = read_rows(tmp_path / "b/results.jsonl")
    assert len(lines) == 12 and (works / lines[0]["filename"]).is_file()
    assert scores["geneval"]["geneval/geneval_correct"] == np.mean([line["correct"] for line in lines])
    assert (tmp_path / "b/geneval.png").exists()


def test_the_command_says_what_is_wrong(tmp_path):
    for arguments, sentence in {
        ("suite=shapes-vqq",): "error: The benchmark 'shapes-vqq' does not exist; did you mean 'shapes-vqa'?",
        ("suite=shapes", "generate_only"): "error: --generate_only needs --out",
        ("suite=shapes", f"works={tmp_path}"): "give --score_only with it.",
    }.items():
        done = evaluate(*arguments)
        assert done.returncode == 2 and sentence in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_benchmarks_of_pictures_take_a_solver_and_an_interval_of_guidance():
    from unipic2_jax.core.errors import ConfigError
    from unipic2_jax.shapes.benchmark import ShapesBenchmark

    plain = ShapesBenchmark(prompts=2, guidance=3.5)
    # Works that were made before there was a choice go on.
    assert all(not {"solver", "guidance_interval"} & set(fields) for fields in plain.settings().values())
    chosen = ShapesBenchmark(prompts=2, guidance=3.5, solver="unipc", guidance_interval="0.2,0.9")
    chosen.check(None)
    for fields in chosen.settings().values():
        assert fields["solver"] == "unipc" and tuple(fields["guidance_interval"]) == (0.2, 0.9)
    for options, message in (
        ({"solver": "heun"}, "solver is 'heun'; choose one of euler, dpm2, unipc"),
        ({"guidance_interval": "0.9,0.2"}, "give two noise levels"),
        ({"guidance_interval": "a,1"}, "guidance_interval holds 'a'"),
        ({"guidance_interval": "0.1,0.9", "guidance": 1.0}, "changes nothing at guidance_scale 1"),
    ):
        with pytest.raises((ConfigError, ValueError), match=message):
            ShapesBenchmark(**{"guidance": 3.5, **options}).check(None)
