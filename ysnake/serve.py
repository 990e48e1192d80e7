"""`python -m ysnake.serve`: a trained model behind Ollama's HTTP API, OpenAI's, and a page.

The event loop reads requests and writes replies; `ysnake.batch` decodes them all in one batch in a
thread of its own and hands text over once a step. A model of ours completes text, so a chat is one
text: each message begins a paragraph, save that what the assistant wrote goes on where it did.
"""

import asyncio
import contextlib
import json
import math
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal
from uuid import uuid4

from tyro.conf import Positional, arg

from ysnake import __version__, cli
from ysnake.config import InputError
from ysnake.sampling import Sampling

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from tokenizers import Tokenizer

    from ysnake.batch import Batch, Job, News
    from ysnake.decoding import Decoder

LOCAL = ("127.0.0.1", "localhost", "::1")
PAGE = Path(__file__).with_name("page.html")
# the page is whole in itself: nothing else may be loaded, whatever a model writes
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
POLICY += "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'"

Body = dict[str, Any]


@dataclass
class Options:
    """Serve a trained model: Ollama's API, OpenAI's completions, and a page to type into."""

    path: Positional[Annotated[Path | None, arg(metavar="PATH")]] = None
    """A run or a checkpoint folder; by default the newest run."""
    checkpoint: Literal["best", "last"] | None = None
    """Which checkpoint of a run; by default best where patience ended it, else last."""
    host: str = "127.0.0.1"
    """The address to listen at; 0.0.0.0 lets other machines in."""
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


class Refused(Exception):
    """A request that is answered with an error; the message says what is wrong with it."""

    def __init__(self, message: str, status: int = 400, code: str | None = None):
        super().__init__(message)
        self.message, self.status, self.code = message, status, code


# ------------------------------------------------------------------ what is served


@dataclass
class Service:
    """The model as its clients know it, and the requests that are under way."""

    options: Options
    name: str
    decoder: "Decoder"
    n_parameters: int
    size: int  # of the weights, in bytes
    tokenizer: "Tokenizer"
    modified: datetime
    digest: str
    batch: "Batch | None" = None  # while the application runs
    queues: dict["Job", asyncio.Queue] = field(default_factory=dict)

    def start(self) -> None:
        """Start the batch; its news come to the event loop that runs now."""
        from ysnake.batch import Batch

        loop = asyncio.get_running_loop()

        def deliver(news: "News") -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(self.hand_out, news)

        o = self.options
        self.batch = Batch(self.decoder, self.tokenizer, deliver, o.parallel, o.remember)

    def hand_out(self, news: "News") -> None:
        """Give each request its text; None ends it."""
        for job, text, ended in news:
            if job in self.queues:
                self.queues[job].put_nowait(text)
                if ended:
                    self.queues[job].put_nowait(None)

    def submit(self, job: "Job") -> None:
        """Let a job take its place, which it has until `release`."""
        if len(self.queues) >= self.options.parallel + self.options.waiting:
            raise Refused("server busy: too many requests are waiting, try again", 429)
        self.queues[job] = asyncio.Queue()
        self.batch.submit(job)

    def release(self, job: "Job") -> None:
        """Free the place of a job, whether it ended or nobody waits for it any more."""
        job.gone = True
        del self.queues[job]

    async def text(self, job: "Job") -> AsyncIterator[str]:
        """The text of a job as it is written; what has come since is one piece."""
        queue, ended = self.queues[job], False
        while not ended:
            pieces = [await queue.get()]
            while not queue.empty():
                pieces.append(queue.get_nowait())
            ended = pieces[-1] is None
            if text := "".join(pieces[:-1] if ended else pieces):
                yield text

    async def prompt_ids(self, text: str) -> tuple[int, ...]:
        """The tokens of a prompt, behind the one that begins a document."""
        from ysnake.tokenizer import encode

        # a long text takes a while; meanwhile the others go on
        ids = await asyncio.to_thread(encode, self.tokenizer, text)
        most, bos = self.options.max_prompt, self.decoder.model.config.bos_id
        if len(ids) > most:
            message = f"prompt: expected at most {most} tokens, got {len(ids)}"
            raise Refused(message, code="context_length_exceeded")
        return tuple(ids) if bos is None else (bos, *ids)

    def check_name(self, body: Body) -> None:
        """Refuse a request for another model."""
        asked = take(body, "model", str) or take(body, "name", str)
        if not asked:
            raise Refused("model: expected the name of a model")
        if asked.removesuffix(":latest") != self.name:
            raise Refused(f"model '{asked}' not found", 404, "model_not_found")


