"""Training data from a judge: what is made once, asked once, paid for, and never written as 0."""

import dataclasses
import json
import types

import numpy as np
import pytest
from PIL import Image

from unipic2_jax.data.labelled_edits import LabelledEdits as Data
from unipic2_jax.data.prompts import UNREAD, PromptRecord
from unipic2_jax.pipelines.label_edits import Budget, EditLabels, Variety
from unipic2_jax.rewards.base import Calls, Reward, RewardError, Scores
from unipic2_jax.rewards.scoring import Entry, Scorer
from unipic2_jax.shapes.rewards import ShapesEditReward

VARIETY = Variety(
    prompts=6, samples=2, steps=(2, 3), guidance=(1.0,), mismatched=0.3, unedited=0.2, batch=4, heldout=0.4, at_once=1
)
SETTINGS = {"model": "toy"}
UNLIMITED = Budget()


class Source:
    """A picture of its own for every prompt."""

    def batch(self, step, count):
        numbers = range(step * count, (step + 1) * count)
        picture = lambda n: np.full((8, 8, 3), n, np.uint8)
        return [PromptRecord(f"edit {n}", picture(n), {"number": n}) for n in numbers]


class Pipe:
    """An editor that counts its pictures; they depend on prompt, seed and steps."""

    bundle = types.SimpleNamespace(default_size=8, patch_pixels=8)

    def __init__(self, same=False):
        self.made, self.same = 0, same

    def __call__(self, prompts, *, image, num_inference_steps, guidance_scale, seed, batch_size):
        self.made += len(prompts)
        assert all(len(row) == 1 for row in image)
        level = lambda text, s: 7 if self.same else (int(text.split()[1]) * 31 + s * 7 + num_inference_steps) % 256
        made = [Image.new("RGB", (8, 8), (level(p, s), 0, 255)) for p, s in zip(prompts, seed)]
        return types.SimpleNamespace(images=made)


class Judge(Reward):
    """Brightness of the red; `trouble` comes before an answer."""

    calls = Calls(batch_size=1)
    counts = True  # its tokens

    def __init__(self, trouble=None):
        self.asked, self.trouble = [], trouble

    @property
    def usage(self):
        count = len(self.asked) * self.counts
        return types.SimpleNamespace(answers=len(self.asked), prompt_tokens=1000 * count, completion_tokens=100 * count)

    def score(self, images, records):
        if self.trouble:
            self.trouble(len(self.asked), records[0])
        self.asked += [(record.prompt, image.tobytes()) for record, image in zip(records, images)]
        values = np.array([image[0, 0, 0] / 255 for image in images], float)
        return Scores(values, {"instruction": values**2, "quality": 1 - values})


def run(out, judge=None, pipe=None, variety=VARIETY, budget=UNLIMITED, source=None):
    judge, edits = judge or Judge(), EditLabels(out, SETTINGS)
    counts = edits.run(
        pipe or Pipe(), source or Source(), Scorer({"judge": Entry(judge, judge.calls)}), variety, budget
    )
    return counts, judge, edits


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_edits_are_made_and_marked(tmp_path):
    counts, judge, _ = run(tmp_path)
    assert counts["made"] == 12 and counts["scored"] == 12 - counts["duplicates"] == len(judge.asked)
    assert counts["failed"] == counts["unasked"] == 0
    rows = lines(tmp_path / "scored.jsonl")
    hows = [row["how"] for row in lines(tmp_path / "made.jsonl")]
    assert any("unedited" in how for how in hows) and {how.get("steps") for how in hows} >= {2, 3}
    prompts = [f"edit {n // 2}" for n in range(12)]
    assert any(how.get("for", prompt) != prompt for how, prompt in zip(hows, prompts))
    for row in rows:
        red = np.asarray(Image.open(tmp_path / row["image"]))[0, 0, 0] / 255
        assert row["marks"] == {"score": red, "instruction": red**2, "quality": 1 - red}
    sources = {}
    for split in ("train", "heldout"):
        data = Data(tmp_path / split, ("score", "instruction", "quality"))
        examples = [data[i] for i in range(len(data))]
        sources[split] = {example.references[0] for example in examples}
        by_key = {row["key"]: row for row in rows}
        for example in examples:
            row = by_key.pop(example.name)
            assert example.prompt == row["prompt"] and example.image == (tmp_path / row["image"]).read_bytes()
            assert float(example.arrays["score"].item()) == np.float32(row["marks"]["score"])
    assert sources["train"] and sources["heldout"] and not sources["train"] & sources["heldout"]


def test_a_picture_that_cannot_be_read_is_left_out_until_it_can(tmp_path, monkeypatch):
    class Broken(Source):
        def batch(self, step, count):
            records = super().batch(step, count)
            lost = lambda record: dataclasses.replace(record, image=UNREAD, error="Its picture is gone.")
            return [lost(record) if record.metadata["number"] == 1 else record for record in records]

    said = []
    monkeypatch.setattr("tqdm.tqdm.write", said.append)
    counts, judge, _ = run(tmp_path / "parts", source=Broken())
    assert (counts["made"], counts["unasked"]) == (10, 2) and "edit 1" not in [prompt for prompt, _ in judge.asked]
    assert said == ["No edits are made of a picture: Its picture is gone."]
    counts, *_ = run(tmp_path / "parts")
    assert counts["made"] == 12 and counts["unasked"] == 0
    run(tmp_path / "whole")
    by_number = lambda name: sorted((row["number"], row["key"]) for row in lines(tmp_path / name / "made.jsonl"))
    assert by_number("parts") == by_number("whole")


