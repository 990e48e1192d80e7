"""Talking to an Ollama server: whether it has the model, and complete answers to prompts.

The server is not trusted. The size of its replies is limited, and its messages are shown in one
line.
"""

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import httpx

from ysnake.shared.errors import InputError
from ysnake.shared.shown import escape_controls

if TYPE_CHECKING:
    from ollama import AsyncClient, Client
    from rich.console import Console

FIRST_WAIT = 0.5  # seconds before a request is tried again; doubled each time
CONNECT, SILENCE = 10.0, 600.0  # seconds to wait for a connection, and for any part of an answer
LARGEST_REPLY = 1 << 26  # bytes of a reply that is not an answer to a prompt
TOKEN_BYTES = 4096  # bytes of an answer for each token asked for; a token takes about 200

Answer = tuple[str, bool]  # a text, and whether it was cut at the limit
AnyClient = TypeVar("AnyClient", "Client", "AsyncClient")


class ServerError(Exception):
    """The server does not work as it should. The message is one line and names the server."""


def host() -> str:
    """The address of the server, as the user gave it."""
    return os.environ.get("OLLAMA_HOST") or "127.0.0.1:11434"


def connect(kind: type[AnyClient], most: int = LARGEST_REPLY) -> AnyClient:
    """A client whose replies have at most `most` bytes, except for the progress of a pull."""

    def bound(response: httpx.Response) -> None:
        if response.headers.get("content-encoding", "identity") != "identity":
            raise httpx.DecodingError("compressed, which was not asked for")
        if response.request.url.path != "/api/pull":
            response.stream = _Bounded(response.stream, most)

    async def bound_later(response: httpx.Response) -> None:
        bound(response)

    hook = bound_later if kind.__name__ == "AsyncClient" else bound
    return kind(
        timeout=httpx.Timeout(SILENCE, connect=CONNECT),
        event_hooks={"response": [hook]},
        headers={"Accept-Encoding": "identity"},
    )


class _Bounded(httpx.SyncByteStream, httpx.AsyncByteStream):
    """The bytes of a reply as they arrive. Raises an error once there are too many."""

    def __init__(self, stream: Any, most: int):
        self.stream, self.left, self.most = stream, most, most

    def _count(self, piece: bytes) -> bytes:
        self.left -= len(piece)
        if self.left < 0:
            raise httpx.DecodingError(f"it did not end within {self.most:,} bytes")
        return piece

    def __iter__(self) -> Iterator[bytes]:
        return map(self._count, self.stream)

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for piece in self.stream:
            yield self._count(piece)

    def close(self) -> None:
        self.stream.close()

    async def aclose(self) -> None:
        await self.stream.aclose()


def explain(error: Exception) -> str:
    """One line that says what went wrong with a request."""
    from ollama import ResponseError

    if isinstance(error, ConnectionError | httpx.ConnectError | httpx.ConnectTimeout):
        return (
            f"no Ollama server answers at {host()}; start it with `ollama serve`, "
            "or name another in OLLAMA_HOST"
        )
    if isinstance(error, httpx.TimeoutException):
        return f"{host()}: no answer for {SILENCE:.0f} seconds"
    said = str(error.error if isinstance(error, ResponseError) else error)
    said = escape_controls(" ".join(said.split())[:200])
    if isinstance(error, ResponseError) and error.status_code > 0:
        return f"{host()}: answered {error.status_code}: {said}"
    return f"{host()}: broke off in the middle of an answer ({said})"


