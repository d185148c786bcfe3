"""Batches of a plan: one bucket each, in proportion, nothing repeated or skipped, wherever and by whomever they are read."""

from collections import Counter

import numpy as np
import pytest
from prepared_files import BUCKETS, number_of, write_prepared

from unipic2_jax.data.batches import BLOCK, BatchPlan
from unipic2_jax.data.buckets import ASPECTS, Bucket, bucket_size, crop_to, nearest_aspect
from unipic2_jax.data.examples import make_examples
from unipic2_jax.data.loader import Loader
from unipic2_jax.data.prepared import INDEX, PreparedIndex

SHARES = {
    "t2i": {Bucket("1:1"): 3.0, Bucket("4:3"): 1.0, Bucket("9:16"): 0.1},
    "edit": {Bucket("1:1", 1): 1.0, Bucket("1:1", 2): 1.0},
}
TURN = ("t2i", "t2i", "edit")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(write_prepared(tmp_path_factory.mktemp("data") / "prepared", BUCKETS, 32, 16))


def plan_of(tasks=TURN, shares=SHARES, batch=4, seed=0, phases=((0, 32),)):
    return BatchPlan(tasks, shares, batch, seed, phases, 16)


def loader_of(folder, batch=4, seed=0, threads=4, phases=((0, 32),), **options):
    sources = {task: make_examples({"kind": "prepared", "path": folder}, seed, task) for task in set(TURN)}
    plan = plan_of(shares={task: source.buckets for task, source in sources.items()}, batch=batch, phases=phases)
    return Loader(sources, plan, lambda shape, examples: list(examples), threads=threads, **options)


def test_buckets_have_about_the_pixels_and_the_ratio_they_are_named_after():
    for resolution in (256, 512, 1024):
        for aspect, ratio in ASPECTS.items():
            height, width = bucket_size(aspect, resolution)
            assert height % 32 == width % 32 == 0
            assert abs(height * width / resolution**2 - 1) < 0.13
            assert abs(np.log(width / height / ratio)) < 0.14
            assert nearest_aspect(width, height) == aspect or resolution == 256
    with pytest.raises(ValueError, match="5:4"):
        bucket_size("5:4", 256)
    with pytest.raises(ValueError, match="multiple of 32"):
        bucket_size("1:1", 250)


def test_a_crop_keeps_the_middle():
    from PIL import Image

    pixels = np.zeros((40, 120, 3), np.uint8)
    pixels[:, 40:80] = 255  # the middle third is what a square keeps
    kept = np.asarray(crop_to(Image.fromarray(pixels), 20, 20))
    assert kept.shape == (20, 20, 3) and kept.min() > 230
    same = Image.fromarray(pixels)
    assert crop_to(same, 40, 120) is same


def test_a_plan_alternates_and_draws_buckets_by_their_share():
    plan = plan_of()
    places = [plan.place(step) for step in range(3 * 2000)]
    assert [place.shape.task for place in places[:6]] == list(TURN) * 2
    drawn = Counter(place.shape.bucket for place in places if place.shape.task == "t2i")
    total = sum(SHARES["t2i"].values())
    for bucket, share in SHARES["t2i"].items():
        expected = 4000 * share / total
        assert abs(drawn[bucket] - expected) < 4 * np.sqrt(expected)


def test_a_plan_goes_through_every_bucket_without_gaps_in_any_order_of_asking():
    plan, again = plan_of(), plan_of()
    steps = np.random.default_rng(0).permutation(3 * BLOCK)
    places = {int(step): again.place(int(step)) for step in steps}
    found = {}
    for step in range(3 * BLOCK):
        assert plan.place(step) == places[step]
        found.setdefault(places[step].shape.bucket, []).append(places[step].first)
    for first in found.values():
        assert first == list(range(0, 4 * len(first), 4))
    other = plan_of(seed=1)
    assert any(other.place(step).shape != plan.place(step).shape for step in range(100))


def test_phases_change_the_size_and_nothing_else():
    plan, grown = plan_of(), plan_of(phases=((0, 16), (5, 32)))
    for step in range(10):
        one, two = plan.place(step), grown.place(step)
        assert (one.first, one.shape.bucket) == (two.first, two.shape.bucket)
        assert two.shape.resolution == (16 if step < 5 else 32)
    assert {shape.resolution for shape in grown.shapes(1)} == {32} and len(grown.shapes(1)) == 5
    with pytest.raises(ValueError, match="ascend from 0"):
        plan_of(phases=((5, 32),))


