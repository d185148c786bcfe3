"""One HTTP request of a reward, and pictures as it carries them. Whatever goes wrong outside is a `RewardError` of one sentence."""

from __future__ import annotations

import base64
import dataclasses
import datetime
import email.utils
import io
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import requests
import urllib3
from PIL import Image

from unipic2_jax.core.keys import read_key
from unipic2_jax.core.strict import excerpt, read_json
from unipic2_jax.rewards.base import RewardError

CONNECT_SECONDS = 10.0
SECRET_LENGTH = 8  # characters
MAX_ANSWER = 64 * 2**20  # bytes; scores are small


@dataclasses.dataclass(frozen=True)
class Endpoint(requests.auth.AuthBase):
    """What a reward asks.

    Attributes:
      what: for messages, 'judge'.
      url: where it is asked.
      timeout: seconds it may be silent. Below the time of a call, so that no thread waits for an answer nobody wants.
      api_key_env: environment variable that holds its key; '': it needs none.

    Raises:
      ValueError: when the address is none, or the variable holds no key.
    """

    what: str
    url: str
    timeout: float
    api_key_env: str = ""
    _key: str = dataclasses.field(default="", init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"The {self.what}'s address is '{self.url}'; give one like http://host:port.")
        if not self.timeout > 0:
            raise ValueError(f"request_timeout is {self.timeout}; use more than 0 seconds.")
        object.__setattr__(self, "_key", read_key(self.api_key_env, self.what) or "")

    def __call__(self, request: Any) -> Any:
        """Puts the key on a request; called also where there is none, so that requests does not look into ~/.netrc for one."""
        if self._key:
            request.headers["Authorization"] = f"Bearer {self._key}"
        return request

    def post_json(self, content: bytes) -> Any:
        """The JSON that answers a JSON body.

        Raises:
          RewardError: when none does.
        """
        answer, kind = self.post(content, "application/json")
        try:
            return read_json(answer)
        except ValueError as error:
            raise RewardError(
                f"The {self.what} at {self.shown} answered {kind or 'something'} that is not JSON ({error}): "
                f"'{excerpt(answer)}'."
            ) from None

    def post(self, content: bytes, content_type: str) -> tuple[bytes, str]:
        """The body that answers, and its content type.

        Raises:
          RewardError: when the server cannot be reached, is silent too long, breaks off, or answers with another status
            than 200.
        """
        where = f"The {self.what} at {self.shown}"
        silent = f"{where} was silent for {self.timeout:g} seconds."
        try:
            # A connection of its own: calls come from many threads, and from new ones each time.
            with requests.post(
                self.url,
                data=content,
                headers={"Content-Type": content_type},
                auth=self,
                timeout=(min(CONNECT_SECONDS, self.timeout), self.timeout),
                stream=True,
                allow_redirects=False,
            ) as response:
                answer = self._read(response, where)
        except requests.ReadTimeout as error:
            raise RewardError(silent) from error
        except requests.exceptions.ChunkedEncodingError as error:
            raise RewardError(f"{where} broke off in the middle of its answer.") from error
        except requests.ConnectionError as error:
            if error.args and isinstance(error.args[0], urllib3.exceptions.ReadTimeoutError):
                raise RewardError(silent) from error
            raise RewardError(f"{where} cannot be reached or hung up; see whether it runs.") from error
        except requests.RequestException as error:
            raise RewardError(f"{where} cannot be asked ({type(error).__name__}).") from error
        if response.status_code != 200:
            raise self._refusal(where, response, answer)
        return answer, response.headers.get("Content-Type", "").split(";")[0]

    def _read(self, response: requests.Response, where: str) -> bytes:
        parts, length = [], 0
        for part in response.iter_content(2**16):
            parts.append(part)
            length += len(part)
            if length > MAX_ANSWER:
                raise RewardError(f"{where} answers with more than {MAX_ANSWER} bytes.")
        answer = b"".join(parts)
        # Servers repeat keys in what they complain about; ours is in no message then. Short ones ('EMPTY') are no secrets.
        return answer.replace(self._key.encode(), b"***") if len(self._key) >= SECRET_LENGTH else answer

    def _refusal(self, where: str, response: requests.Response, answer: bytes) -> RewardError:
        status = response.status_code
        if status in (401, 403):
            remedy = (
                f"set {self.api_key_env} to a valid one" if self.api_key_env else "name its variable as api_key_env"
            )
            return RewardError(f"{where} refused the key (status {status}); {remedy}.")
        if 300 <= status < 400:
            return RewardError(f"{where} sends on to another address (status {status}); give that one instead.")
        sentence = f"{where} answered with status {status}: '{excerpt(_message(answer))}'."
        asked = response.headers.get("Retry-After") if status in (429, 503) else None
        return RewardError(sentence, None if asked is None else retry_after(asked))

    @property
    def shown(self) -> str:
        """The address without what may be secret in it."""
        parts = urlsplit(self.url)
        return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def retry_after(text: str) -> float | None:
    """Seconds of a Retry-After header, which has seconds or a date (RFC 9110, 10.2.3); None: it is neither."""
    text = text.strip()
    if text.isascii() and text.isdigit() and len(text) < 10:
        return float(text)
    try:
        date = email.utils.parsedate_to_datetime(text)
        if date.tzinfo is None:  # '-0000'
            date = date.replace(tzinfo=datetime.UTC)
        return max(0.0, (date - datetime.datetime.now(datetime.UTC)).total_seconds())
    except (ValueError, OverflowError):
        return None


def _message(answer: bytes) -> str | bytes:
    """What an error's JSON says, in OpenAI's form or plainly; otherwise the body."""
    try:
        body = read_json(answer)
    except ValueError:
        return answer
    error = body.get("error") if isinstance(body, dict) else None
    message = error.get("message") if isinstance(error, dict) else error
    return message if isinstance(message, str) else answer


def encode_picture(image: np.ndarray, kind: str = "PNG") -> bytes:
    """uint8 [H, W, 3] as a file."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format=kind)
    return buffer.getvalue()


def to_base64(content: bytes) -> str:
    """As JSON carries bytes."""
    return base64.b64encode(content).decode("ascii")
