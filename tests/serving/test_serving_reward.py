"""Rewards behind our own server: the scores of the reward in this process, and requests that are not what they should be."""

import base64
import io
import time

import numpy as np
import pytest
import requests
from PIL import Image

from unipic2_jax.data.prompts import PromptRecord, make_source
from unipic2_jax.rewards import base
from unipic2_jax.rewards.base import Calls, Reward, RewardError, Scores, make_reward
from unipic2_jax.rewards.scoring import Scorer, make_entries
from unipic2_jax.serving.reward import make_server
from unipic2_jax.shapes.world import Scene, render


def png(picture=None):
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((48, 48, 3), np.uint8) if picture is None else picture).save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def request(**fields):
    return {"images": [png()], "prompts": ["p"], "sources": [None], "metadata": [{}], **fields}


@pytest.mark.parametrize("task", ["t2i", "edit"])
def test_a_served_reward_gives_exactly_the_scores_of_the_reward(task):
    records = make_source({"kind": "shapes", "task": task}, 0).batch(0, 12)
    others = make_source({"kind": "shapes", "task": task}, 1).batch(0, 12)
    scene = Scene("white", ())
    pictures = [
        render(scene) if task == "t2i" or i % 3 == 0 else (r.image, o.image)[i % 2]
        for i, (r, o) in enumerate(zip(records, others))
    ]
    noise = np.random.default_rng(0).integers(-9, 10, (12, *pictures[0].shape))
    pictures = [np.clip(picture + own, 0, 255).astype(np.uint8) for picture, own in zip(pictures, noise)]
    own = make_reward(f"shapes_{task}", strict_weight=0.3).score(pictures, records)
    assert len(set(own.values)) > 1
    with make_server(f"shapes_{task}", {"strict_weight": 0.3}).running() as server:
        entries = make_entries({"remote": {"url": server.url, "batch_size": 5, "weight": 0.5}})
        scored = Scorer(entries).score(pictures, records)
    assert not scored.errors["remote"]
    np.testing.assert_array_equal(scored.values["remote"], own.values)
    assert scored.details["remote"].keys() == own.details.keys()
    for name, column in own.details.items():
        np.testing.assert_array_equal(scored.details["remote"][name], column)


@pytest.mark.parametrize(
    "body, sentence",
    [
        ([], "no JSON object"),
        (request(more=1), "field 'more' is unknown"),
        ({"images": [png()]}, "no list 'prompts'"),
        (request(images=[], prompts=[], sources=[], metadata=[]), "no images"),
        (request(prompts=["a", "b"]), "1 images and 2 prompts"),
        (request(prompts=["\ud83d"]), "half a character in entry 0 of prompts"),
        (request(prompts=[7]), "Entry 0 of prompts is no text"),
        (request(metadata=[None]), "Entry 0 of metadata is no object"),
        (request(images=[None]), "Entry 0 of images is no text"),
        (request(images=["***"]), "Entry 0 of images is not base64"),
        (request(images=["é"]), "Entry 0 of images is not base64"),
        (request(images=[base64.b64encode(b"GIF").decode()]), "of entry 0 of images cannot be decoded"),
        (request(images=[png()[:80]]), "entry 0 of images cannot be decoded"),
        (request(images=[png(np.zeros((4097, 4097, 3), np.uint8))]), "larger than the limit"),
        (request(sources=[[1]]), "Entry 0 of sources is no text"),
        (request(sources=[""]), "of entry 0 of sources is empty"),
    ],
)
def test_a_request_that_is_wrong_is_refused_with_a_sentence(body, sentence):
    with make_server("shapes_t2i", {}).running() as server:
        answer = requests.post(f"{server.url}/score", json=body, timeout=20)
    assert answer.status_code == 400, answer.text
    assert sentence in answer.json()["error"]["message"]


def test_health_says_what_is_served():
    with make_server("shapes_edit", {}).running() as server:
        found = requests.get(f"{server.url}/health", timeout=5).json()
    assert found == {"status": "ok", "reward": "shapes_edit", "groupwise": False}


