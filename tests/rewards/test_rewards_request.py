"""Requests of rewards against servers that misbehave: each fault is one sentence, and no sentence shows a key."""

import datetime
import email.utils
import time

import pytest
from scripted_http import cut, hang, hang_up, reply, scripted, stall

from unipic2_jax.rewards.base import RewardError
from unipic2_jax.rewards.remote import request
from unipic2_jax.rewards.remote.request import Endpoint, retry_after

KEY = "sk-very-secret-123"
FAULTS = {
    "500": (reply({"error": {"message": "out of memory"}}, 500), "status 500: 'out of memory'"),
    "plain error": (reply({"error": "no such model"}, 404), "status 404: 'no such model'"),
    "HTML": (reply("<html>\n  <h1>Welcome</h1>", kind="text/html"), "text/html that is not JSON .*<html> <h1>Welcome"),
    "HTML error": (reply("<html>Bad gateway", 502, kind="text/html"), "status 502: '<html>Bad gateway'"),
    "NaN": (reply('{"scores": [NaN]}'), "holds NaN"),
    "nested": (reply("[" * 100_000), "nested too deeply"),
    "not text": (reply(b'"\xff"'), "UTF-8"),
    "redirect": (reply("", 302, {"Location": "http://elsewhere"}), "another address"),
    "hang": (hang(2), "was silent for 0.5 seconds"),
    "stall": (stall, "was silent for 0.5 seconds"),
    "cut": (cut, "broke off in the middle"),
    "hang up": (hang_up, "cannot be reached or hung up"),
    "401": (reply({"error": {"message": f"Incorrect key {KEY}"}}, 401), "set JUDGE_KEY to a valid one"),
    "cuts the key off": (reply({"error": "x" * 105 + KEY}, 400), r"x\*\*\*'"),
    "repeats the key": (reply({"error": {"message": f"{KEY} is over its limit"}}, 400), r"\*\*\* is over its limit"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_is_a_sentence_without_the_key(fault, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    step, sentence = FAULTS[fault]
    with scripted(step) as server:
        endpoint = Endpoint("judge", server.url, 0.5, "JUDGE_KEY")
        with pytest.raises(RewardError, match=sentence) as caught:
            endpoint.post_json(b"{}")
        assert server.requests[0][1]["Authorization"] == f"Bearer {KEY}"
    assert KEY not in str(caught.value) and KEY not in repr(endpoint)
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")


def test_a_key_for_the_sake_of_form_is_not_looked_for_in_answers(monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "1")
    with scripted(reply({"scores": [1, 11]})) as server:
        assert Endpoint("judge", server.url, 5, "JUDGE_KEY").post_json(b"{}") == {"scores": [1, 11]}


def test_a_server_that_is_not_there():
    with scripted(hang_up) as server:
        url = server.url
    with pytest.raises(RewardError, match=f"judge at {url} cannot be reached"):
        Endpoint("judge", url, 1).post_json(b"{}")


def test_an_answer_without_end_is_not_read_to_it(monkeypatch):
    monkeypatch.setattr(request, "MAX_ANSWER", 100_000)
    with scripted(reply("x" * 1_000_000)) as server, pytest.raises(RewardError, match="more than 100000 bytes"):
        Endpoint("judge", server.url, 5).post_json(b"{}")


@pytest.mark.parametrize("status", [429, 503])
def test_who_asks_for_time_is_given_it(status):
    with scripted(reply("later", status, {"Retry-After": "7"}), reply("later", status)) as server:
        endpoint = Endpoint("judge", server.url, 5)
        for seconds in (7.0, None):
            with pytest.raises(RewardError) as caught:
                endpoint.post_json(b"{}")
            assert caught.value.retry_after == seconds


def test_retry_after_as_seconds_and_as_date():
    assert retry_after(" 12 ") == 12
    assert retry_after(email.utils.format_datetime(_ahead(40), usegmt=True)) == pytest.approx(40, abs=5)
    assert retry_after(email.utils.format_datetime(_ahead(-40), usegmt=True)) == 0
    assert retry_after("Fri, 31 Dec 9999 23:59:59 GMT") > 1e9
    for nonsense in ("soon", "-3", "", "1e9", "9" * 40, f"Fri, 31 Dec 9999 23:59:59 -{'9' * 16}"):
        assert retry_after(nonsense) is None


def _ahead(seconds):
    return datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=seconds)


def test_a_netrc_is_not_asked_for_keys(monkeypatch, tmp_path):
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login someone password else\n")
    (tmp_path / ".netrc").chmod(0o600)
    monkeypatch.setenv("NETRC", str(tmp_path / ".netrc"))
    with scripted(reply({})) as server:
        Endpoint("judge", server.url, 5).post_json(b"{}")
        assert "Authorization" not in server.requests[0][1]


def test_what_is_wrong_with_an_endpoint_is_said_when_it_is_made(monkeypatch):
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    for arguments, sentence in (
        (("ftp://host", 5), "give one like http"),
        (("host:8000", 5), "give one like http"),
        (("http://host", 0), "more than 0 seconds"),
        (("http://host", 5, "JUDGE_KEY"), "JUDGE_KEY, which is not set"),
    ):
        with pytest.raises(ValueError, match=sentence):
            Endpoint("judge", *arguments)
    monkeypatch.setenv("JUDGE_KEY", "two\nlines")
    with pytest.raises(ValueError, match="no key") as caught:
        Endpoint("judge", "http://host", 5, "JUDGE_KEY")
    assert "lines" not in str(caught.value)


def test_a_slow_server_is_left_after_its_time():
    with scripted(hang(3)) as server:
        started = time.monotonic()
        with pytest.raises(RewardError):
            Endpoint("judge", server.url, 0.3).post_json(b"{}")
        assert time.monotonic() - started < 2