def test_batches_have_one_shape_and_an_epoch_has_everything_once(folder):
    loader = loader_of(folder)
    seen = {}
    for step in range(60):
        shape, examples = loader.batch(step)
        for example in examples:
            assert example.image.shape == (*shape.size, 3)
            assert len(example.references) == shape.bucket.references
            assert number_of(example.image) == int(example.prompt)
            for r, reference in enumerate(example.references, 1):
                assert number_of(reference) == int(example.prompt) + 1000 * r
            seen.setdefault(shape.bucket, []).append(int(example.prompt))
    for bucket, count in BUCKETS.items():
        epochs = [seen[bucket][i : i + count] for i in range(0, len(seen[bucket]) - count + 1, count)]
        assert epochs and all(len(set(epoch)) == count for epoch in epochs)
        assert len(epochs) == 1 or epochs[0] != epochs[1]


@pytest.mark.parametrize("threads", [0, 4])
def test_going_on_from_a_step_gives_what_would_have_come(folder, threads):
    prompts = lambda loader, step: [example.prompt for example in loader.batch(step)[1]]
    whole = loader_of(folder)
    expected = [prompts(whole, step) for step in range(12)]
    resumed = loader_of(folder, threads=threads)
    assert [prompts(resumed, step) for step in range(7, 12)] == expected[7:]
    assert prompts(resumed, 3) == expected[3]


def test_processes_share_every_batch_and_their_number_may_change(folder):
    prompts = lambda loader, step: [example.prompt for example in loader.batch(step)[1]]
    whole, out = loader_of(folder), []
    for step in range(9):
        processes = 1 if step < 3 else 4 if step < 6 else 2
        # Neighbouring rows, and rows with gaps, as on a torus.
        shares = (
            np.split(np.arange(4), processes) if step % 2 else [np.arange(p, 4, processes) for p in range(processes)]
        )
        found = dict.fromkeys(range(4))
        for rows in shares:
            found |= dict(zip(rows.tolist(), prompts(loader_of(folder, threads=0, rows=rows), step), strict=True))
        out.append(list(found.values()))
    assert out == [prompts(whole, step) for step in range(9)]


def test_pictures_are_scaled_to_the_phase(folder):
    loader = loader_of(folder, phases=((0, 16), (2, 32)))
    sizes = [loader.batch(step)[1][0].image.shape for step in range(4)]
    assert sizes[0] == (16, 16, 3) and max(sizes[2][:2]) >= 32


def test_a_mixture_takes_from_its_sources_by_weight(folder, tmp_path):
    other = str(write_prepared(tmp_path / "other", {Bucket("1:1"): 200}, 32, 16))
    sources = {
        "small": {"kind": "prepared", "path": folder},
        "large": {"kind": "prepared", "path": other, "weight": 3.0},
    }
    mixed = make_examples({"kind": "mixture", "sources": sources}, 0, "t2i")
    shares = {bucket: share / sum(mixed.buckets.values()) for bucket, share in mixed.buckets.items()}
    assert shares[Bucket("1:1")] == pytest.approx((3 + 20 / 30) / 4) and shares[Bucket("4:3")] == pytest.approx(
        10 / 30 / 4
    )
    drawn = mixed.dataset(Bucket("1:1"))
    large = np.mean([int(drawn[i].prompt) >= 20 for i in range(400)])
    # Numbers below 20 are the small source's, and a tenth of the large one's.
    assert large == pytest.approx(0.9 * 3 / (3 + 20 / 30), abs=0.04)
    edits = make_examples(
        {"kind": "mixture", "sources": {"small": {**sources["small"], "tasks": ("edit",)}}}, 0, "edit"
    )
    assert set(edits.buckets) == {Bucket("1:1", 1), Bucket("3:4", 2)}


def test_what_cannot_be_read_is_one_sentence(folder, tmp_path):
    prepared = {"kind": "prepared", "path": folder}
    with pytest.raises(ValueError, match="weight 0; give more than 0"):
        make_examples({"kind": "mixture", "sources": {"a": {**prepared, "weight": 0.0}}}, 0, "t2i")
    with pytest.raises(ValueError, match="no sources"):
        make_examples({"kind": "mixture", "sources": {}}, 0, "t2i")
    with pytest.raises(ValueError, match="for the task 't2i'"):
        make_examples({"kind": "mixture", "sources": {"a": {**prepared, "tasks": ("edit",)}}}, 0, "t2i")
    with pytest.raises(FileNotFoundError, match="no finished prepared data"):
        make_examples({"kind": "prepared", "path": str(tmp_path)}, 0, "t2i")
    with pytest.raises(ValueError, match="no stored latents"):
        make_examples({**prepared, "stored": ("latents",)}, 0, "t2i")
    only = write_prepared(tmp_path / "only", {Bucket("1:1"): 4}, 32, 16)
    with pytest.raises(ValueError, match="no examples for the task 'edit'"):
        make_examples({"kind": "prepared", "path": str(only)}, 0, "edit")
    next(only.glob("*.array_record")).unlink()
    with pytest.raises(FileNotFoundError, match="lacks the shard"):
        make_examples({"kind": "prepared", "path": str(only)}, 0, "t2i")
    (only / INDEX).write_text("{}")
    with pytest.raises(ValueError, match="is damaged"):
        PreparedIndex.read(only)
