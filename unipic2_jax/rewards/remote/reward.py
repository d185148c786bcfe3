"""A reward that is computed by a server: ours (`launch.serve_reward`), or one of the Flow-GRPO kind. Protocol: docs/rewards.md."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from unipic2_jax.core.strict import as_number, excerpt
from unipic2_jax.data.prompts import PromptRecord
from unipic2_jax.rewards.base import REWARDS, Calls, Reward, RewardError, Scores
from unipic2_jax.rewards.remote import flow_grpo_dialect as flow_grpo
from unipic2_jax.rewards.remote.request import Endpoint, encode_picture, to_base64

DIALECTS = ("json", "flow_grpo")


@REWARDS.register("remote")
class RemoteReward(Reward):
    """Asks a reward server.

    Args:
      url: its address without a path, 'http://host:port'.
      dialect: 'json', our own; 'flow_grpo', pickle over HTTP, as the reward servers of Flow-GRPO speak it.
      groupwise: the server compares the pictures of a group, which are then sent together.
      only_strict: of 'flow_grpo': GenEval servers then skip the verdict that lets extra objects pass.
      api_key_env: environment variable that holds the server's key; '': it wants none.
      request_timeout: seconds of silence after which a request has failed.

    Raises:
      ValueError: for an option that is missing or wrong.
    """

    transport = ("api_key_env", "request_timeout")

    def __init__(
        self,
        url: str = "",
        dialect: str = "json",
        groupwise: bool = False,
        only_strict: bool = True,
        api_key_env: str = "",
        request_timeout: float = 50.0,
    ):
        if dialect not in DIALECTS:
            raise ValueError(f"The dialect '{dialect}' is unknown; use one of {', '.join(DIALECTS)}.")
        path = "/score" if dialect == "json" else "/"
        self.endpoint = Endpoint("reward server", url.rstrip("/") + path, request_timeout, api_key_env)
        self.dialect, self.groupwise, self.only_strict = dialect, groupwise, only_strict
        self.request_timeout = request_timeout
        self.calls = Calls(batch_size=0 if groupwise else 16, concurrency=4, timeout=60, retries=4, breaker=10)

    def check(self, records: Sequence[PromptRecord]) -> None:
        if self.dialect == "flow_grpo":
            flow_grpo.check(records, urlsplit(self.endpoint.url).port)

    def score(self, images: Sequence[np.ndarray], records: Sequence[PromptRecord]) -> Scores:
        if self.dialect == "flow_grpo":
            return flow_grpo.ask(self.endpoint, images, records, self.only_strict)
        answer = self.endpoint.post_json(json.dumps(write_request(images, records)).encode())
        try:
            scores = read_scores(answer, len(images))
        except ValueError as error:
            raise RewardError(f"The reward server at {self.endpoint.shown} {error}.") from None
        sentences = set(scores.errors.values())
        if np.isnan(scores.values).all() and len(scores.errors) == len(images) and len(sentences) == 1:
            raise RewardError(sentences.pop())
        return scores


def write_request(images: Sequence[np.ndarray], records: Sequence[PromptRecord]) -> dict[str, Any]:
    """The JSON that a server is sent. A source that several pictures were made from is encoded once."""
    encode = lambda image: to_base64(encode_picture(image))
    sources = {id(record.image): record.image for record in records if record.image is not None}
    encoded = {place: encode(image) for place, image in sources.items()}
    return {
        "images": [encode(image) for image in images],
        "prompts": [record.prompt for record in records],
        "sources": [encoded.get(id(record.image)) for record in records],
        "metadata": [record.metadata for record in records],
    }


def read_scores(answer: Any, count: int) -> Scores:
    """What a server answers about so many pictures.

    Raises:
      ValueError: a clause that says what the answer lacks.
    """
    if not isinstance(answer, dict) or "scores" not in answer:
        raise ValueError(f"sent no scores: '{excerpt(json.dumps(answer))}'")
    details, errors = answer.get("details", {}), answer.get("errors", {})
    if not isinstance(details, dict) or not isinstance(errors, dict):
        raise ValueError("sent details or errors that are no object")
    known = {str(i): i for i in range(count)}
    if unknown := [key for key, sentence in errors.items() if key not in known or not isinstance(sentence, str)]:
        raise ValueError(f"sent the error '{excerpt(str(unknown[0]))}', which belongs to none of the {count} pictures")
    values = _column("scores", answer["scores"], count)
    columns = {name: _column(f"details '{excerpt(name)}'", column, count) for name, column in details.items()}
    return Scores(values, columns, {known[key]: sentence for key, sentence in errors.items()})


def _column(name: str, numbers: Any, count: int) -> np.ndarray:
    """float64 [count]; null is NaN."""
    if not isinstance(numbers, list) or len(numbers) != count:
        amount = f"{len(numbers)}" if isinstance(numbers, list) else "no list of"
        raise ValueError(f"sent {amount} {name} for {count} pictures")
    values = [np.nan if number is None else as_number(number) for number in numbers]
    if None in values:
        raise ValueError(f"sent {name} with {excerpt(json.dumps(numbers[values.index(None)]))}, which is no number")
    return np.asarray(values, np.float64)
