"""`python -m ysnake.serve`: a trained model behind Ollama's HTTP API, OpenAI's, and a page.

The event loop reads requests and writes replies; `ysnake.batch` decodes them all in one batch in a
thread of its own and hands text over once a step. The parts are in `ysnake.serving`.
"""

import contextlib
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from ysnake.shared import cli
from ysnake.shared.errors import InputError
from ysnake.shared.shown import escape_controls

KEY_VARIABLE = "YSNAKE_API_KEY"


@dataclass
class Options:
    """Serve a trained model: Ollama's API, OpenAI's completions, and a page to type into."""

    path: Positional[Annotated[Path | None, arg(metavar="PATH")]] = None
    """A run or a checkpoint folder; by default the newest run."""
    checkpoint: Literal["best", "last"] | None = None
    """Which checkpoint of a run; by default best where patience ended it, else last."""
    host: str = "127.0.0.1"
    """The address to listen at; 0.0.0.0 or :: lets other machines in, which need a key."""
    port: int = 11435
    """The port to listen at; 0 takes a free one."""
    name: str | None = None
    """What clients call the model; by default the name of its folder."""
    parallel: int = 32
    """Completions written at once, in one batch."""
    waiting: int = 96
    """Further requests that may wait for their turn; more are refused."""
    remember: int = 32
    """Prompts whose state is kept, so that what begins with one is not read again."""
    share_prompts: bool = False
    """Read a prompt on from what any client has sent, and count those tokens in replies. A client
    can then find out what others have sent. By default each address has its own."""
    api_key: Annotated[str | None, arg(metavar="KEY")] = None
    """What clients must send as `Authorization: Bearer KEY`; by default YSNAKE_API_KEY, a variable
    that other users of this machine cannot see."""
    without_key: bool = False
    """Let other machines in without a key."""
    allow_host: Annotated[tuple[str, ...], arg(metavar="NAME...")] = ()
    """Further names by which clients may reach this machine, as behind a proxy."""
    allow_origin: Annotated[tuple[str, ...], arg(metavar="URL...")] = ()
    """Sites whose pages may use the server, such as https://example.org; * means all."""
    max_tokens: int = 4096
    """Tokens that one request may ask for."""
    max_prompt: int = 32768
    """Tokens that a prompt may have."""
    max_body: int = 1_000_000
    """Bytes that a request may have."""
    weights: Literal["float32", "int8"] = "float32"
    """int8 writes faster on a CPU, and nearly the same."""
    compile: bool = False
    """Write faster on a CPU, for some seconds at the start: torch.compile, with a C++ compiler."""
    device: str = "auto"
    """auto (CUDA, else CPU), cpu, cuda or mps."""
    threads: int | None = None
    """Threads on the CPU; by default one for each core."""


def check(options: Options) -> None:
    """See that the options can work.

    Raises:
        InputError: one cannot, named.
    """
    for name in ("parallel", "max_tokens", "max_prompt", "max_body"):
        if getattr(options, name) < 1:
            flag = name.replace("_", "-")
            raise InputError(f"--{flag}: expected at least 1, got {getattr(options, name)}")
    for name in ("waiting", "remember", "port"):
        if getattr(options, name) < 0:
            raise InputError(f"--{name}: expected at least 0, got {getattr(options, name)}")
    key = options.api_key
    if key is not None and not (key and key.isascii() and key.isprintable() and " " not in key):
        raise InputError(f"--api-key, {KEY_VARIABLE}: expected ASCII characters without spaces")
    for origin in options.allow_origin:
        if origin != "*" and not origin.startswith(("http://", "https://")):
            raise InputError(f"--allow-origin: expected https://NAME or *, got {origin}")


def listen(options: Options) -> socket.socket:
    """A socket at the address that the options name."""
    ipv6 = ":" in options.host
    try:
        listener = socket.create_server(
            (options.host, options.port),
            family=socket.AF_INET6 if ipv6 else socket.AF_INET,
            backlog=1024,
            dualstack_ipv6=options.host == "::" and socket.has_dualstack_ipv6(),
        )
    except (OSError, OverflowError) as error:
        raise InputError(f"--host, --port: {options.host}:{options.port}: {error}") from error
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # a token leaves at once
    return listener


def main(argv: list[str]) -> int:
    """Serve as the command line says until Ctrl-C; returns the exit code."""
    options = cli.parse(Options, argv, "serve")
    if options.api_key is None:
        options.api_key = os.environ.get(KEY_VARIABLE)
    check(options)
    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise InputError(
            f"serving needs {error.name}: pip install -c constraints.txt -e '.[serve]'"
        ) from error
    with listen(options) as listener:
        from ysnake.serving.guard import is_local

        if not (is_local(options.host) or options.api_key or options.without_key):
            raise InputError(
                f"--api-key: expected a key, as --host {options.host} lets other machines in; "
                f"{KEY_VARIABLE} can hold it, and --without-key does without"
            )
        serve(options, listener)
    return cli.DONE


def serve(options: Options, listener: socket.socket) -> None:
    """Answer requests until Ctrl-C."""
    import uvicorn

    from ysnake.serving import connections, error_log
    from ysnake.serving.application import application
    from ysnake.serving.service import load

    service = load(options)
    error_log.install()
    config = uvicorn.Config(
        application(service),
        loop="asyncio",
        http=connections.protocol(connections.most_connections()),
        ws="none",
        backlog=connections.BACKLOG,
        log_config=None,
        access_log=False,
        proxy_headers=False,
        timeout_graceful_shutdown=5,
    )
    host = f"[{options.host}]" if ":" in options.host else options.host
    address = f"http://{host}:{listener.getsockname()[1]}"
    name = escape_controls(service.name)
    print(f"{name} is at {address}  (a page, /api and /v1; Ctrl-C ends it)", flush=True)
    with contextlib.suppress(KeyboardInterrupt):  # raised again by uvicorn, once all has ended
        connections.Server(config, service.stop).run(sockets=[listener])


if __name__ == "__main__":
    cli.run(main)
