"""Our Qwen2.5-VL behind an OpenAI-compatible chat endpoint: POST /v1/chat/completions, GET /v1/models.

What the endpoint cannot do is refused with one sentence rather than left out silently.
"""

from __future__ import annotations

import base64
import binascii
import re
import secrets
import threading
import time
from collections.abc import Mapping
from typing import Any

from unipic2_jax.core.strict import as_number, excerpt
from unipic2_jax.models.qwen.generation import SamplingConfig
from unipic2_jax.models.qwen.processor import ROLES
from unipic2_jax.pictures.decode import BadRecord, decode
from unipic2_jax.pipelines.chat import ChatModel
from unipic2_jax.serving.server import JSONServer, Refusal

DEFAULT_TOKENS = 256
MAX_PIXELS = 2**24  # of one picture
FIELDS = ("model", "messages", "temperature", "top_p", "max_tokens", "max_completion_tokens", "seed", "n", "stream")
# Fields with the only values that mean what is done here.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1, None),
    "stream": (False, None),
    "logprobs": (False, None),
    "frequency_penalty": (0, None),
    "presence_penalty": (0, None),
    "response_format": ({"type": "text"}, None),
    "stop": (None, []),
    "tools": (None, []),
}
IGNORED = ("user", "metadata", "store")  # they are for the bookkeeping of other servers
_DATA_URL = re.compile(r"data:image/[\w.+-]+;base64,(.*)", re.DOTALL)


def make_server(model: ChatModel, name: str, **where: Any) -> JSONServer:
    """A server of this model, listening but not serving yet.

    Args:
      name: under which clients ask for it.
      where: `host`, `port`, `max_bytes`, `key` of `JSONServer`.

    Raises:
      OSError: when the port is taken.
    """
    service = ChatService(model, name)
    routes = {
        ("POST", "/v1/chat/completions"): service.complete,
        ("GET", "/v1/models"): service.models,
        ("GET", "/health"): lambda _: {"status": "ok", "model": name},
    }
    return JSONServer(routes, **where)


class ChatService:
    """Answers one conversation after the other; requests that come meanwhile wait."""

    def __init__(self, model: ChatModel, name: str):
        self.model, self.name = model, name
        self._started, self._turn = int(time.time()), threading.Lock()

    def models(self, _: Any) -> dict[str, Any]:
        """The one model, in OpenAI's form."""
        entry = {"id": self.name, "object": "model", "created": self._started, "owned_by": "unipic2-jax"}
        return {"object": "list", "data": [entry]}

    def complete(self, request: Any) -> dict[str, Any]:
        """The next message of a conversation, in OpenAI's form.

        Raises:
          Refusal: when the request asks for what there is not.
        """
        if not isinstance(request, dict):
            raise Refusal(400, "The body is no JSON object; send one with 'model' and 'messages'.")
        for field, value in request.items():
            if field in NEUTRAL and value not in NEUTRAL[field]:
                raise Refusal(400, f"This endpoint has no {field} {excerpt(repr(value))}; leave it out.")
            if field not in (*FIELDS, *NEUTRAL, *IGNORED):
                raise Refusal(400, f"The field '{excerpt(field)}' is unknown; send some of {', '.join(FIELDS)}.")
        if request.get("model") != self.name:
            raise Refusal(404, f"There is no model {excerpt(repr(request.get('model')))} here; ask for '{self.name}'.")
        conversation = read_messages(request.get("messages"))
        options = read_options(request)
        with self._turn:
            try:
                (answer,) = self.model.write([conversation], **options)
            except ValueError as error:  # longer than the model's positions, an image's token in a text
                raise Refusal(400, str(error)) from error
        return {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": self.name,
            "choices": [
                {
                    "index": 0,
                    "message": {"role": "assistant", "content": answer.text},
                    "finish_reason": "stop" if answer.ended else "length",
                }
            ],
            "usage": {
                "prompt_tokens": answer.read,
                "completion_tokens": answer.written,
                "total_tokens": answer.read + answer.written,
            },
        }


def read_options(request: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `ChatModel.write`. Without a seed answers differ from time to time, without a temperature it is 1.

    Raises:
      Refusal: for a number out of range.
    """
    temperature = _number(request, "temperature", 1.0, 0, 2)
    top_p = _number(request, "top_p", 1.0, 0, 1)
    longest = "max_completion_tokens" if request.get("max_completion_tokens") is not None else "max_tokens"
    tokens = _number(request, longest, DEFAULT_TOKENS, 1, 2**20, whole=True)
    seed = _number(request, "seed", secrets.randbelow(2**31), 0, 2**31 - 1, whole=True)
    if not top_p:
        raise Refusal(400, "top_p is 0; it must be above 0.")
    return {"max_new_tokens": int(tokens), "sampling": SamplingConfig(temperature, top_p), "seed": int(seed)}


def _number(
    request: Mapping[str, Any], field: str, default: float, low: float, high: float, whole: bool = False
) -> float:
    value = request.get(field)
    if value is None:
        return default
    number = as_number(value)
    if number is None or not low <= number <= high or (whole and number != int(number)):
        kind = "a whole number" if whole else "a number"
        raise Refusal(400, f"{field} is {excerpt(repr(value))}; it must be {kind} from {low} to {high}.")
    return number


def read_messages(messages: Any) -> list[dict[str, Any]]:
    """OpenAI's messages as `models.qwen.processor` has them: pictures come as data URLs.

    Raises:
      Refusal: for anything else than texts and such pictures.
    """
    if not isinstance(messages, list) or not messages:
        raise Refusal(400, "There are no messages; send a list with at least one.")
    return [_message(number, message) for number, message in enumerate(messages)]


def _message(number: int, message: Any) -> dict[str, Any]:
    role = message.get("role") if isinstance(message, dict) else None
    if role not in ROLES:
        raise Refusal(400, f"Message {number} has the role {excerpt(repr(role))}; use one of {', '.join(ROLES)}.")
    content = message.get("content")
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list) or not content:
        raise Refusal(400, f"Message {number} has no content; give a text, or a list of texts and pictures.")
    return {"role": role, "content": [_part(f"message {number}", part) for part in content]}


def _part(where: str, part: Any) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    if kind != "image_url":
        raise Refusal(400, f"A part of {where} is neither a text nor an image_url; send those.")
    url = part.get("image_url")
    url = url.get("url") if isinstance(url, dict) else url
    match = _DATA_URL.fullmatch(url) if isinstance(url, str) else None
    if match is None:
        raise Refusal(
            400, f"A picture of {where} is no data URL; send data:image/png;base64,... with the picture in it."
        )
    try:
        content = base64.b64decode(match.group(1), validate=True)
        picture = decode(content, where, max_pixels=MAX_PIXELS, animated=False)
    except binascii.Error:
        raise Refusal(400, f"A picture of {where} is not base64; correct the data URL.") from None
    except BadRecord as error:
        raise Refusal(400, str(error)) from None
    return {"type": "image", "image": picture}
