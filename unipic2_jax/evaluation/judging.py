"""Asking a judge about many items: any model behind an OpenAI-compatible chat endpoint, with its answers kept.

A benchmark makes a `Judge` of its options (`base_url`, `model`, ...) and gives it questions and a reader of answers:

    judge = Judge(base_url=..., model=..., cache=str(out / "answers"))
    for verdict in judge.ask(questions, read):     # in the order of the questions
        verdict.value                              # what `read` made of the answer; None when `verdict.error` says why there is none

A call that fails and an answer that `read` refuses are errors, never numbers, and are not kept: asking again asks again. Answers that
were read are kept by (judge, request, texts, pictures), so that a run that was killed pays for nothing twice.
"""

from __future__ import annotations

import dataclasses
import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import tenacity

from unipic2_jax.pipelines.label_edits import Budget
from unipic2_jax.rewards.base import RewardError
from unipic2_jax.rewards.judge.cache import AnswerCache, question_key
from unipic2_jax.rewards.judge.reward import REQUEST, Pace, Usage, content_of, cost_of, from_environment
from unipic2_jax.rewards.remote.request import Endpoint, encode_picture, to_base64

# Of the form in which questions are put; another one makes all kept answers strangers.
VERSION = 1
# For the estimate alone: what a token is worth in characters, and in pixels of a picture (Qwen2.5-VL merges 28 x 28).
CHARACTERS_OF_TOKEN, PIXELS_OF_TOKEN = 4, 28 * 28
# Questions of a worker that are made ready at a time: pictures of all of them at once would not fit into memory.
AHEAD = 4


@dataclasses.dataclass(frozen=True, eq=False)
class Question:
    """One call.

    Attributes:
      key: names it for whoever asks.
      parts: what the judge is shown, in this order: texts, and pictures as uint8 [H, W, 3].
      system: a system message before it; '': none.
    """

    key: str
    parts: Sequence[str | np.ndarray]
    system: str = ""


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What came of a question.

    Attributes:
      key: of the question.
      value: what the reader made of the answer; None where there is an error.
      answer: the judge's words; '' when the call failed.
      error: one sentence.
    """

    key: str
    value: Any = None
    answer: str = ""
    error: str = ""


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What asking would take, before the first call.

    Attributes:
      calls: that are to be paid for; kept: answers that are there already.
      prompt_tokens: by `CHARACTERS_OF_TOKEN` and `PIXELS_OF_TOKEN`; completion_tokens: `max_tokens` of each call, the most.
      cost: at the judge's prices; 0 without prices.
    """

    calls: int
    kept: int
    prompt_tokens: int
    completion_tokens: int
    cost: float

    def __str__(self) -> str:
        cost = f", {self.cost:.2f} at most" if self.cost else ""
        tokens = f"about {self.prompt_tokens} tokens to read, at most {self.completion_tokens} to write"
        return f"{self.calls} calls ({self.kept} answers are kept already), {tokens}{cost}"