def load(options: Options) -> Service:
    """Read the model and what is told about it."""
    from hashlib import sha256

    import torch

    from ysnake import checkpoint
    from ysnake.decoding import Decoder

    path = options.path or cli.newest_run()
    cli.tune_memory()
    cli.use_threads(options.threads)
    device = cli.pick_device(options.device)
    folder, tokenizer, model = checkpoint.load_all(path, options.checkpoint, device)
    n_parameters = model.n_parameters()
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    digest = sha256()
    for weight in model.parameters():
        digest.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy())
    full = folder.resolve()
    own_name = full.parent.name if full.name in ("best", "last") else full.name
    modified = datetime.fromtimestamp(folder.stat().st_mtime, timezone.utc)
    name = (options.name or own_name).removesuffix(":latest")
    about = (n_parameters, size, tokenizer, modified, digest.hexdigest())
    decoder = Decoder(model, options.weights, options.compile)
    if options.compile:  # what it makes for two and more rows, before anybody waits for it
        for rows in range(2, min(options.parallel, 3) + 1):
            decoder.step(torch.zeros(rows, dtype=torch.int64))
    return Service(options, name, decoder, *about)


# ------------------------------------------------------------------ reading requests

KINDS = {str: "a string", bool: "true or false", int: "a whole number", float: "a number"}
KINDS |= {list: "a list", dict: "an object"}


def take(body: Body, name: str, kind: type, default: Any = None) -> Any:
    """A field of a request, of the kind asked for; one that is null or missing is the default."""
    value = body.get(name)
    if value is None:
        return default
    fits = isinstance(value, (int, float) if kind is float else kind)
    if not fits or (isinstance(value, bool) and kind is not bool):
        raise Refused(f"{name}: expected {KINDS[kind]}, got {_shown(value)}")
    return value


def _shown(value: Any) -> str:
    if isinstance(value, (list, dict)):
        return KINDS[type(value)]
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."


def refuse_others(body: Body, neutral: dict[str, tuple]) -> None:
    """Refuse what would change the text and is not built, unless its value changes nothing."""
    for name, values in neutral.items():
        value = body.get(name)
        same = any(value == v and isinstance(value, bool) == isinstance(v, bool) for v in values)
        if value is not None and not same:
            raise Refused(f"{name}: this model does not support it, got {_shown(value)}")


def sampling_of(body: Body, penalty: str) -> Sampling:
    """How to draw, from the fields of a request; what is left out is as in `ysnake.run`."""
    default = Sampling()
    seed = take(body, "seed", int, -1)
    if not -1 <= seed < 2**63:
        raise Refused(f"seed: expected at least 0, or -1 for none, got {seed}")
    try:
        return Sampling(
            temperature=float(take(body, "temperature", float, default.temperature)),
            top_k=take(body, "top_k", int, default.top_k),
            top_p=float(take(body, "top_p", float, default.top_p)),
            repetition_penalty=float(take(body, penalty, float, default.repetition_penalty)),
            seed=None if seed == -1 else seed,
        )
    except InputError as error:
        name, rest = str(error).split(":", 1)
        name = name.removeprefix("--").replace("-", "_").replace("repetition_penalty", penalty)
        raise Refused(f"{name}:{rest}") from error
    except OverflowError as error:
        raise Refused(f"temperature, top_p: {error}") from error


def stops_of(body: Body) -> tuple[str, ...]:
    """The stop texts of a request: one, or a list of at most 16."""
    stop = body.get("stop")
    stops = [] if stop is None else [stop] if isinstance(stop, str) else take(body, "stop", list)
    if len(stops) > 16 or not all(isinstance(s, str) and 0 < len(s) <= 1000 for s in stops):
        raise Refused("stop: expected at most 16 texts of 1 to 1000 characters")
    return tuple(stops)


def max_tokens_of(body: Body, name: str, default: int, most: int) -> int:
    """How many tokens a request asks for; -1 and -2 mean all that are allowed."""
    n = take(body, name, int, default)
    if n in (-1, -2):
        return most
    if not 1 <= n <= most:
        raise Refused(f"{name}: expected 1 to {most}, got {n}")
    return n


async def body_of(request: "Request", most: int) -> Body:
    """The JSON object that a request carries."""
    from starlette.requests import ClientDisconnect

    read = bytearray()
    try:
        async for piece in request.stream():
            read += piece
            if len(read) > most:
                raise Refused(f"body: expected at most {most} bytes", 413)
    except ClientDisconnect as error:
        raise Refused("body: broken off") from error
    try:
        body = json.loads(read, parse_constant=_not_json, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise Refused(f"body: not JSON ({error})") from error
    if not isinstance(body, dict):
        raise Refused("body: expected a JSON object")
    return body


def _not_json(constant: str) -> None:
    raise ValueError(f"{constant} is no number")


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text} is too large")
    return number


