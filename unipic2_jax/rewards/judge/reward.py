"""A judge: any model that sees, behind an OpenAI-compatible chat endpoint, marks what was edited or drawn."""

from __future__ import annotations

import dataclasses
import json
import os
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from unipic2_jax.core.strict import excerpt
from unipic2_jax.data.prompts import PromptRecord
from unipic2_jax.rewards.base import REWARDS, Calls, Reward, RewardError, Scores
from unipic2_jax.rewards.judge.cache import AnswerCache, question_key
from unipic2_jax.rewards.judge.prompts import VERSION, messages, read_marks, read_template, to_scores
from unipic2_jax.rewards.remote.request import Endpoint, encode_picture, to_base64

# Fields of every request; a judge that thinks needs more room, and some want other names.
REQUEST = {"temperature": 0.0, "max_tokens": 1024}


@dataclasses.dataclass(frozen=True)
class Usage:
    """What has been asked so far.

    Attributes:
      answers: paid ones, those that were no marks too.
      cached: that came from the cache.
      prompt_tokens, completion_tokens: as the endpoint counted them; none where it does not.
    """

    answers: int = 0
    cached: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    @property
    def tokens(self) -> int:
        """Both kinds together."""
        return self.prompt_tokens + self.completion_tokens

    def __add__(self, other: Usage) -> Usage:
        return Usage(*(mine + theirs for mine, theirs in zip(dataclasses.astuple(self), dataclasses.astuple(other))))


class Pace:
    """Lets so many a minute begin, evenly spread, whichever thread they come from; 0: any number."""

    def __init__(self, per_minute: float):
        self.seconds = 60 / per_minute if per_minute else 0.0
        self._lock, self._next = threading.Lock(), 0.0

    def wait(self) -> None:
        """Until it is this one's turn."""
        with self._lock:
            turn = max(self._next, time.monotonic())
            self._next = turn + self.seconds
        time.sleep(max(0.0, turn - time.monotonic()))


