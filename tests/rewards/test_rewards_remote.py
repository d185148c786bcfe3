"""The client of reward servers against servers that misbehave, and the pickle dialect, which must never run what it is sent."""

import collections
import decimal
import json
import os
import pickle

import numpy as np
import pytest
from scripted_http import cut, hang, reply, scripted

from unipic2_jax.data.prompts import PromptRecord
from unipic2_jax.rewards.base import RewardError, make_reward
from unipic2_jax.rewards.remote import flow_grpo_dialect as flow_grpo
from unipic2_jax.rewards.scoring import Scorer, check_tasks, make_entries

PICTURES = list(np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), np.uint8))
RECORDS = [PromptRecord("a red circle", None, {"tag": "colors"})] * 2
GOOD = {"scores": [0.5, None], "details": {"correct": [1, None]}, "errors": {"1": "It is dark."}}


def test_scores_details_and_errors_come_back():
    with scripted(reply(GOOD)) as server:
        scores = make_reward("remote", url=server.url + "/").score(PICTURES, RECORDS)
        path, _, body = server.requests[0]
    np.testing.assert_equal(scores.values, [0.5, np.nan])
    np.testing.assert_equal(scores.details["correct"], [1, np.nan])
    assert scores.errors == {1: "It is dark."} and path == "/score"
    sent = json.loads(body)
    assert sent["prompts"] == ["a red circle"] * 2 and sent["sources"] == [None, None]
    assert sent["metadata"] == [{"tag": "colors"}] * 2


@pytest.mark.parametrize(
    "answer, sentence",
    [
        ([0.5, 0.5], "sent no scores"),
        ({}, "sent no scores"),
        ({"scores": [0.5]}, "sent 1 scores for 2 pictures"),
        ({"scores": [0.5] * 3}, "sent 3 scores for 2 pictures"),
        ({"scores": 0.5}, "sent no list of scores for 2"),
        ({"scores": [0.5, "NaN"]}, 'scores with "NaN", which is no number'),
        ({"scores": [0.5, True]}, "scores with true, which is no number"),
        ('{"scores": [0.5, 1e999]}', "scores with Infinity, which is no number"),
        ('{"scores": [0.5, NaN]}', "holds NaN"),
        ({"scores": [0.5, 0.5], "details": {"correct": [1]}}, "sent 1 details 'correct' for 2 pictures"),
        ({"scores": [0.5, 0.5], "details": [1]}, "no object"),
        ({"scores": [0.5, None], "errors": {"2": "late"}}, "belongs to none of the 2 pictures"),
        ({"scores": [0.5, None], "errors": {"1": 7}}, "belongs to none"),
        ({"scores": [None, None], "errors": {"0": "No disk.", "1": "No disk."}}, "^No disk.$"),
    ],
)
def test_an_answer_that_is_none_is_a_sentence(answer, sentence):
    with scripted(reply(answer)) as server, pytest.raises(RewardError, match=sentence) as caught:
        make_reward("remote", url=server.url).score(PICTURES, RECORDS)
    assert "\n" not in str(caught.value)


def test_the_scorer_goes_on_after_faults():
    faults = [reply("no", 500), reply("<html>", kind="text/html"), cut, hang(1), reply({"scores": [1]})]
    with scripted(*faults, reply(GOOD)) as server:
        fields = {"url": server.url, "request_timeout": 0.3, "retries": 5, "backoff": 0.01}
        scored = Scorer(make_entries({"remote": fields})).score(PICTURES, RECORDS)
        assert len(server.requests) == 6
    np.testing.assert_equal(scored.values["remote"], [0.5, np.nan])
    assert scored.errors["remote"] == {1: "It is dark."}


def test_the_breaker_opens_when_the_server_is_away():
    with scripted(reply("no", 500)) as server:
        fields = {"url": server.url, "batch_size": 1, "concurrency": 1, "retries": 1, "backoff": 0.01, "breaker": 2}
        scored = Scorer(make_entries({"remote": fields})).score(PICTURES * 3, RECORDS * 3)
        assert len(server.requests) == 4
    assert "status 500" in scored.errors["remote"][0] and "left alone" in scored.errors["remote"][5]


def test_options_that_are_wrong():
    made = make_reward("remote", url="http://a")
    assert made.endpoint.timeout < made.calls.timeout
    for options, sentence in (
        ({"url": "localhost"}, "give one like http"),
        ({"url": "http://a", "dialect": "soap"}, "use one of json, flow_grpo"),
        ({"url": "http://a", "api_key_env": "NOT_SET"}, "NOT_SET, which is not set"),
    ):
        with pytest.raises(ValueError, match=sentence):
            make_reward("remote", **options)


GENEVAL = {
    "scores": [0.75, 1.0],
    "rewards": [0.0, 0.0],
    "strict_rewards": [0.0, 1.0],
    "group_rewards": {"single_object": [-10.0, 1.0]},
    "group_strict_rewards": {"single_object": [-10.0, 1.0]},
}


@pytest.mark.parametrize("only_strict", [True, False])
def test_a_geneval_server_of_flow_grpo(only_strict):
    with scripted(reply(pickle.dumps(GENEVAL), kind="text/html; charset=utf-8")) as server:
        reward = make_reward("remote", url=server.url, dialect="flow_grpo", only_strict=only_strict)
        scores = reward.score(PICTURES, RECORDS)
        path, _, body = server.requests[0]
    assert scores.values.tolist() == [0.75, 1.0] and scores.details["strict_accuracy"].tolist() == [0.0, 1.0]
    assert ("accuracy" in scores.details) is not only_strict
    sent = pickle.loads(body)  # our own
    assert path == "/" and sent["only_strict"] is only_strict and sent["prompts"] == ["a red circle"] * 2
    assert sent["meta_datas"] == [{"prompt": "a red circle", "tag": "colors"}] * 2
    assert [image[:3] for image in sent["images"]] == [b"\xff\xd8\xff"] * 2