# ------------------------------------------------------------------ the two APIs

# what would change the text and is not built, with the values that change nothing
OLLAMA_OTHERS = {
    "suffix": ("",),
    "images": ([],),
    "format": ("",),
    "tools": ([],),
    "context": ([],),
}
OLLAMA_OTHERS |= {"template": ("",), "think": (False,), "logprobs": (False,)}
OPTIONS_OTHERS = {"min_p": (0,), "typical_p": (1,), "tfs_z": (1,), "mirostat": (0,)}
OPTIONS_OTHERS |= {"presence_penalty": (0,), "frequency_penalty": (0,)}
OPENAI_OTHERS = {"suffix": ("",), "n": (1,), "best_of": (1,), "echo": (False,), "logprobs": ()}
OPENAI_OTHERS |= {"logit_bias": ({},), "presence_penalty": (0,), "frequency_penalty": (0,)}


@dataclass
class Asked:
    """What a request asks for, and how its API writes the reply."""

    job: "Job | None"  # None: there is nothing to write
    piece: Callable[[str], Body]  # some text of a stream
    ends: Callable[[], list[Body]]  # what ends a stream
    whole: Callable[[str], Body]  # all in one


async def ollama(service: Service, body: Body, chat: bool) -> Asked:
    """A request to /api/generate or /api/chat."""
    from ysnake.batch import Job

    refuse_others(body, OLLAMA_OTHERS)
    settings = take(body, "options", dict, {})
    refuse_others(settings, OPTIONS_OTHERS)
    most = service.options.max_tokens
    how = {
        "sampling": sampling_of(settings, "repeat_penalty"),
        "max_tokens": max_tokens_of(settings, "num_predict", -1, most),
        "stops": stops_of(settings),
    }
    if chat:
        prompt = conversation(body)
    else:
        texts = (take(body, "system", str, ""), take(body, "prompt", str, ""))
        prompt = "\n\n".join(filter(None, texts)) if texts[1] else ""
    # a prompt without text only asks whether the model is there
    job = Job(await service.prompt_ids(prompt), **how) if prompt else None

    def piece(text: str) -> Body:
        now = datetime.now(timezone.utc).isoformat().replace("+00:00", "Z")
        content = (
            {"message": {"role": "assistant", "content": text}} if chat else {"response": text}
        )
        return {"model": body["model"], "created_at": now, **content, "done": False}

    def whole(text: str) -> Body:
        if job is None:
            return piece("") | {"done": True, "done_reason": "load"}
        return piece(text) | {
            "done": True,
            "done_reason": job.reason,
            "total_duration": job.ended - job.started,
            "load_duration": 0,
            "prompt_eval_count": len(job.ids),
            "prompt_eval_duration": job.read - job.started,
            "eval_count": job.n_written,
            "eval_duration": job.ended - job.read,
        }

    return Asked(job, piece, lambda: [whole("")], whole)


def conversation(body: Body) -> str:
    """The messages of a chat as one text."""
    text = ""
    for i, message in enumerate(take(body, "messages", list, [])):
        if not isinstance(message, dict):
            raise Refused(f"messages[{i}]: expected an object, got {_shown(message)}")
        refuse_others(message, {"images": ([],), "tool_calls": ([],)})
        role, content = take(message, "role", str), take(message, "content", str, "")
        if role not in ("system", "user", "assistant"):
            raise Refused(f"messages[{i}].role: expected system, user or assistant")
        text += content if role == "assistant" or not text else "\n\n" + content
    return text


async def openai(service: Service, body: Body) -> Asked:
    """A request to /v1/completions."""
    from ysnake.batch import Job

    refuse_others(body, OPENAI_OTHERS)
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1:
        prompt = prompt[0]
    if not isinstance(prompt, str):
        raise Refused("prompt: expected a string, or a list of one")
    usage_asked = take(take(body, "stream_options", dict, {}), "include_usage", bool, False)
    sampling, stops = sampling_of(body, "repetition_penalty"), stops_of(body)
    n = max_tokens_of(body, "max_tokens", 16, service.options.max_tokens)
    job = Job(await service.prompt_ids(prompt), sampling, n, stops)
    head = {"id": f"cmpl-{uuid4().hex}", "object": "text_completion", "created": int(time.time())}
    head["model"] = body["model"]

    def piece(text: str, reason: str | None = None) -> Body:
        choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": reason}
        return {**head, "choices": [choice]}

    def usage() -> Body:
        return {
            "prompt_tokens": len(job.ids),
            "completion_tokens": job.n_written,
            "total_tokens": len(job.ids) + job.n_written,
            "prompt_tokens_details": {"cached_tokens": job.n_remembered},
        }

    def ends() -> list[Body]:
        counts = [{**head, "choices": [], "usage": usage()}] if usage_asked else []
        return [piece("", job.reason), *counts]

    return Asked(job, piece, ends, lambda text: piece(text, job.reason) | {"usage": usage()})