def prepare(model: str, may_pull: bool, console: "Console") -> None:
    """Check that the server answers and has the model. Pull the model if the user agrees.

    Raises:
        ServerError: there is no server, or it is not Ollama.
        InputError: the model is missing and must not be pulled.
    """
    wrong_host = InputError(f"expected HOST:PORT, got {host()!r}", field="OLLAMA_HOST")
    try:
        import ollama  # the import creates a client, so a bad OLLAMA_HOST fails here

        client = connect(ollama.Client)
    except (ValueError, httpx.InvalidURL) as error:
        raise wrong_host from error
    try:
        there = [model.model or "" for model in client.list().models]
        if has_model(client, model):
            return
        if not may_pull and not confirmed(f"{model} is not pulled. Pull it now?"):
            raise missing_model(model, there)
        pull(client, model, console)
    except InputError:
        raise
    except httpx.UnsupportedProtocol as error:
        raise wrong_host from error
    except (httpx.TransportError, ConnectionError, ollama.ResponseError) as error:
        raise ServerError(explain(error)) from error
    except (*_NOT_OLLAMA, httpx.RequestError, httpx.InvalidURL) as error:
        said = escape_controls((str(error) or type(error).__name__).splitlines()[0][:200])
        raise ServerError(f"{host()}: does not answer as Ollama does ({said})") from error


# what the client raises for an answer that is not JSON, or has another structure
_NOT_OLLAMA = (ValueError, TypeError, AttributeError, RecursionError)


def has_model(client: "Client", model: str) -> bool:
    """Whether the server has the model."""
    import ollama

    try:
        client.show(model)
    except ollama.ResponseError as error:
        if error.status_code != 404:
            raise
        return False
    return True


def missing_model(model: str, there: Sequence[str] = ()) -> InputError:
    """The error for a model that the server does not have."""
    others = f" (there: {', '.join(there)[:300]})" if there else ""
    return InputError(
        f"{model} is not pulled at {host()}{others}; `ollama pull {model}` or --pull downloads it",
        field="--model",
    )


def confirmed(question: str) -> bool:
    """Ask the user on the terminal. False without a terminal."""
    from rich.prompt import Confirm

    if not sys.stdin.isatty():
        return False
    try:
        return Confirm.ask(question, default=True)
    except EOFError:
        return False


def pull(client: "Client", model: str, console: "Console") -> None:
    """Let the server download a model, and show the progress."""
    import ollama
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    try:
        with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as bar:
            shown = bar.add_task(f"pulling {model}", total=None)
            for part in client.pull(model, stream=True):
                if part.total:
                    bar.update(shown, total=part.total, completed=part.completed or 0)
    except ollama.ResponseError as error:
        raise InputError(
            f"{host()} cannot pull {model}: {error.error[:200]}", field="--model"
        ) from error
    if not has_model(client, model):
        raise ServerError(f"{host()}: broke off while pulling {model}; pull it again to continue")


async def ask(
    client: "AsyncClient", model: str, prompt: str, system: str, settings: dict[str, Any]
) -> Answer:
    """The complete answer of the model. `settings` are Ollama's options.

    Raises:
        ValueError: the answer is incomplete, or not in Ollama's format.
    """
    parts, reason = [], None
    try:
        stream = await client.generate(model, prompt, system=system, stream=True, options=settings)
        async for part in stream:
            parts.append(part.response or "")
            if part.done:
                reason = part.done_reason or "stop"
    except (TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"it is not in Ollama's format: {error}") from error
    if reason is None:
        raise ValueError("it has no end")
    # JSON may hold halves of surrogate pairs, which no file can hold: each becomes "?"
    text = "".join(parts).encode("utf-8", "replace").decode()
    return text, reason == "length"


async def with_retries(
    request: Callable[[], Awaitable[Answer]],
    model: str,
    retries: int,
    print_line: Callable[[str], None],
) -> Answer:
    """Send a request, and repeat it after growing pauses while the server may recover.

    Raises:
        ServerError: the server did not recover, or refuses the request.
        InputError: the server does not have the model.
    """
    from ollama import ResponseError

    for attempt in range(retries + 1):
        try:
            return await request()
        except (httpx.RequestError, ConnectionError, ResponseError, ValueError) as error:
            status = getattr(error, "status_code", -1)
            if status == 404:
                raise missing_model(model) from error
            if attempt == retries or (400 <= status < 500 and status != 429):
                raise ServerError(explain(error)) from error
            wait = FIRST_WAIT * 2**attempt
            print_line(f"{explain(error)}; trying again in {wait:g} s")
        await asyncio.sleep(wait)
    raise AssertionError("the last attempt returns or raises")
