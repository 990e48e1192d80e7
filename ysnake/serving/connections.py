"""Connections that send half a request, or take no reply, do not keep others from being served.

A request must arrive whole in time. Where all places for connections are taken, the one that has
been sending its request for longest makes room. So the process never runs out of descriptors.
"""

import asyncio
import socket

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

MOST = 4000  # connections at once
RESERVED = 192  # file descriptors for everything else
BACKLOG = 16  # connections that are accepted at a time, before others are closed to make room
WHOLE_WITHIN = 30.0  # seconds in which a request must be whole
TAKEN_WITHIN = 60.0  # seconds in which a client must take something of its reply


def most_connections() -> int:
    """How many connections the process has file descriptors for; asks the system for enough."""
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
    """uvicorn's protocol for connections, of which there are at most `most`."""
    unfinished: dict[H11Protocol, asyncio.TimerHandle] = {}  # the first waits longest

    class Connection(H11Protocol):
        stalled: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:
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
            """Note whether the next request is still to come, or to be completed."""
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
    """uvicorn's server, which ends what is being written when it is told to stop."""

    def __init__(self, config: uvicorn.Config, stop):
        super().__init__(config)
        self.stop = stop

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for listener in sockets or []:
            listener.listen(1024)  # so many may wait in the system to be accepted

    def handle_exit(self, *args) -> None:
        self.stop()  # streams end, so that the server need not wait for them
        super().handle_exit(*args)
