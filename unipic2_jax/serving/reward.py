"""A reward as a server that `rewards.remote` asks. Protocol: docs/rewards.md."""

from __future__ import annotations

import base64
import binascii
import contextlib
import threading
from collections.abc import Mapping
from typing import Any

import numpy as np

from unipic2_jax.data.prompts import PromptRecord
from unipic2_jax.data.text import check_unicode
from unipic2_jax.parallel.mesh import make_mesh
from unipic2_jax.pictures.decode import BadRecord, decode
from unipic2_jax.rewards.base import REWARDS
from unipic2_jax.rewards.scoring import Scorer, make_entries
from unipic2_jax.serving.server import JSONServer, Refusal

MAX_PIXELS = 2**24  # of one picture
FIELDS = ("images", "prompts", "sources", "metadata")


def make_server(kind: str, options: Mapping[str, Any], **where: Any) -> JSONServer:
    """A server of the reward of this kind, listening but not serving yet.

    Args:
      options: of the reward, and of its calls (`batch_size`, `retries`, ...).
      where: `host`, `port`, `max_bytes`, `key` of `JSONServer`.

    Raises:
      ValueError: for options that the reward does not take.
      OSError: when the port is taken.
    """
    if not isinstance(options, Mapping):
        raise ValueError(f"The options of the reward are {options!r}; give an object of names and values.")
    if others := options.keys() & {"kind", "weight", "normalize", "datasets"}:
        raise ValueError(
            f"The option '{min(others)}' belongs to a stage's configuration, not to a server; leave it out."
        )
    # Only such a reward needs the devices: another may run beside a training that has them.
    mesh = make_mesh() if REWARDS.find(kind).on_mesh else None
    service = RewardService(kind, Scorer(make_entries({kind: options}, mesh)))
    return JSONServer({("POST", "/score"): service.score, ("GET", "/health"): service.health}, **where)


class RewardService:
    """Answers requests about one reward.

    Attributes:
      kind: its name.
      scorer: asks it, with its own batches, concurrency and tries, whatever the clients send.
    """

    def __init__(self, kind: str, scorer: Scorer):
        self.kind, self.scorer = kind, scorer
        self.reward = scorer.entries[kind].reward
        # Computations on a mesh are made in the thread that asks, and must not overlap.
        self._turn = threading.Lock() if self.reward.on_mesh else contextlib.nullcontext()

    def health(self, _: Any) -> dict[str, Any]:
        """What is served."""
        return {"status": "ok", "reward": self.kind, "groupwise": self.reward.groupwise}

    def score(self, request: Any) -> dict[str, Any]:
        """The scores that a request asks for.

        Raises:
          Refusal: when it is not what the protocol says.
        """
        images, records = read_request(request)
        if self.reward.groupwise:
            records = _one_group(records)
        with self._turn:
            scored = self.scorer.score(images, records)
        return {
            "scores": _numbers(scored.values[self.kind]),
            "details": {name: _numbers(column) for name, column in scored.details[self.kind].items()},
            "errors": {str(i): sentence for i, sentence in scored.errors[self.kind].items()},
        }


def read_request(request: Any) -> tuple[list[np.ndarray], list[PromptRecord]]:
    """The pictures of a request, and what each was made for.

    Raises:
      Refusal: with status 400 and one sentence.
    """
    if not isinstance(request, dict):
        raise Refusal(400, f"The body is no JSON object; send one with {', '.join(FIELDS)}.")
    if unknown := request.keys() - set(FIELDS):
        raise Refusal(400, f"The field '{min(unknown)}' is unknown; send {', '.join(FIELDS)}.")
    for field in FIELDS:
        if not isinstance(request.get(field), list):
            raise Refusal(400, f"There is no list '{field}'; send one with an entry for every picture.")
        if len(request[field]) != len(request["images"]):
            raise Refusal(
                400,
                f"There are {len(request['images'])} images and {len(request[field])} {field}; send as many of each.",
            )
    if not request["images"]:
        raise Refusal(400, "There are no images; send at least one.")
    for i, (prompt, metadata) in enumerate(zip(request["prompts"], request["metadata"])):
        if not isinstance(prompt, str):
            raise Refusal(400, f"Entry {i} of prompts is no text; correct it.")
        try:
            check_unicode(prompt, f"entry {i} of prompts")
        except BadRecord as error:
            raise Refusal(400, str(error)) from None
        if not isinstance(metadata, dict):
            raise Refusal(400, f"Entry {i} of metadata is no object; send {{}} where there is none.")
    images = [_picture(f"entry {i} of images", text) for i, text in enumerate(request["images"])]
    sources: dict[str, np.ndarray] = {}
    for i, text in enumerate(request["sources"]):
        if text is not None and (not isinstance(text, str) or text not in sources):
            sources[text] = _picture(f"entry {i} of sources", text)
    rows = zip(request["prompts"], request["sources"], request["metadata"])
    return images, [PromptRecord(prompt, sources.get(text), metadata) for prompt, text, metadata in rows]


def _picture(name: str, text: Any) -> np.ndarray:
    """uint8 [H, W, 3]."""
    if not isinstance(text, str):
        raise Refusal(400, f"{name.capitalize()} is no text; send a PNG in base64.")
    try:
        content = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise Refusal(400, f"{name.capitalize()} is not base64; send a PNG in base64.") from None
    try:
        return np.asarray(decode(content, name, max_pixels=MAX_PIXELS, animated=False))
    except BadRecord as error:
        raise Refusal(400, str(error)) from None


def _one_group(records: list[PromptRecord]) -> list[PromptRecord]:
    if len({record.key for record in records}) > 1:
        raise Refusal(
            400, "This reward compares the pictures of one prompt (and source), and these have several; send one."
        )
    return records


def _numbers(column: np.ndarray) -> list[float | None]:
    """As JSON has them; NaN is null."""
    return [None if np.isnan(value) else float(value) for value in column]
