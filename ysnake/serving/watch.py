"""The server of `ysnake watch`: a page with the curves of all runs, from their files.

The page asks for what is new every few seconds. A run's metrics are read from the byte where the
last answer ended, so a long run costs no more than a short one.
"""

from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import Route

from ysnake.serving.application import PAGE_HEADERS, reply
from ysnake.serving.guard import Guard
from ysnake.serving.options import Options
from ysnake.shared import run_files
from ysnake.shared.errors import InputError
from ysnake.shared.files import read_json

PAGE = Path(__file__).with_name("watch.html")
MOST_BYTES = 1 << 22  # of metrics in one answer; the page asks again for the rest
SAMPLE_BYTES = 1 << 14  # at the end of samples.txt
SHOWN = (
    *("step", "seconds", "train_loss", "val_loss", "bits_per_byte"),
    *("tokens_per_s", "peak_memory", "resumed"),
)


def application(folder: Path, options: Options) -> Starlette:
    """Make the application.

    Args:
        folder: the folder that holds the runs.
        options: host and port, from which follows who may ask.
    """

    async def page(request: Request) -> Response:
        return FileResponse(PAGE, headers=PAGE_HEADERS)

    async def listed(request: Request) -> Response:
        return reply(
            {"folder": str(folder.resolve()), "runs": await run_in_threadpool(runs, folder)}
        )

    async def one(request: Request) -> Response:
        name = request.path_params["name"]
        start = request.query_params.get("from", "0")
        if not (start.isascii() and start.isdigit() and len(start) < 16):
            return reply({"error": "from: expected a number of bytes"}, 400)
        if name not in names(folder):
            return reply({"error": f"{name[:100]}: no such run"}, 404)
        return reply(await run_in_threadpool(news, folder / name, int(start)))

    routes = [Route("/", page), Route("/runs", listed), Route("/runs/{name}", one)]
    return Starlette(routes=routes, middleware=[Middleware(Guard, options=options)])


def names(folder: Path) -> list[str]:
    """The names of the runs in a folder, the newest first."""
    found = [path.parent for path in folder.glob("*/settings.json") if path.parent.name[0] != "."]
    return [path.name for path in sorted(found, key=run_files.changed, reverse=True)]


def runs(folder: Path) -> list[dict[str, Any]]:
    """What the list of the page says of each run."""
    return [about(folder / name) for name in names(folder)]


def about(run: Path) -> dict[str, Any]:
    """Name, state and ends of a run. A run that cannot be read says why."""
    try:
        settings = read_json(run / run_files.SETTINGS)
        ends = {name: settings.get(name) for name in ("max_steps", "max_minutes")}
        state, changed = run_files.state(run), run_files.changed(run)
        return {"name": run.name, "state": state, "changed": changed, **ends}
    except (InputError, OSError, AttributeError) as error:
        return {"name": run.name, "state": f"cannot be read: {error}", "changed": 0}


def news(run: Path, start: int) -> dict[str, Any]:
    """The metrics from a byte on, and the latest samples.

    `end` is where to go on. It is smaller than `start` where a resumed run has cut lines off; the
    page then begins anew.
    """
    path = run / run_files.METRICS
    size = path.stat().st_size if path.exists() else 0
    text = b""
    if start < size:
        with path.open("rb") as file:
            file.seek(start)
            text = file.read(MOST_BYTES)
        text = text[: text.rfind(b"\n") + 1]  # an incomplete line comes with the next answer
    lines = [{k: line.get(k) for k in SHOWN} for line in run_files.parse_metrics(text)]
    return {
        **about(run),
        "lines": lines,
        "end": start + len(text) if start <= size else 0,
        "samples": tail(run / run_files.SAMPLES),
    }


def tail(path: Path) -> str:
    """The end of a text file."""
    if not path.exists():
        return ""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - SAMPLE_BYTES))
        return file.read().decode("utf-8", "replace")