def error_body(path: str, message: str, status: int, code: str | None = None) -> Body:
    """An error in the shape that clients of the API at this path read."""
    if not path.startswith("/v1/"):
        return {"error": message}
    kinds = {429: "rate_limit_error", 500: "server_error"}
    kind = kinds.get(status, "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


def tags(service: Service) -> list[Body]:
    """The one model that is here, as Ollama lists it."""
    n = service.n_parameters
    details = {"parent_model": "", "format": "safetensors", "family": "mamba2"}
    details |= {"families": ["mamba2"], "parameter_size": f"{n / 1e6:.1f}M"}
    dtype = str(service.decoder.model.backbone.embeddings.weight.dtype).removeprefix("torch.")
    weights = service.options.weights
    details |= {"quantization_level": dtype if weights == "float32" else weights}
    name, when = f"{service.name}:latest", service.modified.isoformat()
    about = {"name": name, "model": name, "modified_at": when, "size": service.size}
    return [about | {"digest": service.digest, "details": details}]


def show(service: Service) -> Body:
    """What Ollama tells about a model."""
    c, (tag,) = service.decoder.model.config, tags(service)
    info = {"general.architecture": "mamba2", "general.basename": service.name}
    info |= {"general.parameter_count": service.n_parameters}
    info |= {"mamba2.block_count": c.n_layers, "mamba2.embedding_length": c.d_model}
    info |= {
        "mamba2.ssm.state_size": c.d_state,
        "mamba2.context_length": service.options.max_prompt,
    }
    return {
        "modelfile": f"FROM {service.name}\nTEMPLATE {{{{ .Prompt }}}}\n",
        "parameters": "",
        "template": "{{ .Prompt }}",
        "details": tag["details"],
        "model_info": info,
        "capabilities": ["completion"],
        "modified_at": tag["modified_at"],
    }


# ------------------------------------------------------------------ the application


def application(service: Service) -> "Starlette":
    """The routes; the batch runs as long as the application does."""
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.requests import Request
    from starlette.responses import FileResponse, Response, StreamingResponse
    from starlette.routing import Route

    def reply(content: Body, status: int = 200) -> Response:
        return Response(json.dumps(content), status, media_type="application/json")

    def told(content: Callable[[], Body]) -> Callable:
        async def endpoint(request: Request) -> Response:
            return reply(content())

        return endpoint

    async def page(request: Request) -> Response:
        return FileResponse(PAGE, headers={"Content-Security-Policy": POLICY})

    async def about(request: Request) -> Response:
        service.check_name(await body_of(request, service.options.max_body))
        return reply(show(service))

    async def one_model(request: Request) -> Response:
        service.check_name({"model": request.path_params["name"]})
        return reply(listed())

    def listed() -> Body:
        created = int(service.modified.timestamp())
        return {"id": service.name, "object": "model", "created": created, "owned_by": "ysnake"}

    def completing(ask: Callable, frame: str, end: str, media_type: str, streams: bool) -> Callable:
        """The endpoint of requests that `ask` understands; `streams` unless told otherwise."""

        async def lines(asked: Asked, path: str) -> AsyncIterator[str]:
            async for text in service.text(asked.job):
                yield frame % json.dumps(asked.piece(text))
            failed = asked.job.error
            for last in [error_body(path, failed, 500)] if failed else asked.ends():
                yield frame % json.dumps(last)
            yield end

        async def endpoint(request: Request) -> Callable:
            body = await body_of(request, service.options.max_body)
            service.check_name(body)
            stream = take(body, "stream", bool, streams)
            asked = await ask(service, body)
            if asked.job is None:
                return reply(asked.whole(""))
            service.submit(asked.job)

            async def respond(scope: Any, receive: Any, send: Any) -> None:
                try:
                    if stream:
                        text = lines(asked, request.url.path)
                        response = StreamingResponse(text, media_type=media_type)
                    else:
                        response = await whole(request, asked)
                    await response(scope, receive, send)
                finally:
                    service.release(asked.job)

            return respond

        return endpoint

    async def whole(request: Request, asked: Asked) -> Response:
        """All the text at once, or nothing as soon as nobody waits for it."""

        async def collect() -> str:
            return "".join([text async for text in service.text(asked.job)])

        collected, gone = map(asyncio.ensure_future, (collect(), request.receive()))
        try:
            await asyncio.wait({collected, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not collected.done():
                return Response(status_code=499)
        finally:
            collected.cancel()
            gone.cancel()
        if asked.job.error:
            raise Refused(asked.job.error, 500)
        return reply(asked.whole(collected.result()))

    async def refused(request: Request, error: Refused) -> Response:
        content = error_body(request.url.path, error.message, error.status, error.code)
        return reply(content, error.status)

    async def wrong_path(request: Request, error: HTTPException) -> Response:
        content = error_body(request.url.path, error.detail, error.status_code)
        return reply(content, error.status_code)

    async def broken(request: Request, error: Exception) -> Response:
        return reply(error_body(request.url.path, type(error).__name__, 500), 500)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        service.start()
        yield
        service.batch.close()
        await asyncio.to_thread(service.batch.thread.join)

    generate, chat = partial(ollama, chat=False), partial(ollama, chat=True)
    ndjson = {"frame": "%s\n", "end": "", "media_type": "application/x-ndjson", "streams": True}
    events = {"frame": "data: %s\n\n", "end": "data: [DONE]\n\n"}
    events |= {"media_type": "text/event-stream", "streams": False}
    routes = [
        Route("/", page),
        Route("/api/version", told(lambda: {"version": __version__})),
        Route("/api/tags", told(lambda: {"models": tags(service)})),
        Route("/api/ps", told(lambda: {"models": tags(service)})),
        Route("/api/show", about, methods=["POST"]),
        Route("/api/generate", completing(generate, **ndjson), methods=["POST"]),
        Route("/api/chat", completing(chat, **ndjson), methods=["POST"]),
        Route("/v1/models", told(lambda: {"object": "list", "data": [listed()]})),
        Route("/v1/models/{name}", one_model),
        Route("/v1/completions", completing(openai, **events), methods=["POST"]),
    ]
    # a page from elsewhere must not reach a server that only this machine may use
    local = service.options.host in LOCAL
    hosts = [*LOCAL, "[", "*.localhost"] if local else ["*"]
    return Starlette(
        routes=routes,
        lifespan=lifespan,
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=hosts, www_redirect=False)],
        exception_handlers={Refused: refused, HTTPException: wrong_path, Exception: broken},
    )


def main(argv: list[str]) -> int:
    """Serve as the command line says until Ctrl-C; returns the exit code."""
    options = cli.parse(Options, argv, "serve")
    for name in ("parallel", "max_tokens", "max_prompt", "max_body"):
        if getattr(options, name) < 1:
            flag = name.replace("_", "-")
            raise InputError(f"--{flag}: expected at least 1, got {getattr(options, name)}")
    for name in ("waiting", "remember", "port"):
        if getattr(options, name) < 0:
            raise InputError(f"--{name}: expected at least 0, got {getattr(options, name)}")
    try:
        import starlette  # noqa: F401
        import uvicorn
    except ImportError as error:
        raise InputError(
            f"serving needs {error.name}: pip install -c constraints.txt -e '.[serve]'"
        ) from error
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    try:
        listener = socket.create_server((options.host, options.port), family=family, backlog=1024)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # a token leaves at once
    except (OSError, OverflowError) as error:
        raise InputError(f"--host, --port: {options.host}:{options.port}: {error}") from error

    service = load(options)

    class Server(uvicorn.Server):
        def handle_exit(self, *args: Any) -> None:
            if service.batch is not None:
                service.batch.close()  # streams end, so that the server need not wait for them
            super().handle_exit(*args)

    config = uvicorn.Config(
        application(service), log_level="warning", access_log=False, timeout_graceful_shutdown=5
    )
    host = f"[{options.host}]" if ":" in options.host else options.host
    address = f"http://{host}:{listener.getsockname()[1]}"
    print(f"{service.name} is at {address}  (a page, /api and /v1; Ctrl-C ends it)", flush=True)
    with contextlib.suppress(KeyboardInterrupt):  # raised again by uvicorn, once all has ended
        Server(config).run(sockets=[listener])
    return cli.DONE


if __name__ == "__main__":
    cli.run(main)