@REWARDS.register("judge")
class JudgeReward(Reward):
    """Marks of a judge as a score in [0, 1]; edits by four aspects, drawings by three (`judge_prompts`).

    Details: the aspects, 'instruction' and 'quality' in [0, 1], and 'tokens' that the sample cost.

    Args:
      base_url, model: of the endpoint; without them, of the environment variables OPENAI_BASE_URL and OPENAI_MODEL.
      api_key_env: the environment variable that holds the key; '': none is needed.
      groupwise: all pictures of a group in one chat, which may compare them, for a list of marks.
      template: file with a text of one's own instead of the question's beginning; '': ours.
      request: further fields of every request, instead of `REQUEST`.
      request_timeout: seconds of silence after which a request has failed.
      requests_per_minute: at most, over all threads of this process; 0: no limit.
      cache: folder that keeps answers; '': none is kept.

    Raises:
      ValueError: for an option that is missing or wrong.
    """

    transport = ("base_url", "api_key_env", "request_timeout", "requests_per_minute", "cache")

    def __init__(
        self,
        base_url: str = "",
        model: str = "",
        api_key_env: str = "OPENAI_API_KEY",
        groupwise: bool = False,
        template: str = "",
        request: Mapping[str, Any] | None = None,
        request_timeout: float = 110.0,
        requests_per_minute: float = 0.0,
        cache: str = "",
    ):
        base_url = base_url or from_environment("base_url", "OPENAI_BASE_URL")
        self.model = model or from_environment("model", "OPENAI_MODEL")
        self.endpoint = Endpoint("judge", base_url.rstrip("/") + "/chat/completions", request_timeout, api_key_env)
        self.groupwise = groupwise
        self.template = read_template(template) if template else None
        self.request = dict(REQUEST if request is None else request)
        if taken := self.request.keys() & {"model", "messages", "stream", "n"}:
            raise ValueError(f"The judge's request cannot have the field '{min(taken)}'; leave it out.")
        if requests_per_minute < 0:
            raise ValueError(f"requests_per_minute is {requests_per_minute}; use 0 or more.")
        self.pace = Pace(requests_per_minute)
        self.cache = AnswerCache(cache) if cache else None
        self._usage, self._counting = Usage(), threading.Lock()
        self.calls = Calls(batch_size=0 if groupwise else 1, concurrency=8, timeout=120, retries=4, breaker=10)
        self.request_timeout = request_timeout
        self.identity = {"model": self.model, "template": self.template.template if self.template else ""}

    @property
    def usage(self) -> Usage:
        """So far, of all threads."""
        return self._usage

    def longest_wait(self, calls: Calls, count: int) -> float:
        """Each of its requests waits for those of all other calls at most."""
        return calls.concurrency * self.pace.seconds * (1 if self.groupwise else count)

    def score(self, images: Sequence[np.ndarray], records: Sequence[PromptRecord]) -> Scores:
        parts = [list(range(len(images)))] if self.groupwise else [[i] for i in range(len(images))]
        values = np.full(len(images), np.nan)
        details: dict[str, np.ndarray] = {}
        errors: dict[int, RewardError] = {}
        for part in parts:
            try:
                marks, tokens = self._ask([images[i] for i in part], records[part[0]])
            except RewardError as error:
                errors |= dict.fromkeys(part, error)
                continue
            for i, given in zip(part, marks, strict=True):
                values[i], found = to_scores(given)
                for name, number in (found | {"tokens": tokens / len(part)}).items():
                    details.setdefault(name, np.full(len(images), np.nan))[i] = number
        if errors and len(errors) == len(images):
            raise errors[0]
        return Scores(values, details, {i: str(error) for i, error in errors.items()})

    def question(self, images: Sequence[np.ndarray], record: PromptRecord) -> dict[str, Any]:
        """The JSON that the endpoint is sent about pictures that were made for a record."""
        source = None if record.image is None else _data_url(record.image)
        asked = messages(record.prompt, [_data_url(i) for i in images], source, self.template, self.groupwise)
        return {"model": self.model, "messages": asked, **self.request}

    def _ask(self, images: Sequence[np.ndarray], record: PromptRecord) -> tuple[list[dict[str, float]], int]:
        """Marks of the pictures, and the tokens that they cost."""
        question = self.question(images, record)
        key = question_key(VERSION, question)
        answer, cost = (self.cache.get(key) if self.cache else None), Usage(cached=1)
        known = answer is not None
        if not known:
            self.pace.wait()
            response = self.endpoint.post_json(json.dumps(question).encode())
            cost = cost_of(response)
        with self._counting:
            self._usage += cost
        try:
            if not known:
                answer = content_of(response)
            marks = read_marks(answer, record.image is not None, len(images) if self.groupwise else None)
        except ValueError as error:
            raise RewardError(str(error)) from None
        if self.cache and not known:
            self.cache.put(key, answer)
        return marks, cost.tokens


def from_environment(option: str, variable: str) -> str:
    """What the environment says in place of an option of a judge.

    Raises:
      ValueError: when it says nothing.
    """
    if value := os.environ.get(variable, "").strip():
        return value
    raise ValueError(f"The judge has no {option}; give it, or set {variable}.")


def _data_url(image: np.ndarray) -> str:
    return f"data:image/png;base64,{to_base64(encode_picture(image))}"


def cost_of(response: Any) -> Usage:
    """What one answer of a chat endpoint cost."""
    counted = response.get("usage") if isinstance(response, dict) else None
    counted = counted if isinstance(counted, dict) else {}
    number = lambda name: counted[name] if type(counted.get(name)) is int and counted[name] > 0 else 0
    return Usage(1, 0, number("prompt_tokens"), number("completion_tokens"))


def content_of(response: Any) -> str:
    """The text of a chat's answer.

    Raises:
      ValueError: one sentence, when there is none.
    """
    try:
        choice = response["choices"][0]
        text = choice["message"]["content"]
    except (KeyError, IndexError, TypeError):
        raise ValueError(f"The judge's endpoint sent no chat answer: '{excerpt(json.dumps(response))}'.") from None
    if choice.get("finish_reason") == "length":
        raise ValueError("The judge's answer was cut off; raise max_tokens in the option `request`.")
    if not isinstance(text, str) or not text.strip():
        refusal = choice["message"].get("refusal")
        raise ValueError(f"The judge said nothing (refusal: '{excerpt(str(refusal))}').")
    return text