@pytest.mark.parametrize(
    ("url", "metadata", "sound"),
    [
        ("http://host:18085", {"tag": "colors"}, True),
        ("http://host:18085", {}, False),
        ("http://host:18085", {"tag": 3}, False),
        ("http://host:18086", {}, True),  # DeQA reads no metadata
        ("http://host:9000", {"include": [{"class": "circle", "count": 1}]}, False),
        ("http://host:9000", {"include": [{"class": "circle", "count": 1}], "tag": "single_object"}, True),
    ],
)
def test_records_without_a_tag_are_refused_before_a_run(url, metadata, sound):
    class Source:
        def batch(self, step, count):
            raise AssertionError

        def tasks(self):
            yield "prompts.jsonl, line 3", PromptRecord("a red circle", metadata=metadata)

    entries = make_entries({"geneval": {"kind": "remote", "url": url, "dialect": "flow_grpo"}})
    if sound:
        check_tasks(entries, Source())
        return
    with pytest.raises(
        ValueError, match=r"rewards\.geneval: prompts\.jsonl, line 3: The prompt 'a red circle' has no 'tag'"
    ):
        check_tasks(entries, Source())
    # Other dialects ask for none.
    check_tasks(make_entries({"ours": {"kind": "remote", "url": url}}), Source())


@pytest.mark.parametrize("protocol", [3, 4, 5])
@pytest.mark.parametrize(
    "outputs",
    [
        [0.25, 1],
        (np.float32(0.25), np.int64(1)),
        np.array([0.25, 1.0]),
        np.array([0.25, 1.0], ">f4"),
        np.array([[0.25, 0], [1, 0]])[:, 0],
        [np.float64(0.25), np.bool_(True)],
    ],
    ids=str,
)
def test_other_servers_of_flow_grpo_and_numpy_s_numbers(outputs, protocol):
    content = pickle.dumps({"outputs": outputs}, protocol)
    if protocol == 3:  # as NumPy 1 wrote it
        content = content.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    with scripted(reply(content)) as server:
        reward = make_reward("remote", url=server.url, dialect="flow_grpo")
        assert reward.score(PICTURES, RECORDS).values.tolist() == [0.25, 1.0]


class Runs:
    """Unpickling it runs a command."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.system, (f"touch {self.file}",)


def test_a_pickle_that_runs_a_command_runs_nothing(tmp_path):
    file = tmp_path / "owned"
    evil = pickle.dumps({"scores": [1.0, 1.0], "more": Runs(file)})
    with scripted(reply(evil)) as server:
        reward = make_reward("remote", url=server.url, dialect="flow_grpo")
        with pytest.raises(RewardError, match=r"asks for posix\.system, which is not allowed"):
            reward.score(PICTURES, RECORDS)
    assert not file.exists()
    pickle.loads(evil)  # what it would have done
    assert file.exists()


@pytest.mark.parametrize(
    "content",
    [
        pickle.dumps(collections.OrderedDict(a=1)),
        pickle.dumps(decimal.Decimal(1)),
        pickle.dumps(print),
        pickle.dumps(np.array([None, 1], object)),
        pickle.dumps(np.array(["a"])),
        pickle.dumps(np.zeros(1, [("a", "f8")])),
        pickle.dumps(np.random.default_rng(0)),
        b"cbuiltins\neval\n(V1+1\ntR.",
        b"cnumpy\nfromfile\n(V/etc/hostname\ntR.",
        b"cnumpy\nndarray.tofile\n.",
        b"\x80\x04\x8c\x05numpy\x8c\x0fndarray.tofile\x93.",
        b"\x80\x02P1\n.",
    ],
)
def test_other_pickles_are_refused(content):
    with pytest.raises(ValueError, match=r"not allowed|sent no pickle"):
        flow_grpo.loads(content)


@pytest.mark.parametrize(
    "content, sentence",
    [
        (b"<html>Traceback", "sent no pickle"),
        (b"", "sent no pickle"),
        (pickle.dumps(GENEVAL)[:-9], "sent no pickle"),
        (pickle.dumps([1.0, 1.0]), "sent no dictionary"),
        (pickle.dumps({"response": [1, 1]}), "sent no list of outputs for 2"),
        (pickle.dumps({"scores": [1.0]}), "sent 1 scores for 2"),
        (pickle.dumps({"scores": np.zeros((2, 2))}), "sent no list of scores"),
        (pickle.dumps({"scores": [1.0, float("nan")]}), "scores with nan, which is no finite number"),
        (pickle.dumps({"outputs": ["4", "5"]}), "outputs with '4'"),
        (pickle.dumps({"outputs": [[[]], 1]}), "outputs with list"),
        # An array that was made without its constructor.
        (b"\x80\x04}\x8c\x06scores\x8c\x05numpy\x8c\x07ndarray\x93)\x81s.", "sent 0 scores for 2"),
    ],
)
def test_a_pickle_without_scores_is_a_sentence(content, sentence):
    with scripted(reply(content)) as server, pytest.raises(RewardError, match=sentence):
        make_reward("remote", url=server.url, dialect="flow_grpo").score(PICTURES, RECORDS)
