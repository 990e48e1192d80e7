"""Servers that answer wrongly or without end: the corpus generator ends with one line."""

import gzip
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from small import entry

from ysnake import generate_data

PART = {"model": "x", "created_at": "2024-01-01T00:00:00Z", "response": "word " * 2000}


class Handler(BaseHTTPRequestHandler):
    """Has every model; answers a prompt with `server.pieces`, an iterator of bytes."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def whole(self, content):
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_GET(self):
        self.whole(b'{"models": []}')

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/api/show":
            return self.whole(b'{"details": {}, "model_info": {}}')
        self.send_response(self.server.status)
        for name, value in self.server.headers.items():
            self.send_header(name, value)
        self.send_header("Connection", "close")
        self.end_headers()
        try:
            for piece in self.server.pieces():
                self.wfile.write(piece)
        except OSError:
            self.server.hung_up.set()
        self.close_connection = True


@pytest.fixture
def server():
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        server.headers, server.status, server.hung_up = {}, 200, threading.Event()
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def ask(server, tmp_path, monkeypatch):
    def ask():
        monkeypatch.setenv("OLLAMA_HOST", f"127.0.0.1:{server.server_port}")
        monkeypatch.setenv("NO_PROXY", "*")
        options = ["--count", "1", "--kinds", "words", "--parallel", "1", "--retries", "0"]
        options += ["--max-tokens", "20", "--out", tmp_path / "out"]
        code, _, errors = entry(generate_data.main, *options)
        assert code == 1
        assert errors.count("\n") == 1
        assert errors.startswith("error: 127.0.0.1:")
        return errors

    return ask


def forever(piece):
    while True:
        yield piece


@pytest.mark.parametrize(
    "piece",
    [
        pytest.param(json.dumps(PART).encode() + b"\n", id="parts"),
        pytest.param(b'{"response": "' + b"word " * 1000, id="one line"),
        pytest.param(b'{"response": "", "done": false}\n' * 100, id="empty parts"),
    ],
)
def test_an_answer_without_end_is_cut_off(server, ask, piece):
    server.pieces = lambda: forever(piece)
    assert "it did not end within 1,130,496 bytes" in ask()
    assert server.hung_up.wait(20)


def test_a_compressed_answer_is_refused(server, ask):
    server.headers = {"Content-Encoding": "gzip"}
    server.pieces = lambda: [gzip.compress(json.dumps(PART).encode() * 1000)]
    assert "compressed" in ask()


@pytest.mark.parametrize(
    "answer",
    [b"[]\n", b"5\n", b'{"response": {}}\n', b"[" * 100_000, b"\xff\n", b"{}\n", b""],
    ids=["list", "number", "other kind", "deep", "not UTF-8", "empty", "nothing"],
)
def test_another_kind_of_answer(server, ask, answer):
    server.pieces = lambda: [answer]
    assert "broke off in the middle of an answer" in ask()


@pytest.mark.parametrize("to", ["/api/generate", "ftp://elsewhere/x"])
def test_a_redirection_that_leads_nowhere(server, ask, to):
    server.status, server.headers, server.pieces = 307, {"Location": to}, list
    ask()


def test_what_the_server_says_is_escaped(server, ask):
    server.pieces = lambda: [json.dumps({"error": "\x1b[2J gone"}).encode() + b"\n"]
    assert r"(\x1b[2J gone)" in ask()
