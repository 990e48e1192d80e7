"""`python -m ysnake.serve`: a trained model behind Ollama's HTTP API, OpenAI's, and a page.

The server and its options are in `ysnake.serving`.
"""

import os

from ysnake.serving.options import KEY_VARIABLE, Options, check
from ysnake.serving.server import listen, serve
from ysnake.shared import cli
from ysnake.shared.errors import InputError


def main(argv: list[str], program: str = cli.MODULES) -> int:
    """Serve as the command line says until Ctrl-C; returns the exit code."""
    options = cli.parse(Options, argv, cli.command_line("serve", program))
    if options.api_key is None:
        options.api_key = os.environ.get(KEY_VARIABLE)
    check(options)
    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise InputError(
            f'serving needs {error.name}: pip install -c constraints.txt -e ".[serve]"'
        ) from error
    with listen(options) as listener:
        from ysnake.serving.guard import is_local

        if not (is_local(options.host) or options.api_key or options.without_key):
            raise InputError(
                f"--host {options.host} lets other machines connect, so a key is needed; set "
                f"{KEY_VARIABLE}, or give --without-key to let them in without one",
                field="--api-key",
            )
        serve(options, listener)
    return cli.DONE


if __name__ == "__main__":
    cli.run(main)
