"""GenEval as a suite: its arithmetic against a re-statement, its layout and result lines, and what is refused."""

import json

import numpy as np
import pytest
import toy_benchmarks
import toy_grpo
from PIL import Image

from unipic2_jax.core.errors import ConfigError
from unipic2_jax.core.files import read_rows
from unipic2_jax.evaluation import benchmark as library
from unipic2_jax.evaluation.benchmark import Mark, make_benchmark
from unipic2_jax.evaluation.geneval import CORRECT, PARTIAL, overall
from unipic2_jax.rewards.geneval.detectors.base import DETECTORS, Detector
from unipic2_jax.rewards.geneval.rules import TAGS, Detection

FIELDS = ["filename", "tag", "prompt", "correct", "reason", "metadata", "details"]


@DETECTORS.register("eager")
class Eager(Detector):
    """Sees one thing of each class that is looked for where the picture is not black."""

    def detect(self, images, wanted):
        boxes = lambda names: [Detection(name, (0.0, 0.0, 9.0, 9.0), confidence=0.95) for name in sorted(names)]
        return [boxes(one.classes) if image.any() else [] for image, one in zip(images, wanted, strict=True)]


def suite(name="geneval", **options):
    return make_benchmark(name, {"detector": "eager", **options})


def fill(works, benchmark, colors):
    """Pictures as another program may have made them, whatever their size."""
    for item, row in zip(benchmark.chosen(), colors, strict=True):
        for path, color in zip(benchmark.paths(item), row, strict=True):
            (works / path).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (12 + color % 5, 10), (color,) * 3).save(works / path)


def score(benchmark, works, out):
    return library.run(benchmark, None, out, works=works, generate=False)


def official(lines):
    """The score of result lines, re-stated: pictures by tag, then the tags."""
    groups = {}
    for line in lines:
        groups.setdefault(line["tag"], []).append(line["correct"])
    return sum(sum(group) / len(group) for group in groups.values()) / len(groups)


def test_the_mean_over_tags_of_thousands_of_random_verdicts(tmp_path):
    rng = np.random.default_rng(0)
    for trial in range(4):
        benchmark = suite()
        items = benchmark.chosen()
        assert len(items) == 553 and [item.key for item in items[:2]] == ["00000", "00001"]
        values = rng.choice([0.0, 1.0, None], p=(0.5, 0.4, 0.1), size=(553, 4)).tolist()
        marks = [
            Mark(item.key, values={PARTIAL: row, CORRECT: row}, notes={"reasons": [""] * 4, "details": [{}] * 4})
            for item, row in zip(items, values)
        ]
        marks[trial] = Mark(items[trial].key, errors=("nothing was made for it",))
        report = benchmark.report(tmp_path, items, marks)
        lines = [json.loads(line) for line in report.files["results.jsonl"].splitlines()]
        kept = [v for place, row in enumerate(values) for v in row if v is not None and place != trial]
        assert [line["correct"] for line in lines] == [v == 1 for v in kept]
        assert overall(report.scores["geneval"]) == pytest.approx(official(lines), abs=1e-12)
        assert benchmark.headline(report.scores) == {"overall": overall(report.scores["geneval"])}
        missing = 553 * 4 - len(kept)
        assert report.scores["geneval"]["geneval/geneval_failed"] == missing and f"{missing} pictures" in report.text


def test_a_folder_of_anybody_is_scored_and_official_lines_come_out(tmp_path):
    benchmark, works = suite(limit=12, samples=2), tmp_path / "works"
    fill(works, benchmark, [(number % 3, 7) for number in range(12)])
    (works / benchmark.paths(benchmark.chosen()[5])[0]).write_bytes(b"no picture")
    report = score(benchmark, works, tmp_path / "out")
    lines = read_rows(tmp_path / "out/results.jsonl")
    assert all(list(line) == FIELDS for line in lines) and len(lines) == 22 and len(report.failed) == 1
    assert report.failed[0].startswith(benchmark.chosen()[5].key)
    assert {line["tag"] for line in lines} == set(TAGS)
    for line in lines:
        metadata, details = json.loads(line["metadata"]), json.loads(line["details"])
        assert metadata["prompt"] == line["prompt"] and metadata["tag"] == line["tag"] and "index" not in metadata
        seen = np.asarray(Image.open(works / line["filename"])).any()
        assert bool(details) == seen and line["correct"] == (seen and line["tag"] in ("single_object", "two_object"))
        assert bool(line["reason"]) != line["correct"]
    assert overall(report.scores["geneval"]) == pytest.approx(official(lines))
    assert "official prompts" in report.text
    # A mark that was cut off in the middle of its line is made again, the others are not.
    file = tmp_path / "out/marks.jsonl"
    file.write_bytes(file.read_bytes()[:-20])
    assert score(benchmark, works, tmp_path / "out").scores == report.scores


def test_both_kinds_of_prompts_ask_for_the_same_and_are_never_mixed(tmp_path):
    plain, long = suite(limit=12, samples=1), suite("geneval:rewritten", limit=12, samples=1)
    for one, other in zip(plain.items(), long.items(), strict=True):
        assert one.key == other.key and one.tag == other.tag and one.task.prompt != other.task.prompt
        assert one.task.metadata["include"] == other.task.metadata["include"]
    fill(tmp_path / "works", plain, [(7,)] * 12)
    for item in plain.chosen():
        (tmp_path / "works" / item.key / "metadata.jsonl").write_text(json.dumps({"prompt": item.task.prompt}))
    assert not score(plain, tmp_path / "works", tmp_path / "a").failed
    refused = score(long, tmp_path / "works", tmp_path / "b")
    assert len(refused.failed) == 12 and "is about another prompt" in refused.failed[0]
    assert "no picture has a mark" in refused.text and "rewritten" in refused.text
    with pytest.raises(ValueError, match="holds no scores"):
        (tmp_path / "scores.json").write_text(json.dumps(refused.scores))
        plain.read_baseline(tmp_path / "scores.json")


def test_the_tiny_model_from_its_prompts_to_the_report(tmp_path):
    benchmark = suite(limit=6, samples=2, steps=1, size=toy_grpo.SIZE, guidance=1.0)
    report = library.run(benchmark, toy_benchmarks.subject(), tmp_path)
    assert not report.failed and (tmp_path / "geneval.png").is_file()
    for item in benchmark.chosen():
        folder = tmp_path / "works" / item.key
        assert sorted(path.name for path in folder.iterdir()) == ["metadata.jsonl", "samples"]
        metadata = json.loads((folder / "metadata.jsonl").read_text())
        assert (metadata["prompt"], metadata["tag"]) == (item.task.prompt, item.tag) and metadata["include"]
        assert sorted(path.name for path in (folder / "samples").iterdir()) == ["00000.png", "00001.png"]


def test_what_is_wrong_is_said_first():
    with pytest.raises(ValueError, match="geneval"):
        make_benchmark("genevl")
    with pytest.raises(ConfigError, match="no_such_folder"):
        make_benchmark("geneval", {"detector": "tflite", "detector_model": "no_such_folder"}).check(None)
    with pytest.raises(ValueError, match="samples is 0"):
        suite(samples=0)
