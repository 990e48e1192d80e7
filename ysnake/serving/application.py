"""The routes of the server: the page, Ollama's API and OpenAI's."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import ExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, Response, StreamingResponse
from starlette.routing import Route

from ysnake import __version__
from ysnake.inference.batch import Job
from ysnake.serving import ollama_api, openai_api
from ysnake.serving.completion_request import CompletionRequest
from ysnake.serving.embeddings import EmbeddingRequest, embedded
from ysnake.serving.fields import Body, Refused, body_of, error_body, take
from ysnake.serving.guard import Guard
from ysnake.serving.service import Service

PAGE = Path(__file__).with_name("page.html")
# The page is self-contained. It must load nothing else, whatever a model writes.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
POLICY += "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'"
PAGE_HEADERS = {"Content-Security-Policy": POLICY, "X-Frame-Options": "DENY"}


class StreamFormat(NamedTuple):
    """How an API sends a text while it is written."""

    frame: str  # a format that each part is put into
    end: str  # what ends the stream
    media_type: str
    by_default: bool  # whether a request that does not say so wants a stream


NDJSON = StreamFormat("%s\n", "", "application/x-ndjson", by_default=True)
EVENTS = StreamFormat("data: %s\n\n", "data: [DONE]\n\n", "text/event-stream", by_default=False)


def application(service: Service) -> Starlette:
    """Make the application. The worker starts and ends with it."""

    async def about(request: Request) -> Response:
        body = await body_of(request, service.options.max_body)
        return reply(ollama_api.show(service, body))

    async def one_model(request: Request) -> Response:
        service.check_name({"model": request.path_params["name"]})
        return reply(openai_api.listed(service))

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        worker = service.start()
        yield
        worker.close()
        await asyncio.to_thread(worker.thread.join)

    models = get_endpoint(lambda: {"models": ollama_api.tags(service)})
    listed = get_endpoint(lambda: {"object": "list", "data": [openai_api.listed(service)]})
    posted = {
        "/api/show": about,
        "/api/generate": completion_endpoint(service, ollama_api.generate, NDJSON),
        "/api/chat": completion_endpoint(service, ollama_api.chat, NDJSON),
        "/api/embed": embedding_endpoint(service, ollama_api.embed),
        "/v1/completions": completion_endpoint(service, openai_api.completion, EVENTS),
        "/v1/chat/completions": completion_endpoint(service, openai_api.chat, EVENTS),
        "/v1/embeddings": embedding_endpoint(service, openai_api.embed),
    }
    routes = [
        Route("/", page),
        Route("/api/version", get_endpoint(lambda: {"version": __version__})),
        Route("/api/tags", models),
        Route("/api/ps", models),
        Route("/v1/models", listed),
        Route("/v1/models/{name:path}", one_model),
        *(Route(path, endpoint, methods=["POST"]) for path, endpoint in posted.items()),
    ]
    middleware = [Middleware(Guard, options=service.options)]
    if origins := service.options.origins():
        allowed: dict[str, Any] = {
            "allow_origins": origins,
            "allow_methods": ["GET", "POST"],
            "allow_headers": ["*"],
        }
        # before the guard, so that an allowed page can read its errors too
        middleware.insert(0, Middleware(CORSMiddleware, **allowed))
    return Starlette(
        routes=routes,
        lifespan=lifespan,
        middleware=middleware,
        exception_handlers={Refused: refused, HTTPException: wrong_path, Exception: broken},
    )


def reply(content: Body, status: int = 200) -> Response:
    """A reply in JSON."""
    return Response(json.dumps(content), status, media_type="application/json")


def get_endpoint(content: Callable[[], Body]) -> Callable:
    """An endpoint that replies with this content."""

    async def endpoint(request: Request) -> Response:
        return reply(content())

    return endpoint


async def page(request: Request) -> Response:
    """The page to type into."""
    return FileResponse(PAGE, headers=PAGE_HEADERS)


def completion_endpoint(
    service: Service,
    read: Callable[[Service, Body, str], Awaitable[CompletionRequest]],
    form: StreamFormat,
) -> Callable:
    """An endpoint for completions.

    Args:
        service: the model.
        read: the `completion` of one of the APIs, which reads a request.
        form: how the API streams.
    """

    async def lines(completion: CompletionRequest, job: Job, path: str) -> AsyncIterator[str]:
        for first in completion.first_parts:
            yield form.frame % json.dumps(first)
        async for text in text_of(service, completion, job):
            yield form.frame % json.dumps(completion.part(text))
        failed = job.error
        for last in [error_body(path, failed, 500)] if failed else completion.last_parts():
            yield form.frame % json.dumps(last)
        yield form.end

    async def whole(completion: CompletionRequest, job: Job) -> Body:
        text = "".join([text async for text in text_of(service, completion, job)])
        if job.error:
            raise Refused(job.error, 500)
        return completion.whole(text)

    async def endpoint(request: Request) -> Callable:
        async with body_for(service, request) as body:
            stream = take(body, "stream", bool, form.by_default)
            completion = await read(service, body, request.client.host if request.client else "")
        job = completion.job
        if job is None:
            return reply(completion.whole(""))
        service.submit(job)

        async def respond(scope: Any, receive: Any, send: Any) -> None:
            try:
                if stream:
                    text = lines(completion, job, request.url.path)
                    response: Response = StreamingResponse(text, media_type=form.media_type)
                else:
                    response = await unless_gone(request, whole(completion, job))
                await response(scope, receive, send)
            finally:
                service.release(job)

        return respond

    return endpoint


def embedding_endpoint(
    service: Service, read: Callable[[Service, Body], EmbeddingRequest]
) -> Callable:
    """An endpoint for embeddings; `read` is the `embed` of one of the APIs."""

    async def endpoint(request: Request) -> Response:
        async with body_for(service, request) as body:
            return await unless_gone(request, embedded(service, read(service, body)))

    return endpoint


@asynccontextmanager
async def body_for(service: Service, request: Request) -> AsyncIterator[Body]:
    """The body of a request for this model. A large one counts as such inside the block."""
    with ExitStack() as held:
        room = partial(held.enter_context, service.large_request())
        body = await body_of(request, service.options.max_body, room)
        body["model"] = service.check_name(body)
        yield body


async def text_of(service: Service, completion: CompletionRequest, job: Job) -> AsyncIterator[str]:
    """The text of a job while it is written, without leading spaces where that is asked for."""
    strip = completion.strip_start
    async for text in service.text(job):
        text = text.lstrip() if strip else text
        strip = strip and not text
        if text:
            yield text


async def unless_gone(request: Request, content: Coroutine[Any, Any, Body]) -> Response:
    """Reply with all the content at once. Stops as soon as the client is gone."""
    made, gone = asyncio.ensure_future(content), asyncio.ensure_future(request.receive())
    try:
        await asyncio.wait({made, gone}, return_when=asyncio.FIRST_COMPLETED)
        return reply(made.result()) if made.done() else Response(status_code=499)
    finally:
        made.cancel()
        gone.cancel()


async def refused(request: Request, error: Any) -> Response:
    """The reply to a request that is refused."""
    content = error_body(request.url.path, error.message, error.status, error.code)
    return reply(content, error.status)


async def wrong_path(request: Request, error: Any) -> Response:
    """The reply to an unknown path or a wrong method."""
    content = error_body(request.url.path, error.detail, error.status_code)
    return reply(content, error.status_code)


async def broken(request: Request, error: Exception) -> Response:
    """The reply to a request that met a bug of the server."""
    return reply(error_body(request.url.path, type(error).__name__, 500), 500)
