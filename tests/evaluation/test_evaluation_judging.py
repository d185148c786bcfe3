"""A judge that is asked about many items, over real HTTP: what failed is no number, what was answered is not paid for again."""

import json
import re

import numpy as np
import pytest
from scripted_http import reply, scripted

from unipic2_jax.evaluation.judging import Judge, Question

USAGE = {"prompt_tokens": 1000, "completion_tokens": 100}
PICTURE = np.zeros((28, 56, 3), np.uint8)


def says(text):
    return reply({"choices": [{"message": {"content": text}}], "usage": USAGE})


def read(answer):
    if found := re.fullmatch(r"mark (\d)", answer):
        return int(found[1])
    raise ValueError(f"The judge's answer '{answer}' has no mark.")


def questions(count):
    return [Question(str(number), [f"question {number}", PICTURE]) for number in range(count)]


def judge(server, **options):
    return Judge(server.url, "scripted", api_key_env="", retries=0, concurrency=1, **options)


def test_failures_are_errors_and_only_they_are_asked_again(tmp_path):
    with scripted(says("mark 4"), says("It is fine."), reply("no", status=500), says("mark 2")) as server:
        first = list(judge(server, cache=str(tmp_path)).ask(questions(4), read))
        assert [verdict.value for verdict in first] == [4, None, None, 2]
        assert "has no mark" in first[1].error and "status 500" in first[2].error and first[1].answer == "It is fine."
        again = judge(server, cache=str(tmp_path))
        assert [verdict.value for verdict in again.ask(questions(4), read)] == [4, 2, 2, 2]
        assert len(server.requests) == 6 and (again.usage.answers, again.usage.cached) == (2, 2)
        sent = json.loads(server.requests[0][2])
        assert [part["type"] for part in sent["messages"][0]["content"]] == ["text", "image_url"]
        # Another picture, another text and another judge are other questions.
        for other in (
            Question("0", ["question 0", PICTURE + 1]),
            Question("0", ["question 0", PICTURE], system="Be strict."),
        ):
            assert again.estimate([other]).calls == 1
        assert again.estimate(questions(5)).calls == 1 and again.estimate(questions(5)).kept == 4
        assert Judge(server.url, "another", api_key_env="", cache=str(tmp_path)).estimate(questions(4)).calls == 4


def test_the_cost_is_told_before_and_held_to():
    with scripted(says("mark 1")) as server:
        prices = {"prompt_price": 1000.0, "completion_price": 10000.0}  # an answer costs 1 + 1
        asked = judge(server, max_cost=3.0, request={"max_tokens": 100}, **prices)
        estimate = asked.estimate(questions(8))
        assert (estimate.calls, estimate.completion_tokens, estimate.prompt_tokens) == (8, 800, 8 * (3 + 2))
        assert estimate.cost == pytest.approx(8 * (0.005 + 1))
        with pytest.raises(ValueError, match=r"8 calls .* max_cost is 3"):
            asked.check(estimate)
        assert not server.requests
        found = list(asked.ask(questions(4), read))
        assert [verdict.value for verdict in found] == [1, 1, None, None] and "is spent" in found[3].error
        with pytest.raises(ValueError, match="prices"):
            judge(server, max_cost=3.0)


def test_many_threads_keep_the_order_and_questions_are_made_as_they_are_asked():
    made = []

    def lazily():
        for question in questions(60):
            made.append(question.key)
            yield question

    with scripted(says("mark 3")) as server:
        asked = Judge(server.url, "scripted", api_key_env="", concurrency=4).ask(lazily(), read)
        assert next(asked).key == "0" and len(made) <= 4 * 4
        assert [verdict.key for verdict in asked] == [str(number) for number in range(1, 60)]


def test_bad_options():
    for options, sentence in (
        ({"concurrency": 0}, "concurrency is 0"),
        ({"retries": -1}, "retries is -1"),
        ({"request": {"model": "x"}}, "cannot have the field 'model'"),
    ):
        with pytest.raises(ValueError, match=sentence):
            Judge("http://localhost:1", "x", api_key_env="", **options)
