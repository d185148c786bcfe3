"""JSON over HTTP from the standard library: what the servers of this project share."""

from __future__ import annotations

import contextlib
import hmac
import json
import logging
import signal
import threading
import traceback
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from unipic2_jax.core.strict import excerpt, read_json

MEGABYTE = 2**20
SLOWEST_CLIENT = 60  # seconds without a byte of a request that was begun
GRACE = 30  # seconds that requests in progress have after a signal

logger = logging.getLogger(__name__)


class Refusal(Exception):
    """A request that is not served: the status, and one sentence for who sent it."""

    def __init__(self, status: int, sentence: str):
        super().__init__(sentence)
        self.status = status


# From a request's JSON (None: it has none) to the answer's; it may raise `Refusal`.
Route = Callable[[Any], Any]


class JSONServer(ThreadingHTTPServer):
    """Serves each request in a thread of its own. What goes wrong is answered as {"error": {"message": sentence}}.

    Attributes:
      routes: (method, path) -> route.
      max_bytes: of a request's body; larger ones are refused unread.
      key: who asks must send it as `Authorization: Bearer KEY`, except for /health; None: nobody has to.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(
        self,
        routes: Mapping[tuple[str, str], Route],
        host: str = "127.0.0.1",
        port: int = 0,
        *,
        max_bytes: int = 256 * MEGABYTE,
        key: str | None = None,
    ):
        self.routes, self.max_bytes, self.key = dict(routes), max_bytes, key
        self._busy, self._none_busy = 0, threading.Condition()
        try:
            super().__init__((host, port), _Handler)
        except (OSError, OverflowError) as error:  # OverflowError: no such port
            raise OSError(f"{host}:{port} cannot be listened on ({error}); choose another host or port.") from error

    @property
    def url(self) -> str:
        """Where it listens; port 0 has become a free one."""
        return f"http://{self.server_address[0]}:{self.server_address[1]}"

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        with self._none_busy:
            self._busy += 1
        try:
            super().process_request_thread(request, client_address)
        finally:
            with self._none_busy:
                self._busy -= 1
                self._none_busy.notify_all()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """What remains is a connection that broke: nobody is left to be told."""
        logger.info("A connection from %s broke:\n%s", client_address, traceback.format_exc())

    @contextlib.contextmanager
    def running(self) -> Any:
        """Serves in the background; at the end, requests in progress have `GRACE` seconds."""
        thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self.shutdown()
            thread.join()
            with self._none_busy:
                self._none_busy.wait_for(lambda: not self._busy, GRACE)
            self.server_close()

    def run_until_signal(self) -> None:
        """Serves until SIGTERM or ^C; only the main thread can."""
        stop = threading.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: stop.set())
        with self.running():
            stop.wait()


class _Handler(BaseHTTPRequestHandler):
    server: JSONServer
    protocol_version = "HTTP/1.1"  # clients with large bodies may then ask first (Expect: 100-continue)
    timeout = SLOWEST_CLIENT

    def do_GET(self) -> None:
        self._serve("GET")

    def do_POST(self) -> None:
        self._serve("POST")

    def log_message(self, format: str, *arguments: Any) -> None:
        logger.info(format, *arguments)

    def _serve(self, method: str) -> None:
        try:
            status, content = 200, self._answer(method)
        except Refusal as refusal:
            status, content = refusal.status, _error(str(refusal))
        except Exception as error:  # a mistake in the program: this request hears of it, others go on
            traceback.print_exc()
            status, content = 500, _error(f"The server failed ({type(error).__name__}: {excerpt(str(error))}).")
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(content)

    def _answer(self, method: str) -> bytes:
        routes, path = self.server.routes, self.path.split("?")[0]
        length = self._length(method)
        route = routes.get((method, path))
        if route is None:
            known = ", ".join(f"{m} {p}" for m, p in routes)
            self._skip(length)
            raise Refusal(
                405 if path in {p for _, p in routes} else 404, f"There is no {method} {path} here; ask for {known}."
            )
        sent = self.headers.get("Authorization", "")
        if (
            self.server.key is not None
            and path != "/health"
            and not hmac.compare_digest(sent.encode(), f"Bearer {self.server.key}".encode())
        ):
            self._skip(length)
            raise Refusal(401, "The key is missing or wrong; send the server's as 'Authorization: Bearer KEY'.")
        if length > self.server.max_bytes:
            self._skip(length)
            raise Refusal(
                413,
                f"The body has {length} bytes and the limit is {self.server.max_bytes}; send fewer pictures at once.",
            )
        body = self._read(length)
        if method == "GET":
            return _write(route(None))
        try:
            request = read_json(body)
        except ValueError as error:
            raise Refusal(400, f"The body is not JSON ({error}); send a JSON object.") from None
        return _write(route(request))

    def _length(self, method: str) -> int:
        if method == "GET" and "Content-Length" not in self.headers:
            return 0
        text = self.headers.get("Content-Length", "")
        if not (text.isascii() and text.isdigit()):
            raise Refusal(411, "The request does not say how long its body is; send a Content-Length.")
        return int(text)

    def _read(self, length: int) -> bytes:
        try:
            body = self.rfile.read(length)
        except TimeoutError:
            raise Refusal(408, f"No more of the body came for {self.timeout} seconds; send it at once.") from None
        if len(body) < length:
            raise Refusal(400, f"The body ended after {len(body)} of {length} bytes; send all of it.")
        return body

    def _skip(self, length: int) -> None:
        """Reads a refused body, up to twice what would be taken: who still sends does not hear an answer."""
        length = min(length, 2 * self.server.max_bytes)
        while length > 0 and (part := self._read(min(length, MEGABYTE))):
            length -= len(part)


def _write(answer: Any) -> bytes:
    return json.dumps(answer, allow_nan=False).encode()


def _error(sentence: str) -> bytes:
    return _write({"error": {"message": sentence}})
