"""The server that ours share, over real connections: refusals, limits, keys, and its end."""

import json
import socket
import threading
import time

import pytest
import requests

from unipic2_jax.core.keys import read_key
from unipic2_jax.serving import server as module
from unipic2_jax.serving.server import JSONServer, Refusal


def fail(request):
    raise RuntimeError("a mistake")


def refuse(request):
    raise Refusal(409, "Not now; come back later.")


ROUTES = {
    ("POST", "/echo"): lambda request: {"got": request},
    ("GET", "/health"): lambda _: {"status": "ok"},
    ("POST", "/fail"): fail,
    ("POST", "/refuse"): refuse,
    ("POST", "/nan"): lambda _: float("nan"),
}


@pytest.fixture(scope="module")
def server():
    with JSONServer(ROUTES, max_bytes=1000).running() as server:
        yield server


def post(server, path, body, **options):
    answer = requests.post(server.url + path, data=body, timeout=20, **options)
    return answer.status_code, answer.json()


def test_an_answer(server):
    assert post(server, "/echo?x=1", '{"a": [1, "\u00e9"]}'.encode()) == (200, {"got": {"a": [1, "é"]}})
    assert requests.get(f"{server.url}/health", timeout=5).json() == {"status": "ok"}


@pytest.mark.parametrize(
    "path, body, status, sentence",
    [
        ("/echo", "{", 400, "not JSON"),
        ("/echo", '{"a": NaN}', 400, "holds NaN"),
        ("/echo", b"\xff", 400, "UTF-8"),
        ("/echo", "", 400, "not JSON"),
        ("/echo", '"' + "x" * 999 + '"', 413, "1001 bytes and the limit is 1000"),
        ("/echo", b"x" * 300_000, 413, "the limit is 1000"),
        ("/other", "{}", 404, "ask for POST /echo"),
        ("/health", "{}", 405, "no POST /health"),
        ("/refuse", "{}", 409, "Not now; come back later."),
        ("/fail", "{}", 500, "RuntimeError: a mistake"),
        ("/nan", "{}", 500, "ValueError"),
    ],
)
def test_a_refusal_is_a_status_and_a_sentence(server, path, body, status, sentence, capfd):
    found, answer = post(server, path, body)
    assert found == status and sentence in answer["error"]["message"]
    assert ("Traceback" in capfd.readouterr().err) is (status == 500)


def talk(server, text, close=False):
    """What comes back on a plain socket."""
    with socket.create_connection(server.server_address[:2], timeout=10) as connection:
        connection.sendall(text)
        if close:
            connection.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: connection.recv(4096), b"")).decode()


def test_bodies_without_a_length_or_an_end(server, monkeypatch):
    assert " 411 " in talk(server, b"POST /echo HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n")
    assert " 411 " in talk(server, b"POST /echo HTTP/1.1\r\nHost: a\r\nContent-Length: -5\r\n\r\n")
    cut = talk(server, b"POST /echo HTTP/1.1\r\nHost: a\r\nContent-Length: 50\r\n\r\n{}", close=True)
    assert " 400 " in cut and "ended after 2 of 50 bytes" in cut
    monkeypatch.setattr(module._Handler, "timeout", 0.2)
    late = talk(server, b"POST /echo HTTP/1.1\r\nHost: a\r\nContent-Length: 50\r\n\r\n{}")
    assert " 408 " in late and post(server, "/echo", "1") == (200, {"got": 1})


def test_keys(monkeypatch):
    monkeypatch.setenv("SERVER_KEY", "sesame")
    assert read_key("", "server") is None
    with JSONServer(ROUTES, key=read_key("SERVER_KEY", "server")).running() as server:
        for headers in (
            {},
            {"Authorization": "Bearer other"},
            {"Authorization": "sesame"},
            {"Authorization": "Bearer \u00e9"},
        ):
            status, answer = post(
                server, "/echo", "{}", headers={name: value.encode() for name, value in headers.items()}
            )
            assert status == 401 and "sesame" not in json.dumps(answer)
        assert post(server, "/echo", "{}", headers={"Authorization": "Bearer sesame"})[0] == 200
        assert requests.get(f"{server.url}/health", timeout=5).status_code == 200


def test_what_has_begun_is_finished():
    begun = threading.Event()

    def slow(request):
        begun.set()
        time.sleep(0.5)
        return "done"

    found = []
    with JSONServer({("POST", "/slow"): slow}).running() as server:
        client = threading.Thread(target=lambda: found.append(post(server, "/slow", "{}")))
        client.start()
        assert begun.wait(5)
    client.join()
    assert found == [(200, "done")]
    with pytest.raises(requests.ConnectionError):
        post(server, "/slow", "{}")


def test_many_at_once(server):
    found = []
    threads = [
        threading.Thread(target=lambda i=i: found.append(post(server, "/echo", str(i))[1]["got"])) for i in range(32)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == list(range(32))
