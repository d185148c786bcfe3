"""Who is asked about what, how often, and what becomes of calls that fail."""

import threading
import time

import numpy as np
import pytest

from unipic2_jax.data.prompts import PromptRecord, make_source
from unipic2_jax.rewards import scoring
from unipic2_jax.rewards.base import REWARDS, Calls, Reward, RewardError, Scores
from unipic2_jax.rewards.scoring import Entry, Scorer, check_tasks, make_entries

IMAGES = [np.full((2, 2, 3), value, np.uint8) for value in range(8)]
RECORDS = [PromptRecord(f"prompt {index // 4}", metadata={"dataset": "ab"[index // 4]}) for index in range(8)]


class Pixel(Reward):
    """The first pixel's value, after `trouble` had its way."""

    def __init__(self, trouble=lambda images: None):
        self.trouble, self.sizes = trouble, []

    def score(self, images, records):
        assert len(images) == len(records)
        self.sizes.append(len(images))
        self.trouble(images)
        values = np.array([float(image[0, 0, 0]) for image in images])
        return Scores(values, {"half": values / 2})


class Rank(Pixel):
    groupwise = True

    def score(self, images, records):
        assert len({record.key for record in records}) == 1
        return Scores(super().score(images, records).values.argsort().argsort().astype(float), {})


def scored(reward, images=IMAGES, records=RECORDS, calls=None, **fields):
    return Scorer({"it": Entry(reward, calls or reward.calls, **fields)}).score(images, records)


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(scoring, "LONGEST_PAUSE", 0.01)


def test_scores_and_details_come_back_in_order_whatever_the_calls():
    for calls in (Calls(), Calls(batch_size=3), Calls(batch_size=1, concurrency=4)):
        found = scored(Pixel(), calls=calls)
        assert found.values["it"].tolist() == list(range(8)) and found.asked["it"].all()
        assert found.details["it"]["half"].tolist() == [value / 2 for value in range(8)] and not found.errors["it"]


def test_a_groupwise_reward_gets_whole_groups():
    reward = Rank()
    assert scored(reward).values["it"].tolist() == [0, 1, 2, 3] * 2 and sorted(reward.sizes) == [4, 4]
    with pytest.raises(ValueError, match="whole groups has no batch_size"):
        Entry(Rank(), Calls(batch_size=2))


def test_a_reward_of_some_datasets_is_not_asked_about_others():
    found = scored(Pixel(), datasets=("b",))
    assert found.asked["it"].tolist() == [False] * 4 + [True] * 4
    assert np.isnan(found.values["it"][:4]).all() and found.values["it"][4:].tolist() == [4, 5, 6, 7]
    assert scored(Pixel(), datasets=("c",)).asked["it"].sum() == 0


def test_a_failed_call_is_tried_again_and_only_that_call():
    failures = {3: 2}

    def trouble(images):
        number = int(images[0][0, 0, 0])
        if failures.get(number, 0):
            failures[number] -= 1
            raise RewardError("The server is tired.")

    reward = Pixel(trouble)
    found = scored(reward, calls=Calls(batch_size=1, concurrency=2, retries=2))
    assert found.values["it"].tolist() == list(range(8)) and len(reward.sizes) == 10


def test_what_fails_for_good_has_no_score_and_a_sentence():
    def trouble(images):
        if images[0][0, 0, 0] == 4:
            raise RewardError("The server is tired.")

    found = scored(Pixel(trouble), calls=Calls(batch_size=2, retries=1))
    assert np.isnan(found.values["it"]).tolist() == [False] * 4 + [True] * 2 + [False] * 2
    assert found.errors["it"] == dict.fromkeys((4, 5), "The server is tired.") and found.asked["it"].all()


def test_the_server_s_own_wish_is_waited_for():
    asked = []

    def trouble(images):
        asked.append(time.monotonic())
        if len(asked) == 1:
            raise RewardError("Too many requests.", retry_after=0.3)

    assert scored(Pixel(trouble), calls=Calls(retries=1)).values["it"].tolist() == list(range(8))
    assert asked[1] - asked[0] >= 0.3


def test_a_call_that_takes_too_long_is_left_behind():
    over = threading.Event()
    reward = Pixel(lambda images: over.wait(60) if images[0][0, 0, 0] == 2 else None)
    found = scored(reward, calls=Calls(batch_size=1, timeout=0.2, concurrency=2))
    over.set()
    assert np.isnan(found.values["it"]).nonzero()[0].tolist() == [2]
    assert found.errors["it"] == {2: "No answer came within 0.2 seconds."}


def test_after_failures_in_a_row_no_more_calls_are_made_until_the_pause_is_over():
    down = [True]

    def trouble(images):
        if down[0]:
            raise RewardError("The server is down.")

    reward = Pixel(trouble)
    scorer = Scorer({"it": Entry(reward, Calls(batch_size=1, breaker=3, pause=0.2))})
    first = scorer.score(IMAGES, RECORDS)
    assert np.isnan(first.values["it"]).all() and len(reward.sizes) == 3
    assert first.errors["it"][7] == "It failed 3 times in a row and is left alone for 0.2 seconds."
    down[0] = False
    time.sleep(0.25)
    assert scorer.score(IMAGES, RECORDS).values["it"].tolist() == list(range(8))


@pytest.mark.parametrize("breaker", [0, 3])
def test_calls_overlap_with_a_breaker_and_without(breaker):
    together = threading.Barrier(4)
    found = scored(Pixel(lambda images: together.wait(20)), calls=Calls(batch_size=1, concurrency=4, breaker=breaker))
    assert found.values["it"].tolist() == list(range(8))


def test_a_breaker_counts_calls_whose_tries_are_used_up():
    reward = Pixel(lambda images: (_ for _ in ()).throw(RewardError("The server is down.")))
    found = scored(reward, calls=Calls(batch_size=1, retries=2, backoff=0.01, breaker=3))
    assert len(reward.sizes) == 9 and found.errors["it"][2] == "The server is down."
    assert found.errors["it"][3] == "It failed 3 times in a row and is left alone for 60 seconds."


def test_a_long_queue_outlives_a_short_outage(monkeypatch):
    """A judge's defaults with a twentieth of their pauses: 256 calls, and nobody answers for what would be three seconds."""
    monkeypatch.setattr(scoring, "LONGEST_PAUSE", 3.0)
    up = time.monotonic() + 0.15

    def trouble(images):
        if time.monotonic() < up:
            raise RewardError("The server is down.")
        time.sleep(0.002)

    calls = Calls(batch_size=1, concurrency=8, retries=4, backoff=0.05, breaker=10)
    found = scored(Pixel(trouble), IMAGES * 32, RECORDS * 32, calls)
    # One of 25 calls draws pauses that are shorter than the outage, and eight at a time meet it.
    assert np.isnan(found.values["it"]).sum() < 10 and not any("left alone" in e for e in found.errors["it"].values())


def test_a_success_ends_the_pause_and_another_failure_begins_it_again():
    breaker = scoring.Breaker(Calls(breaker=2, pause=0.5))
    outcomes = []
    for failed in (True, False, True, True, False, True, True):
        breaker.count(failed)
        outcomes.append(breaker.is_open())
    assert outcomes == [False, False, False, True, False, False, True]
    time.sleep(0.6)
    assert not breaker.is_open()
    breaker.count(failed=True)
    assert breaker.is_open()


@pytest.mark.parametrize("asked", [0.31, 86400.0, 1e12, float("inf"), float("nan")])
def test_who_asks_for_more_time_than_there_is_has_failed(asked):
    def trouble(images):
        raise RewardError("Too many requests.", retry_after=asked)

    reward = Pixel(trouble)
    found = scored(reward, calls=Calls(batch_size=1, retries=3, patience=0.3, breaker=2))
    sentence = f"Too many requests, and asks for {asked:g} seconds, more than its patience of 0.3."
    assert found.errors["it"][0] == sentence and len(reward.sizes) == 2  # the others meet the breaker


def test_an_error_ends_what_is_queued_or_waits_for_another_try(monkeypatch):
    monkeypatch.setattr(scoring, "LONGEST_PAUSE", 60.0)
    tried, release = threading.Event(), threading.Event()

    def down(images):
        tried.set()
        raise RewardError("The server is down.", retry_after=60)

    def mistake(images):
        assert tried.wait(20)
        raise KeyError("source")

    waits, blocked, calls = Pixel(down), Pixel(lambda images: release.wait(20)), Calls(batch_size=1, retries=3)
    wrong = Entry(Pixel(mistake), Calls())
    scorer, over = (
        Scorer({"wrong": wrong, "waits": Entry(waits, calls), "blocked": Entry(blocked, calls)}),
        threading.Event(),
    )
    first, _ = (scorer.start(IMAGES, RECORDS, over) for _ in range(2))
    with pytest.raises(KeyError):
        first()
    release.set()
    started = time.monotonic()
    for pool in scorer._pools.values():
        pool.shutdown()  # as the interpreter's end does
    assert time.monotonic() - started < 20 and waits.sizes == [1] and len(blocked.sizes) == 1


def test_a_call_is_given_more_time_than_its_requests():
    reward = Pixel()
    reward.request_timeout = 50.0
    for timeout in (50.0, 20.0):
        with pytest.raises(ValueError, match=f"timeout is {timeout:g} and request_timeout 50 seconds"):
            Entry(reward, Calls(timeout=timeout))
    assert Entry(reward, Calls(timeout=51)).calls.timeout == 51 and Entry(reward, Calls()).calls.timeout == 0


def test_tasks_of_a_file_are_shown_to_the_rewards_that_are_about_them(tmp_path):
    class Cats(Reward):
        def check(self, records):
            if wrong := [record.prompt for record in records if "cat" not in record.prompt]:
                raise ValueError(f"The prompt {wrong[0]!r} has no cat; add one.")

    entries = {"any": Entry(Pixel(), Calls()), "cats": Entry(Cats(), Calls(), datasets=("cats",))}
    files = {name: tmp_path / f"{name}.jsonl" for name in ("cats", "dogs")}
    sources = {name: {"kind": "jsonl", "path": str(path)} for name, path in files.items()}
    make = lambda: make_source({"kind": "turns", "sources": {**sources, "endless": {"kind": "shapes"}}}, 0)
    files["dogs"].write_text('{"prompt": "a dog"}')
    files["cats"].write_text('{"prompt": "a cat"}\n{"prompt": "a wildcat"}')
    check_tasks(entries, make())
    files["cats"].write_text('{"prompt": "a cat"}\n{"prompt": "a mouse"}')
    with pytest.raises(ValueError, match=r"^rewards.cats: Line 2 of .*cats.jsonl: The prompt 'a mouse' has no cat"):
        check_tasks(entries, make())


def test_nobody_is_asked_about_a_picture_that_was_made_of_nothing():
    asked = []

    class Counting(Reward):
        def score(self, images, records):
            asked.extend(record.prompt for record in records)
            return Scores(np.ones(len(images)), {})

    class OfGroups(Counting):
        groupwise = True

    records = [PromptRecord(name, error="Its picture is gone." if name == "b" else "") for name in "aabbcc"]
    entries = {"each": Entry(Counting(), Calls()), "groups": Entry(OfGroups(), Calls())}
    scored = Scorer(entries).score([np.zeros((1, 1, 3), np.uint8)] * 6, records)
    for name in entries:
        np.testing.assert_array_equal(scored.values[name], [1, 1, np.nan, np.nan, 1, 1])
        assert (
            scored.errors[name] == {2: "Its picture is gone.", 3: "Its picture is gone."} and scored.asked[name].all()
        )
    assert sorted(asked) == list("aaaacccc")


def test_wrong_numbers_of_scores_are_failures_and_mistakes_are_not():
    class Short(Reward):
        def score(self, images, records):
            return Scores(np.zeros(len(images) - 1), {})

    assert scored(Short()).errors["it"][0] == "(7,) scores came for 8 images."

    def mistake(images):
        raise KeyError("source")

    with pytest.raises(KeyError):
        scored(Pixel(mistake), calls=Calls(retries=3))


def test_scoring_does_not_hold_up_who_asks():
    release = threading.Event()
    result = Scorer({"it": Entry(Pixel(lambda images: release.wait(60)), Calls())}).start(IMAGES, RECORDS)
    release.set()  # reached only since `start` did not wait
    assert result().values["it"].tolist() == list(range(8))


def test_what_computes_on_the_mesh_is_called_when_its_scores_are_wanted():
    threads = []

    class OnMesh(Pixel):
        on_mesh = True

    reward = OnMesh(lambda images: threads.append(threading.current_thread()))
    result = Scorer({"it": Entry(reward, Calls())}).start(IMAGES, RECORDS)
    assert not threads
    assert result().values["it"].tolist() == list(range(8)) and threads == [threading.main_thread()]


def test_entries_of_a_configuration(monkeypatch):
    monkeypatch.setitem(REWARDS, "pixel", Pixel)
    entries = make_entries(
        {"a": {"kind": "pixel", "weight": 0.5, "datasets": ("b",), "retries": 3}, "pixel": {"normalize": "group"}}
    )
    assert entries["a"].weight == 0.5 and entries["a"].calls == Calls(retries=3) and entries["pixel"].weight == 1
    wrong = {
        "does not exist": {"kind": "pixle"},
        "does not take these options": {"kind": "pixel", "colour": 1},
        "normalize is 'grup'": {"kind": "pixel", "normalize": "grup"},
        "concurrency is 0": {"kind": "pixel", "concurrency": 0},
        r"write \('b',\)": {"kind": "pixel", "datasets": "b"},
    }
    for sentence, fields in wrong.items():
        with pytest.raises(ValueError, match=f"rewards.x: .*{sentence}"):
            make_entries({"x": fields})