class Ranks(Reward):
    """The place of a picture in its group by brightness; 'dark' prompts cannot be ranked at first."""

    groupwise = True
    calls = Calls(retries=1, backoff=0.01)

    def __init__(self):
        self.tries = 0

    def score(self, images, records):
        assert len({record.key for record in records}) == 1
        self.tries += 1
        if "dark" in records[0].prompt and self.tries < 3:
            raise RewardError("It is too dark.")
        return Scores(np.argsort(np.argsort([image.mean() for image in images])).astype(float), {})


class Broken(Reward):
    def score(self, images, records):
        raise KeyError("source")


@pytest.fixture
def rewards(monkeypatch):
    monkeypatch.setitem(base.REWARDS, "ranks", Ranks)
    monkeypatch.setitem(base.REWARDS, "broken", Broken)


def test_groups_stay_together(rewards):
    pictures = [np.full((8, 8, 3), value, np.uint8) for value in (9, 3, 5, 1, 7)]
    records = [PromptRecord("a")] * 3 + [PromptRecord("b")] * 2
    with make_server("ranks", {}).running() as server:
        entries = make_entries({"remote": {"url": server.url, "groupwise": True}})
        assert Scorer(entries).score(pictures, records).values["remote"].tolist() == [2, 0, 1, 0, 1]
        with pytest.raises(RewardError, match="compares the pictures of one prompt"):
            make_reward("remote", url=server.url).score(pictures, records)


def test_a_served_reward_s_failures_are_tried_again_there_and_here(rewards):
    pictures, records = [np.zeros((8, 8, 3), np.uint8)] * 2, [PromptRecord("dark")] * 2
    with make_server("ranks", {}).running() as server:
        once = make_reward("remote", url=server.url, groupwise=True)
        with pytest.raises(RewardError, match="too dark"):  # twice there
            once.score(pictures, records)
        assert once.score(pictures, records).values.tolist() == [0, 1]


def test_a_mistake_of_the_reward_is_a_500_and_the_server_goes_on(rewards, capfd):
    with make_server("broken", {}).running() as server:
        for _ in range(2):
            with pytest.raises(RewardError, match=r"status 500: 'The server failed \(KeyError: 'source'\)"):
                make_reward("remote", url=server.url).score([np.zeros((8, 8, 3), np.uint8)], [PromptRecord("a")])
    assert "Traceback" in capfd.readouterr().err


def test_options_of_a_stage_are_not_a_server_s():
    for kind, options, sentence in (
        ("shapes_t2i", {"weight": 2}, "'weight' belongs to a stage"),
        ("shapes_t2i", {"taste": 2}, "does not take these options"),
        ("shapes_t2i", [1], "give an object"),
        ("beauty", {}, "does not exist"),
    ):
        with pytest.raises(ValueError, match=sentence):
            make_server(kind, options)
    with make_server("shapes_t2i", {}).running() as server, pytest.raises(OSError, match="choose another host or port"):
        make_server("shapes_t2i", {}, port=server.server_address[1])


def test_a_run_outlives_the_server_it_asks():
    """The server goes away, and comes back at the same address."""
    records = make_source({"kind": "shapes", "task": "t2i"}, 0).batch(0, 4)
    pictures = [render(Scene("white", ()))] * 4
    with make_server("shapes_t2i", {}).running() as server:
        port = server.server_address[1]
        entries = make_entries({"remote": {"url": server.url, "retries": 8, "backoff": 0.2, "batch_size": 2}})
        before = Scorer(entries).score(pictures, records)
    waiting = Scorer(entries).start(pictures, records)
    time.sleep(0.3)  # the first tries fail
    with make_server("shapes_t2i", {}, port=port).running():
        after = waiting()
    assert not after.errors["remote"]
    np.testing.assert_array_equal(after.values["remote"], before.values["remote"])