class Judge:
    """Any model behind an OpenAI-compatible chat endpoint.

    Args:
      base_url, model: of the endpoint; without them, of OPENAI_BASE_URL and OPENAI_MODEL.
      api_key_env: the environment variable that holds the key; '': none is needed.
      request: further fields of every request, instead of `rewards.judge.reward.REQUEST`.
      cache: folder that keeps answers; '': none is kept.
      concurrency: calls at a time.
      retries: further tries of a call that failed, with growing pauses; an answer that cannot be read has none.
      request_timeout: seconds of silence after which a call has failed.
      requests_per_minute: at most; 0: no limit.
      max_cost: what all calls of this judge may cost, and needs the prices; 0: any. Calls that are under way may exceed it.
      prompt_price, completion_price: of a million tokens.

    Raises:
      ValueError: for an option that is missing or wrong.
    """

    def __init__(
        self,
        base_url: str = "",
        model: str = "",
        *,
        api_key_env: str = "OPENAI_API_KEY",
        request: Mapping[str, Any] | None = None,
        cache: str = "",
        concurrency: int = 8,
        retries: int = 4,
        request_timeout: float = 110.0,
        requests_per_minute: float = 0.0,
        max_cost: float = 0.0,
        prompt_price: float = 0.0,
        completion_price: float = 0.0,
    ):
        for name, value, least in (
            ("concurrency", concurrency, 1),
            ("retries", retries, 0),
            ("requests_per_minute", requests_per_minute, 0),
            ("max_cost", max_cost, 0),
            ("prompt_price", prompt_price, 0),
            ("completion_price", completion_price, 0),
        ):
            if not value >= least:
                raise ValueError(f"The judge's {name} is {value}; use {least} or more.")
        base_url = base_url or from_environment("base_url", "OPENAI_BASE_URL")
        self.model = model or from_environment("model", "OPENAI_MODEL")
        self.endpoint = Endpoint("judge", base_url.rstrip("/") + "/chat/completions", request_timeout, api_key_env)
        self.request = dict(REQUEST if request is None else request)
        if taken := self.request.keys() & {"model", "messages", "stream", "n"}:
            raise ValueError(f"The judge's request cannot have the field '{min(taken)}'; leave it out.")
        self.cache = AnswerCache(cache) if cache else None
        self.concurrency, self.retries, self.pace = concurrency, retries, Pace(requests_per_minute)
        self.budget = Budget(cost=max_cost or None, prompt_price=prompt_price, completion_price=completion_price)
        self._usage, self._counting = Usage(), threading.Lock()

    @property
    def identity(self) -> dict[str, Any]:
        """What decides its answers, for `Benchmark.digests`."""
        return {"judge": self.model, "request": self.request, "version": VERSION}

    @property
    def usage(self) -> Usage:
        """So far, of all threads."""
        return self._usage

    def estimate(self, questions: Iterator[Question] | Sequence[Question]) -> Estimate:
        """What `ask` would take for these, without a call."""
        calls = kept = tokens = 0
        for question in questions:
            if self._kept(self._asked(question)) is not None:
                kept += 1
                continue
            calls += 1
            characters = len(question.system) + sum(len(part) for part in question.parts if isinstance(part, str))
            pixels = sum(part.shape[0] * part.shape[1] for part in question.parts if not isinstance(part, str))
            tokens += -(-characters // CHARACTERS_OF_TOKEN) - (-pixels // PIXELS_OF_TOKEN)
        most = self.request.get("max_tokens", self.request.get("max_completion_tokens", 0))
        spent = {"prompt_tokens": tokens, "completion_tokens": calls * most}
        return Estimate(calls, kept, tokens, calls * most, self.budget.price(spent))

    def check(self, estimate: Estimate) -> None:
        """Whether it may cost this.

        Raises:
          ValueError: when it would be more than `max_cost`.
        """
        if self.budget.cost is not None and estimate.cost > self.budget.cost:
            raise ValueError(
                f"The judge would take {estimate}, and max_cost is {self.budget.cost:g}; raise it, or ask about fewer items "
                "with limit."
            )

    def ask(self, questions: Iterator[Question] | Sequence[Question], read: Callable[[str], Any]) -> Iterator[Verdict]:
        """Verdicts in the order of the questions, which are taken from their iterator as they are asked.

        Args:
          read: what an answer says; raises a ValueError of one sentence when it says nothing that can be used.
        """
        waiting: list[Any] = []
        with ThreadPoolExecutor(self.concurrency) as pool:
            try:
                for question in questions:
                    waiting.append(pool.submit(self._verdict, question, read))
                    if len(waiting) >= AHEAD * self.concurrency:
                        yield waiting.pop(0).result()
                while waiting:
                    yield waiting.pop(0).result()
            finally:
                for future in waiting:
                    future.cancel()

    def _verdict(self, question: Question, read: Callable[[str], Any]) -> Verdict:
        asked = self._asked(question)
        answer = ""
        try:
            known = self._kept(asked)
            answer = self._called(asked) if known is None else known
            value = read(answer)
            if known is None and self.cache:
                self.cache.put(question_key(VERSION, asked), answer)
        except (RewardError, ValueError) as error:
            return Verdict(question.key, answer=answer, error=str(error))
        if known is not None:
            self._count(Usage(cached=1))
        return Verdict(question.key, value, answer)

    def _asked(self, question: Question) -> dict[str, Any]:
        parts = [
            {"type": "text", "text": part}
            if isinstance(part, str)
            else {
                "type": "image_url",
                "image_url": {"url": f"data:image/png;base64,{to_base64(encode_picture(part))}"},
            }
            for part in question.parts
        ]
        system = [{"role": "system", "content": question.system}] if question.system else []
        return {"model": self.model, "messages": [*system, {"role": "user", "content": parts}], **self.request}

    def _kept(self, asked: Mapping[str, Any]) -> str | None:
        return self.cache.get(question_key(VERSION, asked)) if self.cache else None

    def _called(self, asked: Mapping[str, Any]) -> str:
        tries = tenacity.Retrying(
            stop=tenacity.stop_after_attempt(self.retries + 1),
            wait=_pause,
            retry=tenacity.retry_if_exception_type(RewardError),
            reraise=True,
        )
        return tries(self._call, json.dumps(asked).encode())

    def _call(self, content: bytes) -> str:
        """The words of one paid answer.

        Raises:
          RewardError: when the call failed; ValueError: when it brought no words, or max_cost is spent.
        """
        spent = {"prompt_tokens": self._usage.prompt_tokens, "completion_tokens": self._usage.completion_tokens}
        if self.budget.cost is not None and self.budget.price(spent) >= self.budget.cost:
            raise ValueError(f"max_cost={self.budget.cost:g} is spent; raise it, and the same command goes on.")
        self.pace.wait()
        response = self.endpoint.post_json(content)
        self._count(cost_of(response))
        return content_of(response)

    def _count(self, cost: Usage) -> None:
        with self._counting:
            self._usage += cost


def _pause(state: tenacity.RetryCallState) -> float:
    """Seconds before another try: what the server asked for, else growing ones."""
    error = state.outcome.exception() if state.outcome else None
    asked = getattr(error, "retry_after", None)
    return tenacity.wait_random_exponential(1, max=60)(state) if asked is None else asked
