"""Running the server: it listens at a socket and answers requests until Ctrl-C.

The event loop reads requests and writes replies. `ysnake.inference.batch` decodes them all in one
batch in a thread of its own and hands text over once a step.
"""

import contextlib
import socket

from ysnake.serving.options import Options
from ysnake.shared.errors import InputError
from ysnake.shared.shown import escape_controls


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
        reason = getattr(error, "strerror", None) or error
        raise InputError(
            f"{options.host}:{options.port}: {reason}; choose others", field="--host, --port"
        ) from error
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # send each token immediately
    return listener


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
    with contextlib.suppress(KeyboardInterrupt):  # uvicorn raises it again after the shutdown
        connections.Server(config, service.stop).run(sockets=[listener])