@pytest.mark.parametrize("call", [0, 3, 9])
def test_a_killed_run_goes_on(tmp_path, call):
    def kill(number, record):
        if number == call:
            raise KeyboardInterrupt

    run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", Judge(kill))
    for name in ("made.jsonl", "scores.jsonl"):  # as if it had been in the middle of a line
        if (tmp_path / "killed" / name).is_file():
            with open(tmp_path / "killed" / name, "a") as file:
                file.write('{"number": 99, "ke')
    counts, judge, _ = run(tmp_path / "killed", pipe=(pipe := Pipe()))
    assert counts["scored"] == 12 - counts["duplicates"] and len(set(judge.asked)) == len(judge.asked)
    for name in ("made.jsonl", "scored.jsonl"):
        assert lines(tmp_path / "killed" / name) == lines(tmp_path / "whole" / name)
    again, judge, _ = run(tmp_path / "killed", pipe=(idle := Pipe()))
    assert again == counts and not judge.asked and idle.made == 0 and pipe.made <= 12


def test_a_failure_is_left_out_and_asked_again(tmp_path):
    def fail(number, record):
        if record.metadata["number"] == 2:
            raise RewardError("The judge is out for lunch.")

    counts, _, _ = run(tmp_path, Judge(fail))
    about = [row["key"] for row in lines(tmp_path / "made.jsonl") if row["prompt"] == "edit 2"]
    assert counts["failed"] == len(set(about)) > 0
    assert not {row["key"] for row in lines(tmp_path / "scores.jsonl")} & set(about)
    counts, judge, _ = run(tmp_path)
    assert counts["failed"] == 0 and len(judge.asked) == len(set(about))
    assert {row["key"] for row in lines(tmp_path / "scored.jsonl")} >= set(about)


def test_the_same_edit_is_asked_about_once(tmp_path):
    counts, judge, _ = run(tmp_path, pipe=Pipe(same=True), variety=dataclasses.replace(VARIETY, unedited=0.0))
    assert counts == {"made": 12, "duplicates": 6, "scored": 6, "failed": 0, "unasked": 0} and len(judge.asked) == 6


def test_the_budget_is_kept_over_all_runs(tmp_path):
    counts, judge, edits = run(tmp_path / "calls", budget=Budget(calls=5))
    assert len(judge.asked) == 5 == counts["scored"] and counts["unasked"] > 0
    assert edits.spent == {"calls": 5, "prompt_tokens": 5000, "completion_tokens": 500}
    _, judge, _ = run(tmp_path / "calls", budget=Budget(calls=5))
    assert not judge.asked
    counts, judge, _ = run(tmp_path / "calls", budget=Budget(calls=7))
    assert len(judge.asked) == 2 and counts["scored"] == 7
    # An edit costs 1000 * 2 + 100 * 10 millionths; the price is known after the first batch of eight.
    priced = Budget(cost=0.031, prompt_price=2.0, completion_price=10.0)
    _, judge, edits = run(tmp_path / "cost", budget=priced)
    assert len(judge.asked) == 10 and priced.price(edits.spent) == pytest.approx(0.03)
    silent, untold = Judge(), ShapesEditReward()
    silent.counts = False
    with pytest.raises(ValueError, match="do not say how many tokens they cost, so a largest cost cannot be kept"):
        run(tmp_path / "silent", silent, budget=priced)
    with pytest.raises(ValueError, match="counts no tokens, so a largest cost cannot be kept; limit its calls"):
        run(tmp_path / "untold", untold, budget=priced)


def test_what_a_budget_leaves_unmade_is_unasked_too(tmp_path):
    counts, judge, _ = run(tmp_path, budget=Budget(calls=8))
    assert counts["made"] < 12 and counts["unasked"] == 12 - len(judge.asked)


def test_more_prompts_may_be_asked_for_later(tmp_path):
    run(tmp_path, variety=dataclasses.replace(VARIETY, prompts=3))
    counts, _, _ = run(tmp_path)
    assert counts["made"] == 12


def test_what_cannot_be_is_said(tmp_path):
    run(tmp_path / "a")
    with pytest.raises(ValueError, match="holds edits with model 'toy', which is 'real' now"):
        EditLabels(tmp_path / "a", {"model": "real"})
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "holiday.txt").touch()
    with pytest.raises(ValueError, match="holds other files already"):
        EditLabels(tmp_path / "b", SETTINGS)
    with pytest.raises(ValueError, match="must be parts of all edits"):
        Variety(prompts=1, mismatched=0.7, unedited=0.7)
    with pytest.raises(ValueError, match="needs the prices of a million tokens"):
        Budget(cost=1.0)

    class Drawings(Source):
        def batch(self, step, count):
            return [PromptRecord("a red circle")] * count

    judge = Judge()
    with pytest.raises(ValueError, match="'a red circle' comes without a picture to edit"):
        edits = EditLabels(tmp_path / "c", SETTINGS)
        edits.run(Pipe(), Drawings(), Scorer({"judge": Entry(judge, judge.calls)}), VARIETY)
