"""The speed of `ysnake.serve` in tokens a second, for one client and for many at once.

    python -m benchmarks.serve runs/NAME

It starts the server in a process of its own. It prints a line for one client, a line for many, and
their ratio. Server and clients share the cores of this machine.
"""

import asyncio
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import tyro

from ysnake.shared import cli

PROMPT = "In the year {} a snake"


@dataclass
class Options:
    """Measure the server with a trained model."""

    path: tyro.conf.Positional[Path]
    """A run or a checkpoint folder."""
    clients: int = 32
    """Clients that stream at once."""
    tokens: int = 256
    """Tokens that each client asks for. A document may end before."""
    rounds: int = 3
    """How often both are measured, in turns. The best result of each counts."""
    threads: int | None = None
    """Threads of the server; by default its own choice."""


async def stream(port: int, name: str, number: int, tokens: int) -> int:
    """Ask for one completion and read it to its end. Returns the number of tokens."""
    options = {"num_predict": tokens, "seed": number}
    body = {"model": name, "prompt": PROMPT.format(1900 + number), "options": options}
    content = json.dumps(body).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"POST /api/generate HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n")
    writer.write(b"Content-Length: %d\r\n\r\n%s" % (len(content), content))
    status = await reader.readline()
    assert b"200" in status, status
    async for line in reader:
        if b'"done": true' in line:
            break
    writer.close()
    return json.loads(line)["eval_count"]


async def measure(port: int, name: str, clients: int, tokens: int) -> float:
    """Tokens a second of this many clients at once."""
    start = time.perf_counter()
    counts = await asyncio.gather(*(stream(port, name, i, tokens) for i in range(clients)))
    return sum(counts) / (time.perf_counter() - start)


def main(argv: list[str]) -> int:
    """Measure as the command line says."""
    options = tyro.cli(Options, prog="python -m benchmarks.serve", args=argv)
    command = [sys.executable, "-m", "ysnake.serve", str(options.path), "--port", "0"]
    command += ["--name", "snake", "--parallel", str(options.clients)]
    if options.threads is not None:
        command += ["--threads", str(options.threads)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        port = int(server.stdout.readline().split("  ")[0].rsplit(":", 1)[1])
        best = {1: 0.0, options.clients: 0.0}
        asyncio.run(measure(port, "snake", options.clients, 8))
        for _ in range(options.rounds):
            for clients in best:
                speed = asyncio.run(measure(port, "snake", clients, options.tokens))
                best[clients] = max(best[clients], speed)
        for clients, speed in best.items():
            print(f"{clients:3} clients: {speed:7.0f} tokens/s")
        print(f"{best[options.clients] / best[1]:.1f} times one client's")
    finally:
        server.terminate()
        server.wait()
    return cli.DONE


if __name__ == "__main__":
    cli.run(main)
