"""A real HTTP server that misbehaves as it is told: each request takes the next step of a script, and the last one for ever."""

import contextlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def reply(body, status=200, headers=(), kind="application/json"):
    """Answers with `body`: bytes, text, or something for JSON."""
    content = body if isinstance(body, bytes) else (body if isinstance(body, str) else json.dumps(body)).encode()

    def step(handler):
        handler.send_response(status)
        for name, value in dict(headers).items():
            handler.send_header(name, value)
        handler.send_header("Content-Type", kind)
        handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        handler.wfile.write(content)

    return step


def hang(seconds):
    """Says nothing for so long, then hangs up."""
    return lambda handler: time.sleep(seconds)


def cut(handler):
    """Promises more than it sends."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"scores": [1')


def stall(handler):
    """Begins an answer and goes silent."""
    cut(handler)
    handler.wfile.flush()
    time.sleep(3)


def hang_up(handler):
    """Closes the connection without a word."""
    handler.close_connection = True


class ScriptedServer(ThreadingHTTPServer):
    """`requests` are (path, headers, body) as they came; a step may be a function of the handler, or of it and the body."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, steps):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.steps, self.requests, self.times, self.lock = list(steps), [], [], threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def next_step(self, request):
        with self.lock:
            self.requests.append(request)
            self.times.append(time.monotonic())
            return self.steps.pop(0) if len(self.steps) > 1 else self.steps[0]

    def handle_error(self, request, client_address):
        pass  # clients that gave up are what some tests are about


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.next_step((self.path, self.headers, body))(self)

    def log_message(self, *arguments):
        pass


@contextlib.contextmanager
def running(server):
    """The server while it answers, in a thread."""
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def scripted(*steps):
    """A server that takes these steps."""
    return running(ScriptedServer(steps))
