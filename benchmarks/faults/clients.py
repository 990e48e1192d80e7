"""Many clients, some of which leave at any moment, and connections that send half a request.

The server must serve every client that stays, and its memory must not grow.
"""

import asyncio
import json
import random
import time
from collections import Counter
from pathlib import Path

from benchmarks.faults.lost import Lost
from benchmarks.faults.requests import NAME, Server, request, status_of

STREAMING = 64  # clients at once
HALF_OPEN = 1000  # connections at once that never complete their request
LEAVING = 0.3  # share of the requests whose client leaves before the end
PATIENCE = 120.0  # seconds within which a client must be served
WARM = 300  # requests before the memory is measured for the first time
GROWTH = 30_000_000  # bytes by which the server may grow after that
HALF = b"POST /api/generate HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 100\r\n\r\n{"


class Clients:
    """The attack on a server."""

    name = "requests of clients"

    def __init__(self, folder: Path, seed: int, half_open: int = HALF_OPEN):
        self.server, self.seed, self.half_open = Server(folder), seed, half_open
        self.count, self.results = 0, Counter()
        self.longest, self.reopened = 0.0, 0
        self.sizes: list[int] = []

    def go(self, seconds: float) -> str:
        """Let the clients ask for this many seconds. Returns a summary of all so far."""
        asyncio.run(self.ask(time.monotonic() + seconds))
        self.server.check()
        if self.count >= WARM:
            self.sizes.append(self.server.size())
            if self.sizes[-1] > self.sizes[0] + GROWTH:
                raise Lost(f"the server grew from {self.sizes[0]:,} to {self.sizes[-1]:,} bytes")
        sizes = [size / 1e6 for size in self.sizes] or [0]
        return (
            f"{self.count:,} {self.name}: {self.results['served']:,} served, the slowest in "
            f"{self.longest:.1f} s, {self.results['left']:,} left before; {self.reopened:,} "
            f"half-open connections were closed by the server and opened anew; the server has "
            f"{min(sizes):.0f} to {max(sizes):.0f} MB"
        )

    async def ask(self, until: float) -> None:
        waiting = [self.stay_half_open(until) for _ in range(self.half_open)]
        await asyncio.gather(*(self.client(until) for _ in range(STREAMING)), *waiting)

    async def stay_half_open(self, until: float) -> None:
        """Send half a request. Do it again whenever the server closes the connection."""
        while (left := until - time.monotonic()) > 0:
            writer = None
            try:
                reader, writer = await asyncio.open_connection("127.0.0.1", self.server.port)
                writer.write(HALF)
                await asyncio.wait_for(reader.read(-1), left)
                self.reopened += 1
            except asyncio.TimeoutError:
                pass
            except OSError:
                self.reopened += 1
            finally:
                if writer is not None:
                    writer.transport.abort()

    async def client(self, until: float) -> None:
        while time.monotonic() < until:
            self.count += 1
            chance = random.Random(f"{self.seed}/{self.count}")
            began = time.monotonic()
            try:
                await asyncio.wait_for(self.one(chance), PATIENCE)
            except (OSError, asyncio.TimeoutError) as error:
                raise Lost(f"a client was not served: {error!r}") from error
            self.longest = max(self.longest, time.monotonic() - began)

    async def one(self, chance: random.Random) -> None:
        """Stream a completion to its end, or leave after some lines."""
        words = " ".join(chance.choice(("The", "boa", "sleeps", "7")) for _ in range(20))
        options = {"num_predict": chance.randint(1, 48), "seed": chance.randrange(1000)}
        body = {"model": NAME, "prompt": words, "options": options}
        leaves_after = chance.randint(0, 8) if chance.random() < LEAVING else None
        reader, writer = await asyncio.open_connection("127.0.0.1", self.server.port)
        try:
            writer.write(request("/api/generate", json.dumps(body).encode()))
            if leaves_after is not None:
                for _ in range(leaves_after):
                    await reader.readline()
                self.results["left"] += 1
                return
            answer = await reader.read(-1)
        finally:
            writer.transport.abort()
        if status_of(answer) != 200 or b'"done": true' not in answer:
            raise Lost(f"a client was not served: {answer[-500:]!r} to {body}")
        self.results["served"] += 1

    def close(self) -> None:
        """End the server."""
        self.server.close()
