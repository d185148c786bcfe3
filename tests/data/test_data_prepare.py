"""Preparation: what is kept and how, what is left out and why, and the same files whatever interrupts it."""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import memory_records
import numpy as np
import pytest
from memory_records import MULTIPLE, RESOLUTION, SETTINGS, MemoryRecords, file, good, mixed, smooth

from unipic2_jax.data.buckets import Bucket, bucket_size, crop_to
from unipic2_jax.data.prepare import Settings, describe, prepare
from unipic2_jax.data.prepared import PreparedBucket, PreparedIndex
from unipic2_jax.data.records import Record
from unipic2_jax.pictures.decode import BadRecord, decode

ROOT = Path(__file__).parents[2]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def drops(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "dropped.jsonl").read_text().splitlines()]


def examples(folder: Path) -> dict[str, tuple[Bucket, object]]:
    """Every example with its bucket, by name."""
    index = PreparedIndex.read(folder)
    sources = {bucket: PreparedBucket(folder, index, bucket) for bucket in index.buckets()}
    return {s[i].name: (bucket, s[i]) for bucket, s in sources.items() for i in range(len(s))}


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The mixed records, prepared without interruption."""
    out = tmp_path_factory.mktemp("reference") / "out"
    prepare(MemoryRecords(mixed()), out, **SETTINGS)
    return out


def test_buckets_and_pixels(tmp_path):
    shapes = {"1:1": (64, 60), "16:9": (160, 90), "9:16": (90, 160), "4:3": (80, 60)}
    records = [good(i, *size) for i, size in enumerate(shapes.values())]
    settings = {**SETTINGS, "resolution": 96, "min_size": 8}
    index = prepare(MemoryRecords(records), tmp_path / "out", **settings)
    assert index.buckets() == {Bucket(aspect): 1 for aspect in shapes}
    found = examples(tmp_path / "out")
    for i, (aspect, size) in enumerate(shapes.items()):
        bucket, example = found[f"row {i}"]
        assert (bucket.aspect, example.prompt) == (aspect, f"prompt {i}")
        expected = crop_to(smooth(100 * i, *size), *bucket_size(aspect, 96, MULTIPLE))
        np.testing.assert_array_equal(decode(example.image), expected)


def test_edits_come_to_the_targets_bucket(tmp_path):
    pictures = [smooth(i, *size) for i, size in enumerate([(120, 60), (240, 121), (60, 90)])]
    target, larger, other = map(file, pictures)
    records = [
        Record(target, "larger", (larger,), "one"),
        Record(target, "several", (larger, other), "two"),
        Record(target, "another shape", (other,), "three"),
    ]
    index = prepare(MemoryRecords(records), tmp_path / "out", **SETTINGS)
    size = bucket_size("16:9", RESOLUTION, MULTIPLE)
    assert index.buckets() == {Bucket("16:9", 1): 1, Bucket("16:9", 2): 1}
    assert [drop["reason"] for drop in drops(tmp_path / "out")] == ["pair-size"]
    _, example = examples(tmp_path / "out")["two"]
    for data, picture in zip((example.image, *example.references), pictures, strict=True):
        np.testing.assert_array_equal(decode(data), crop_to(picture, *size))


def test_aspects_limit_the_buckets(tmp_path):
    records = [good(0, 160, 90), good(1, 60, 60)]
    index = prepare(MemoryRecords(records), tmp_path / "out", **SETTINGS, aspects=("1:1", "4:3"))
    assert index.buckets() == {Bucket("4:3"): 1, Bucket("1:1"): 1}


def test_every_filter_counts_by_its_reason(tmp_path):
    same = good(0, references=1)
    records = {
        "kept": same,
        "too-small": good(1, 60, 23),
        "aspect": good(2, 160, 60),
        "long-prompt": good(3, prompt="p" * 41),
        "empty-prompt": good(4, prompt=" \n"),
        "pair-size": dataclasses.replace(good(5), references=(file(smooth(1, 60, 58)),)),
        "duplicate": dataclasses.replace(same, name="again"),
        "truncated-image": good(6, image=file(smooth(6, 60, 60))[:-200]),
        "not-unicode": good(7, prompt="half of \ud83d"),
        "not-json": BadRecord("not-json", "Line 9 is not JSON."),
    }
    settings = {**SETTINGS, "max_aspect": 2.5, "max_prompt": 40}
    index = prepare(MemoryRecords(list(records.values())), tmp_path / "out", **settings)
    reasons = set(records) - {"kept"}
    assert index.summary["dropped"] == dict.fromkeys(reasons, 1)
    assert (index.summary["read"], index.summary["kept"]) == (10, 1)
    found = {drop["reason"]: drop for drop in drops(tmp_path / "out")}
    assert set(found) == reasons
    assert "60 x 23" in found["too-small"]["message"]
    assert found["duplicate"]["name"] == "again"
    assert found["not-json"] == {"name": "record 9", "reason": "not-json", "message": "Line 9 is not JSON."}
    table = describe(tmp_path / "out")
    assert all(reason in table for reason in reasons) and "such as row 1" in table


def test_duplicates_are_the_same_pixels_prompt_and_references(tmp_path):
    first = good(0, 48, 48, references=1)
    picture = smooth(0, 48, 48)
    records = [
        first,
        dataclasses.replace(first, image=file(picture, "BMP"), name="other file, same pixels"),
        dataclasses.replace(first, prompt="other prompt", name="other prompt"),
        dataclasses.replace(first, references=(), name="no reference"),
        dataclasses.replace(first, references=(first.image,), name="other reference"),
        *(good(i) for i in range(1, 9)),
        dataclasses.replace(first, name="in a later chunk"),
    ]
    index = prepare(MemoryRecords(records), tmp_path / "out", **SETTINGS)
    assert index.summary["dropped"] == {"duplicate": 2}
    assert [drop["name"] for drop in drops(tmp_path / "out")] == ["other file, same pixels", "in a later chunk"]


@pytest.mark.parametrize("image_format", ["jpeg", "webp"])
def test_lossy_formats(tmp_path, image_format):
    found = {}
    for quality in (20, 95):
        settings = {**SETTINGS, "image_format": image_format, "quality": quality}
        prepare(MemoryRecords([good(0)]), tmp_path / str(quality), **settings)
        found[quality] = examples(tmp_path / str(quality))["row 0"][1].image
    start = {"jpeg": b"\xff\xd8", "webp": b"RIFF"}[image_format]
    assert all(data.startswith(start) for data in found.values())
    exact = np.asarray(crop_to(smooth(0, 60, 60), 48, 48), float)
    error = {quality: np.abs(exact - decode(data)).mean() for quality, data in found.items()}
    assert error[95] < 3 < 2 * error[20]
    assert len(found[20]) < len(found[95])


def test_the_error_budget_stops_and_a_larger_one_goes_on(tmp_path):
    records = [good(i) for i in range(20)]
    for number in (3, 10, 12):
        records[number] = good(number, image=b"no picture")
    source = MemoryRecords(records)
    with pytest.raises(
        ValueError, match=r"2 of the first 11 records are bad and 1 may be.*row 10.*max_errors"
    ) as error:
        prepare(source, tmp_path / "out", max_errors=1, **SETTINGS)
    assert str(error.value).count(". ") == 0
    assert [drop["name"] for drop in drops(tmp_path / "out")] == ["row 3", "row 10"]
    assert (tmp_path / "out/1x1-00000.array_record").is_file()
    assert not (tmp_path / "out/dataset.json").exists()
    with pytest.raises(ValueError, match="3 of the first 13"):
        prepare(source, tmp_path / "out", max_errors=0.1, **SETTINGS)
    prepare(source, tmp_path / "out", **SETTINGS)
    prepare(source, tmp_path / "whole", max_errors=3, **SETTINGS)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert [drop["name"] for drop in drops(tmp_path / "out")] == ["row 3", "row 10", "row 12"]


def test_filters_and_duplicates_are_no_errors(tmp_path):
    records = [good(0), good(0), good(1, 10, 10), BadRecord("empty-prompt", "Line 4 has no prompt.")]
    index = prepare(MemoryRecords(records), tmp_path / "out", max_errors=0, **SETTINGS)
    assert index.summary["dropped"] == {"duplicate": 1, "empty-prompt": 1, "too-small": 1}


def test_nothing_kept_is_an_error(tmp_path):
    records = [good(0, 10, 10), good(1, prompt="")]
    with pytest.raises(ValueError, match=r"None of the 2 records was kept \(empty-prompt: 1, too-small: 1\)"):
        prepare(MemoryRecords(records), tmp_path / "out", **SETTINGS)
    assert not (tmp_path / "out/dataset.json").exists()
    with pytest.raises(ValueError, match="no records"):
        prepare(MemoryRecords([]), tmp_path / "out", **SETTINGS)


class Killed(BaseException):
    """Like the end of the process: nothing catches it."""


def test_killed_between_any_two_renames(tmp_path, monkeypatch):
    """Every state that the folder can be left in goes on to the same files."""
    records, settings = mixed()[2:14], {**SETTINGS, "shard_size": 6}
    index = prepare(MemoryRecords(records), tmp_path / "whole", **settings)
    replace, expected = os.replace, contents(tmp_path / "whole")
    # Settings, the list of drops, the shards and journal of two chunks, and dataset.json.
    renames = 2 + len(index.shards) + 2 + 1
    for point in range(renames + 1):
        out, calls = tmp_path / str(point), 0

        def dying(source, target, point=point):
            nonlocal calls
            calls += 1
            if calls > point:
                raise Killed
            replace(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", dying)
            patch.setattr(os, "getpid", lambda: 1)  # a part of the temporary names
            with pytest.raises(Killed) if point < renames else contextlib.nullcontext():
                prepare(MemoryRecords(records), out, **settings)
        assert (out / "dataset.json").exists() == (point == renames)
        prepare(MemoryRecords(records), out, **settings)
        assert contents(out) == expected, point


def test_killed_process(tmp_path, reference):
    """SIGKILL in the middle of a run with a worker, which ends too; then on without."""
    out = tmp_path / "out"
    command = [sys.executable, memory_records.__file__, str(out), "1"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not (out / "journal/00001.json").exists():
        assert process.poll() is None and time.monotonic() < deadline, process.stderr.read()
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    # The worker holds the pipe too: it ends when both have.
    process.communicate(timeout=60)
    assert not (out / "dataset.json").exists()
    prepare(MemoryRecords(mixed()), out, **SETTINGS)
    assert contents(out) == contents(reference)


def test_workers_make_no_difference(tmp_path, reference):
    prepare(MemoryRecords(mixed()), tmp_path / "out", workers=2, **SETTINGS)
    assert contents(tmp_path / "out") == contents(reference)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bug_surfaces(tmp_path, workers):
    records = [good(i) for i in range(32)]
    records[1] = "bug"
    with pytest.raises(RuntimeError, match="record 1 of the source failed with Unpicklable: two arguments") as error:
        prepare(MemoryRecords(records), tmp_path / "out", workers=workers, **SETTINGS)
    assert "in __getitem__" in error.value.__notes__[0]


@pytest.mark.slow
def test_a_dead_worker_surfaces(tmp_path):
    records = [good(i) for i in range(32)]
    records[1] = "death"
    with pytest.raises(RuntimeError, match="exit code 3"):
        prepare(MemoryRecords(records), tmp_path / "out", workers=1, **SETTINGS)


def test_a_complete_folder_is_left_alone(tmp_path, reference, capsys):
    before = {path: path.stat().st_mtime_ns for path in reference.iterdir()}
    index = prepare(MemoryRecords(mixed()), reference, workers=1, max_errors=5, **SETTINGS)
    assert "is complete already" in capsys.readouterr().err
    assert index == PreparedIndex.read(reference)
    assert {path: path.stat().st_mtime_ns for path in reference.iterdir()} == before


@pytest.mark.parametrize("complete", [False, True])
def test_another_run_in_the_folder_is_refused(tmp_path, complete):
    records, out = [good(i) for i in range(32)], tmp_path / "out"
    if complete:
        prepare(MemoryRecords(records), out, **SETTINGS)
    else:
        broken = [*records[:-1], "bug"]
        with pytest.raises(RuntimeError):
            prepare(MemoryRecords(broken), out, **SETTINGS)
    before = contents(out)
    with pytest.raises(ValueError, match=r"prepared with resolution 48, which is 64 now; give another folder"):
        prepare(MemoryRecords(records), out, **{**SETTINGS, "resolution": 64})
    for others in (records[:-1], [good(20), *records[1:]]):
        with pytest.raises(ValueError, match="data of another source"):
            prepare(MemoryRecords(others), out, **SETTINGS)
    assert contents(out) == before
    prepare(MemoryRecords(records), out, **SETTINGS)


def test_a_folder_with_other_files_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="holds other files already"):
        prepare(MemoryRecords([good(0)]), tmp_path, **SETTINGS)
    assert contents(tmp_path) == {"thesis.tex": b"years of work"}


def test_the_index_round_trips(reference):
    index = PreparedIndex.read(reference)
    assert PreparedIndex.read(reference).to_json() == index.to_json() == (reference / "dataset.json").read_text()
    assert (index.resolution, index.multiple, index.arrays) == (RESOLUTION, MULTIPLE, ())
    assert index.summary["read"] == 36 and index.summary["kept"] == sum(index.buckets().values()) == 32
    assert index.summary["dropped"] == {"duplicate": 2, "not-json": 1, "too-small": 1}
    files = {path.name for path in reference.glob("*.array_record")}
    assert files == {shard.file for shard in index.shards}
    for bucket, count in index.buckets().items():
        source = PreparedBucket(reference, index, bucket)
        assert len(source) == count
        assert all(len(source[i].references) == bucket.references for i in range(count))
    # In a bucket, examples are in the order of the source.
    square = PreparedBucket(reference, index, Bucket("1:1"))
    numbers = [int(square[i].name.split()[1]) for i in range(len(square))]
    assert numbers == sorted(numbers) and len(numbers) > 8


@pytest.mark.parametrize(
    "settings, sentence",
    [
        ({"resolution": 50}, "must be a positive multiple"),
        ({"aspects": ("1:1", "5:4")}, "'5:4' is not a bucket"),
        ({"aspects": ()}, "no aspect ratios"),
        ({"image_format": "bmp"}, "image format 'bmp'"),
        ({"quality": 0}, "quality 0"),
        ({"shard_size": 0}, "shard_size is 0"),
        ({"max_aspect": 0.5}, "max_aspect is 0.5"),
        ({"workers": -1}, "number of workers is -1"),
        ({"max_errors": -1}, "max_errors is -1"),
    ],
)
def test_bad_settings(tmp_path, settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        prepare(MemoryRecords([good(0)]), tmp_path / "out", **{**SETTINGS, **settings})
    assert not (tmp_path / "out").exists()


def test_the_least_size_follows_the_resolution():
    assert Settings(512).min_size == 256


@pytest.mark.parametrize("model", ["TINY", pytest.param("TINY_METAQUERY", marks=pytest.mark.slow)])
def test_stored_arrays_are_what_the_model_makes(tmp_path, model):
    """Of the stored pictures, also where a batch is not full, and where they were compressed with losses."""
    import jax

    from unipic2_jax import pipelines
    from unipic2_jax.models.sampling import encode_moments, from_uint8
    from unipic2_jax.pipelines.encode_data import ModelEncoder

    bundle = pipelines.load_bundle(getattr(pipelines, model))
    encoder = ModelEncoder(bundle, ["conditioning", "latents"], name="tiny", dtype="float32", batch_size=2)
    records = [good(i, references=int(i > 2), prompt=f"a red circle {i}") for i in range(5)]
    settings = {**SETTINGS, "image_format": "jpeg"}
    index = prepare(MemoryRecords(records), tmp_path / "out", encode=encoder, **settings)
    names = ("mean", "logvar", "context", "pooled", "reference_mean", "reference_logvar")
    assert sorted(index.arrays) == sorted(names)
    found = examples(tmp_path / "out").values()
    assert len(found) == 5
    moments = jax.jit(lambda params, pixels: encode_moments(bundle.vae, params, from_uint8(pixels)))
    condition = jax.jit(bundle.conditioner.apply)
    for bucket, example in found:
        assert set(example.arrays) == set(names if bucket.references else names[:4])
        pixels = np.stack([decode(data) for data in (example.image, *example.references)])
        mean, logvar = moments(bundle.params["vae"], pixels)
        tokens = bundle.conditioner.tokenize([example.prompt], [pixels[1:]])
        context, pooled = condition(bundle.params["conditioner"], tokens)
        expected = {"mean": mean[0], "logvar": logvar[0], "context": context[0], "pooled": pooled[0]}
        if bucket.references:
            expected |= {"reference_mean": mean[1:], "reference_logvar": logvar[1:]}
        for name, values in expected.items():
            assert example.arrays[name].dtype == np.float32
            np.testing.assert_allclose(example.arrays[name], values, rtol=1e-4, atol=1e-4, err_msg=name)
    with pytest.raises(ValueError, match="prepared with encoder"):
        prepare(MemoryRecords(records), tmp_path / "out", **settings)


def test_encoders_say_what_does_not_fit(tmp_path):
    from unipic2_jax import pipelines
    from unipic2_jax.pipelines.encode_data import ModelEncoder

    bundle = pipelines.load_bundle(pipelines.TINY)
    with pytest.raises(ValueError, match="cannot store 'pixels'"):
        ModelEncoder(bundle, ["pixels"])
    with pytest.raises(ValueError, match="nothing to store"):
        ModelEncoder(bundle, [])
    encoder = ModelEncoder(bundle, ["latents"])
    with pytest.raises(ValueError, match="not fit float16"):
        encoder._stored("mean", np.array([1e5], np.float32))
    encoder.multiple = 32
    with pytest.raises(ValueError, match="multiples of 32 pixels but multiple is 16"):
        prepare(MemoryRecords([good(0)]), tmp_path / "out", encode=encoder, **SETTINGS)


def command(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "launch.prepare_data", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120
    )


def test_command(tmp_path):
    lines = []
    for i in range(6):
        (tmp_path / f"{i}.png").write_bytes(file(smooth(i, 60, 60)))
        lines.append(json.dumps({"image": f"{i}.png", "prompt": f"picture {i}"}) + "\n")
    lines.append("not json\n")
    (tmp_path / "train.jsonl").write_text("".join(lines))
    out = tmp_path / "out"
    arguments = ["--kind=jsonl", f"--path={tmp_path / 'train.jsonl'}", f"--out={out}", "--multiple=16", "--workers=1"]
    done = command(*arguments, "--resolution=48", "--shard_size=4", "--format=webp")
    assert done.returncode == 0, done.stderr
    assert PreparedIndex.read(out).buckets() == {Bucket("1:1"): 6}
    assert "kept" in done.stdout and "48 x 48 pixels" in done.stdout and "not-json" in done.stdout
    refused = command(*arguments, "--store=latents")
    assert (
        refused.returncode == 2 and refused.stderr == "error: --store needs a model that computes it; give --model.\n"
    )
