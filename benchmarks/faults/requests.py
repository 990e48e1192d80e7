"""Requests that no client should send, with the fields that the server knows.

A real server process must answer each with a status below 500. It must log no traceback, answer
good requests afterwards, and not grow.
"""

import asyncio
import json
import random
import re
import subprocess
import sys
import time
from collections import Counter
from copy import deepcopy
from pathlib import Path
from typing import Any

from benchmarks.faults.lost import Lost, environment, resident
from ysnake.serving import ollama_api, openai_api

NAME = "snake"
CLIENTS = 16  # at once
PATIENCE = 60.0  # seconds within which a request is answered or its connection closed
WARM = 2000  # requests before the memory is measured for the first time
GROWTH = 60_000_000  # bytes by which the server may grow after that
# The log of errors is limited to fifty records an hour. Here every record is needed.
SERVER = "from ysnake import serve; from ysnake.serving import error_log; "
SERVER += "from ysnake.shared import cli; error_log.MOST = 10**9; cli.run(serve.main)"

SCHEMA = {
    path: sorted(known.names()) for path, known in (ollama_api.FIELDS | openai_api.FIELDS).items()
}
INNER = {
    "options": sorted(ollama_api.OPTIONS.names()),
    "stream_options": sorted(openai_api.STREAM_OPTIONS.names()),
    "messages": sorted(ollama_api.MESSAGE.names() | openai_api.MESSAGE.names()),
}
USER = {"role": "user", "content": "The boa"}
GOOD = {
    "/api/generate": {"model": NAME, "prompt": "The boa", "options": {"num_predict": 2}},
    "/api/chat": {"model": NAME, "messages": [USER], "options": {"num_predict": 2}},
    "/api/embed": {"model": NAME, "input": ["The boa", ""]},
    "/api/show": {"model": NAME},
    "/v1/completions": {"model": NAME, "prompt": "The boa", "max_tokens": 2},
    "/v1/chat/completions": {"model": NAME, "messages": [USER], "max_tokens": 2},
    "/v1/embeddings": {"model": NAME, "input": "The boa"},
}
VALUES = [None, True, False, 0, 1, -1, 2, 7, 0.5, -0.5, 1e308, 2**31, 2**63, -(2**63), 10**40]
VALUES += ["", "x", NAME, "user", "\0", "\ud800", "é蛇\u202e", "\x1b]52;c;x\x07", "x" * 5000]
VALUES += [[], {}, [None], ["a", "b"], [1], [[]], {"a": 1}, [{"role": "user"}], ["x"] * 100]
VALUES += [[{"type": "text", "text": "x"}], [{"type": "text", "text": []}], [{"type": "image_url"}]]
RAW = [b"", b"[]", b"null", b"1e999", b"\xff\xfe", b'{"model": NaN}', b"[" * 50_000]
RAW += [b'{"model": "snake", "prompt": "x", "options": {"seed": 1e400}}', b'{"a":' * 5000]
RAW += [b'{"seed": ' + b"9" * 5000, b'{"model": "snake", "model": 1}', b'"' * 3]
HEADERS = [b"Content-Length: -1", b"Content-Length: 99999999999999999999", b"Content-Length: x"]
HEADERS += [b"Transfer-Encoding: chunked", b"Transfer-Encoding: gzip, chunked", b"Expect: 1"]
HEADERS += [b"Origin: null", b"Origin: https://x.example", b"Sec-Fetch-Site: cross-site"]
HEADERS += [b"Host: x", b"Authorization: Bearer", b"Content-Type: x/y; charset=?", b" x", b":"]
HEADERS += [b"Range: bytes=5-1", b"If-None-Match: *", b"Cookie: \xff", b"Upgrade: websocket"]
HEADERS += [b"X: " + b"y" * 70_000]
PATHS = ["/", "/api/tags", "/api/ps", "/api/version", "/v1/models", "/v1/models/snake"]
PATHS += ["/v1/models/" + "x" * 3000, "/v1/models/%00%ff", "/../etc/passwd", "//", "/api/generate/"]
METHODS = ["GET", "HEAD", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE", "CONNECT", "x"]


def drawn_body(chance: random.Random, path: str) -> dict[str, Any]:
    """A request with some fields exchanged or added."""
    body = json.loads(json.dumps(GOOD[path]))
    for _ in range(chance.randint(1, 3)):
        target, names = body, SCHEMA[path]
        inner = chance.choice([*INNER, None])
        if inner in names and chance.random() < 0.7:
            names = INNER[inner]
            if inner == "messages":
                target = {"role": "user", "content": "x"}
                before = body.get("messages")
                body["messages"] = [*(before if isinstance(before, list) else []), target]
            else:
                target = body[inner] if isinstance(body.get(inner), dict) else {}
                body[inner] = target
        target[chance.choice([*names, "unknown"])] = deepcopy(chance.choice(VALUES))
    return body


def drawn(chance: random.Random) -> tuple[bytes, int | None]:
    """A request as it is sent, and what the answer must be.

    That is a status, None for any answer, or -1 if there may be no answer, since the server may
    wait for the end of the request.
    """
    path, method, headers = chance.choice(list(SCHEMA)), "POST", []
    way = chance.random()
    if way < 0.15:
        return request(path, json.dumps(GOOD[path]).encode()), 200
    if way < 0.75:
        content = json.dumps(drawn_body(chance, path)).encode()
    elif way < 0.85:
        content = chance.choice(RAW)
    else:
        content = json.dumps(GOOD[path]).encode()[: chance.randrange(200)]
        path = chance.choice([path, *PATHS])
        method = chance.choice(["POST", *METHODS])
        headers = chance.sample(HEADERS, chance.randint(0, 2))
    sent = request(path, content, method, headers)
    if way > 0.95:  # cut short, or with some bytes exchanged
        at = chance.randrange(len(sent))
        sent = sent[:at] + chance.choice([b"", chance.randbytes(4) + sent[at + 4 :]])
    return sent, -1 if way > 0.85 else None


def request(
    path: str, content: bytes, method: str = "POST", headers: list[bytes] | None = None
) -> bytes:
    """A request, after which the connection ends."""
    lines = [f"{method} {path} HTTP/1.1".encode(), b"Host: 127.0.0.1", b"Connection: close"]
    if not any(line.startswith((b"Content-Length", b"Transfer")) for line in headers or []):
        lines.append(b"Content-Length: %d" % len(content))
    return b"\r\n".join([*lines, *(headers or []), b"", b""]) + content


async def exchange(port: int, sent: bytes, gone_after: float | None = None) -> bytes:
    """Send a request. Returns the whole answer, or nothing if the client leaves before."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(sent)
        wait = PATIENCE if gone_after is None else gone_after
        return await asyncio.wait_for(reader.read(-1), wait)
    except ConnectionError:  # the server closed it while we were sending
        return b""
    except asyncio.TimeoutError:
        if gone_after is None:
            raise
        return b""
    finally:
        writer.transport.abort()


def status_of(answer: bytes) -> int:
    """The status of an answer, 0 without one."""
    found = re.match(rb"HTTP/1\.1 (\d{3}) ", answer)
    return int(found[1]) if found else 0


class Server:
    """A server process with a tiny model."""

    def __init__(self, folder: Path, *options: str):
        self.log = folder / "server.log"
        own = ("--port", "0", "--name", NAME, "--threads", "1")
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", SERVER, make(folder), *own, *options],
                env=environment() | {"OMP_NUM_THREADS": "1"},
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        found = re.search(r"http://\S+?:(\d+)", self.process.stdout.readline())
        if not found:
            raise Lost(f"the server does not start: {self.log.read_text()}")
        self.port = int(found[1])

    def check(self) -> None:
        """Raise Lost unless the server runs, answers, and has logged no traceback."""
        logged = self.log.read_text(errors="replace")
        if self.process.poll() is not None or "Traceback" in logged:
            raise Lost(f"exit code of the server {self.process.returncode}, its log:\n{logged}")
        for path, body in GOOD.items():
            answer = asyncio.run(exchange(self.port, request(path, json.dumps(body).encode())))
            if status_of(answer) != 200:
                raise Lost(f"{path} {body}: {answer}")

    def size(self) -> int:
        return resident(self.process.pid)

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(60)


def make(folder: Path) -> Path:
    """Write a tiny model and its tokenizer."""
    import torch

    from benchmarks.faults.kills import corpus
    from ysnake.checkpoints import checkpoint
    from ysnake.model import Model
    from ysnake.model.config import ModelConfig
    from ysnake.text import tokenizer

    torch.manual_seed(0)
    learnt = tokenizer.train("bpe", [corpus(folder / "words.txt").read_text()], 300)
    model = Model(ModelConfig(vocab_size=320, d_model=16, n_layers=1, d_state=8, head_dim=8))
    checkpoint.save(folder / "served", model, learnt)
    return folder / "served"


class Requests:
    """The attack on a server."""

    name = "fuzzed requests"

    def __init__(self, folder: Path, seed: int):
        self.server, self.seed = Server(folder), seed
        self.count, self.statuses = 0, Counter()
        self.first_size = 0

    def go(self, seconds: float) -> str:
        """Send requests for this many seconds. Returns a summary of all answers so far."""
        asyncio.run(self.send(time.monotonic() + seconds))
        self.server.check()
        size = self.server.size()
        if self.count >= WARM:
            self.first_size = self.first_size or size
            if size > self.first_size + GROWTH:
                raise Lost(f"the server grew from {self.first_size:,} to {size:,} bytes")
        statuses = sorted(self.statuses.items(), key=str)
        answers = ", ".join(f"{n:,} times {status}" for status, n in statuses)
        return f"{self.count:,} {self.name} ({answers}), the server has {size / 1e6:.0f} MB"

    async def send(self, until: float) -> None:
        async def client() -> None:
            while time.monotonic() < until:
                self.count += 1
                await self.one(f"{self.seed}/{self.count}")

        await asyncio.gather(*(client() for _ in range(CLIENTS)))

    async def one(self, seed: str) -> None:
        chance = random.Random(seed)
        sent, expected = drawn(chance)
        gone_after = 0.3 if expected == -1 else None
        if chance.random() < 0.05:
            gone_after = chance.uniform(0, 0.05)
        try:
            answer = await exchange(self.server.port, sent, gone_after)
        except (OSError, asyncio.TimeoutError) as error:
            raise Lost(f"seed {seed}: no answer ({error!r}) to {sent[:2000]!r}") from error
        status = status_of(answer)
        self.statuses[status or "no answer"] += 1
        wrong = gone_after is None and (status == 0 or (expected == 200 and status != 200))
        if wrong or status >= 500:
            raise Lost(f"seed {seed}: {answer[:2000]!r} to {sent[:2000]!r}")

    def close(self) -> None:
        """End the server."""
        self.server.close()
