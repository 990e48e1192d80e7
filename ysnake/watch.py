"""`python -m ysnake.watch`: a local page with the curves of all runs, while they train."""

import contextlib
from dataclasses import dataclass

from ysnake.shared import cli
from ysnake.shared.errors import InputError


@dataclass
class Options:
    """Show all runs in runs/ on a local page: losses, samples, speed, memory and time left. It
    follows runs in training. Only this machine can open it."""

    port: int = 11436
    """The port to listen at. 0 means any free one."""


def main(argv: list[str], program: str = cli.MODULES) -> int:
    """Serve the page until Ctrl-C; returns the exit code."""
    options = cli.parse(Options, argv, cli.command_line("watch", program))
    try:
        import uvicorn

        from ysnake.serving.watch import application
    except ImportError as error:
        raise InputError(
            f'the page needs {error.name}: pip install -c constraints.txt -e ".[serve]"'
        ) from error
    from ysnake.serving.options import Options as Serving
    from ysnake.serving.options import check
    from ysnake.serving.server import listen

    serving = Serving(port=options.port)
    check(serving)
    with listen(serving) as listener:
        app = application(cli.RUNS, serving)
        config = uvicorn.Config(
            app, ws="none", log_config=None, access_log=False, proxy_headers=False, lifespan="off"
        )
        address = f"http://{serving.host}:{listener.getsockname()[1]}"
        print(f"the runs in {cli.RUNS.resolve()} are at {address}  (Ctrl-C ends it)", flush=True)
        with contextlib.suppress(KeyboardInterrupt):  # uvicorn raises it again after the shutdown
            uvicorn.Server(config).run(sockets=[listener])
    return cli.DONE


if __name__ == "__main__":
    cli.run(main)
