"""The routes of the server: the page, Ollama's API and OpenAI's."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, Response, StreamingResponse
from starlette.routing import Route

from ysnake import __version__
from ysnake.serving import ollama_api, openai_api
from ysnake.serving.fields import Body, Refused, body_of, error_body, take
from ysnake.serving.guard import Guard
from ysnake.serving.replies import Asked
from ysnake.serving.service import Service

PAGE = Path(__file__).with_name("page.html")
# the page is whole in itself: nothing else may be loaded, whatever a model writes
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
POLICY += "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'"
PAGE_HEADERS = {"Content-Security-Policy": POLICY, "X-Frame-Options": "DENY"}

NDJSON = {"frame": "%s\n", "end": "", "media_type": "application/x-ndjson", "streams": True}
EVENTS = {"frame": "data: %s\n\n", "end": "data: [DONE]\n\n"}
EVENTS |= {"media_type": "text/event-stream", "streams": False}


def application(service: Service) -> Starlette:
    """The application; the batch runs as long as it does."""

    async def about(request: Request) -> Response:
        body = await body_of(request, service.options.max_body)
        return reply(ollama_api.show(service, body))

    async def one_model(request: Request) -> Response:
        service.check_name({"model": request.path_params["name"]})
        return reply(openai_api.listed(service))

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        service.start()
        yield
        service.batch.close()
        await asyncio.to_thread(service.batch.thread.join)

    generate = partial(ollama_api.completion, chat=False)
    chat = partial(ollama_api.completion, chat=True)
    models = told(lambda: {"models": ollama_api.tags(service)})
    listed = told(lambda: {"object": "list", "data": [openai_api.listed(service)]})
    routes = [
        Route("/", page),
        Route("/api/version", told(lambda: {"version": __version__})),
        Route("/api/tags", models),
        Route("/api/ps", models),
        Route("/api/show", about, methods=["POST"]),
        Route("/api/generate", completing(service, generate, **NDJSON), methods=["POST"]),
        Route("/api/chat", completing(service, chat, **NDJSON), methods=["POST"]),
        Route("/v1/models", listed),
        Route("/v1/models/{name}", one_model),
        Route(
            "/v1/completions",
            completing(service, openai_api.completion, **EVENTS),
            methods=["POST"],
        ),
    ]
    middleware = [Middleware(Guard, options=service.options)]
    if origins := service.options.allow_origin:
        methods, headers = ["GET", "POST"], ["*"]
        middleware.append(
            Middleware(
                CORSMiddleware,
                allow_origins=[origin.rstrip("/") for origin in origins],
                allow_methods=methods,
                allow_headers=headers,
            )
        )
    return Starlette(
        routes=routes,
        lifespan=lifespan,
        middleware=middleware,
        exception_handlers={Refused: refused, HTTPException: wrong_path, Exception: broken},
    )


def reply(content: Body, status: int = 200) -> Response:
    """A reply in JSON."""
    return Response(json.dumps(content), status, media_type="application/json")


def told(content: Callable[[], Body]) -> Callable:
    """The endpoint of something to look at."""

    async def endpoint(request: Request) -> Response:
        return reply(content())

    return endpoint


async def page(request: Request) -> Response:
    """The page to type into."""
    return FileResponse(PAGE, headers=PAGE_HEADERS)


def completing(
    service: Service, ask: Callable, frame: str, end: str, media_type: str, streams: bool
) -> Callable:
    """The endpoint of requests that `ask` understands.

    Args:
        service: what is served.
        ask: one of the APIs' `completion`.
        frame: a format that each part of a stream is put into.
        end: what ends a stream.
        media_type: of a stream.
        streams: whether a request that does not say so wants a stream.
    """

    async def lines(asked: Asked, path: str) -> AsyncIterator[str]:
        async for text in service.text(asked.job):
            yield frame % json.dumps(asked.piece(text))
        failed = asked.job.error
        for last in [error_body(path, failed, 500)] if failed else asked.ends():
            yield frame % json.dumps(last)
        yield end

    async def endpoint(request: Request) -> Callable:
        with ExitStack() as held:
            room = partial(held.enter_context, service.large_request())
            body = await body_of(request, service.options.max_body, room)
            service.check_name(body)
            stream = take(body, "stream", bool, streams)
            asked = await ask(service, body, request.client.host if request.client else "")
        if asked.job is None:
            return reply(asked.whole(""))
        service.submit(asked.job)

        async def respond(scope: Any, receive: Any, send: Any) -> None:
            try:
                if stream:
                    text = lines(asked, request.url.path)
                    response = StreamingResponse(text, media_type=media_type)
                else:
                    response = await whole(service, request, asked)
                await response(scope, receive, send)
            finally:
                service.release(asked.job)

        return respond

    return endpoint


async def whole(service: Service, request: Request, asked: Asked) -> Response:
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
    """The reply to a request that is refused."""
    content = error_body(request.url.path, error.message, error.status, error.code)
    return reply(content, error.status)


async def wrong_path(request: Request, error: HTTPException) -> Response:
    """The reply to a path that is not there, or to a wrong method."""
    content = error_body(request.url.path, error.detail, error.status_code)
    return reply(content, error.status_code)


async def broken(request: Request, error: Exception) -> Response:
    """The reply to a request that met a fault of ours."""
    return reply(error_body(request.url.path, type(error).__name__, 500), 500)
