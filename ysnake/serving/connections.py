"""Limits for connections, so that slow or malicious clients do not block others.

A request must arrive completely within a time limit. At the limit of connections, the one that has
been sending its request for longest is closed. So the process never runs out of file descriptors.
"""

import asyncio
import socket
from collections.abc import Callable
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

MOST = 4000  # connections at once
RESERVED = 192  # file descriptors for everything else
BACKLOG = 16  # connections that are accepted at a time, before others are closed for them
WHOLE_WITHIN = 30.0  # seconds in which a request must arrive
TAKEN_WITHIN = 60.0  # seconds in which a client must receive some of its reply


def most_connections() -> int:
    """How many connections the process has file descriptors for. Asks the system for more."""
    try:
        import resource
    except ImportError:  # Windows, which has no such limit
        return MOST
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST + RESERVED
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return MOST
    soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return max(1, min(MOST, soft - RESERVED))


def protocol(most: int, whole_within: float = WHOLE_WITHIN) -> type[H11Protocol]:
    """uvicorn's protocol class, with the limits and at most `most` connections."""
    unfinished: dict[Any, asyncio.TimerHandle] = {}  # by connection, oldest first

    class Connection(H11Protocol):
        stalled: asyncio.TimerHandle | None = None  # runs while the client takes no data

        def connection_made(  # type: ignore[override]  # of a TCP transport, as uvicorn's
            self, transport: asyncio.Transport
        ) -> None:
            super().connection_made(transport)
            if len(self.connections) > most:
                oldest = next(iter(unfinished), self)
                oldest.finished()
                oldest.transport.abort()
            self.update()

        def connection_lost(self, exc: Exception | None) -> None:
            self.finished()
            self.resume_writing()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self.update()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            self.update()

        def pause_writing(self) -> None:
            super().pause_writing()
            self.stalled = self.loop.call_later(TAKEN_WITHIN, self.transport.abort)

        def resume_writing(self) -> None:
            super().resume_writing()
            if self.stalled is not None:
                self.stalled.cancel()
                self.stalled = None

        def update(self) -> None:
            """Start or stop the time limit of the next request."""
            if self.conn.their_state not in (h11.IDLE, h11.SEND_BODY):
                self.finished()
            elif self not in unfinished and not self.transport.is_closing():
                unfinished[self] = self.loop.call_later(whole_within, self.transport.abort)

        def finished(self) -> None:
            timer = unfinished.pop(self, None)
            if timer is not None:
                timer.cancel()

    return Connection


class Server(uvicorn.Server):
    """uvicorn's server, which ends running completions when it is asked to stop."""

    def __init__(self, config: uvicorn.Config, stop: Callable[[], None]):
        super().__init__(config)
        self.stop = stop

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for listener in sockets or []:
            listener.listen(1024)  # connections that the system lets wait

    def handle_exit(self, *args: Any) -> None:
        self.stop()  # streams end, so that the server need not wait for them
        super().handle_exit(*args)
