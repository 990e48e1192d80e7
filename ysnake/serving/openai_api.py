"""OpenAI's HTTP API: what its requests ask for, and the shapes of its replies."""

import base64
import time
from typing import Any
from uuid import uuid4

import torch

from ysnake.inference.batch import Job
from ysnake.serving import fields
from ysnake.serving.chat import Prompt, messages_of, prompt_of
from ysnake.serving.completion_request import CompletionRequest
from ysnake.serving.embeddings import EmbeddingRequest, texts_of
from ysnake.serving.fields import Body, Fields, Refused, take
from ysnake.serving.service import Service

USED = fields.SAMPLING | {"model", "name", "stream", "stream_options"}
USED |= {"max_tokens", "repetition_penalty"}
NEUTRAL: dict[str, tuple] = fields.SAMPLING_NEUTRAL | {"n": (1,), "logit_bias": ({},)}
NO_TOOLS: dict[str, tuple] = {"tools": ([],), "tool_choice": ("none", "auto"), "functions": ([],)}
NO_TOOLS |= {"function_call": ("none", "auto"), "parallel_tool_calls": (True, False)}
CHAT_NEUTRAL: dict[str, tuple] = NO_TOOLS | {"logprobs": (False,), "top_logprobs": (0,)}
CHAT_NEUTRAL |= {"response_format": ({"type": "text"},), "modalities": (["text"],)}
CHAT_NEUTRAL |= {"store": (False,), "reasoning_effort": ("none",)}
BOOKKEEPING = {"user", "metadata", "service_tier", "safety_identifier", "prompt_cache_key"}
FIELDS = {
    "/v1/completions": Fields(
        USED | {"prompt"},
        NEUTRAL | {"suffix": ("",), "best_of": (1,), "echo": (False,), "logprobs": ()},
        fields.SAMPLING_IGNORED | {"user"},
    ),
    "/v1/chat/completions": Fields(
        USED | {"messages", "max_completion_tokens"},
        NEUTRAL | CHAT_NEUTRAL,
        fields.SAMPLING_IGNORED | BOOKKEEPING,
    ),
    "/v1/embeddings": Fields(
        {"model", "name", "input", "encoding_format"}, {"dimensions": ()}, {"user"}
    ),
}
STREAM_OPTIONS = Fields({"include_usage"}, ignored={"include_obfuscation"})
MESSAGE = Fields(
    {"role", "content"},
    {"tool_calls": ([],), "function_call": (), "audio": (), "refusal": ("",)},
    {"name", "annotations"},
)


async def completion(service: Service, body: Body, client: str) -> CompletionRequest:
    """A request to /v1/completions."""
    FIELDS["/v1/completions"].check(body)
    text = body.get("prompt")
    if isinstance(text, list) and len(text) == 1:
        text = text[0]
    if not isinstance(text, str):
        raise Refused("prompt: expected a string, or a list of one")
    most = service.options.max_tokens
    n = fields.max_tokens_of(body, "max_tokens", min(16, most), most)
    reply = _Reply(service, body, "cmpl", "text_completion")
    prompt = Prompt(await service.prompt_ids(text))
    job = _job(service, body, client, n, prompt)

    def part(text: str, reason: str | None = None) -> Body:
        return reply.choice({"text": text}, reason)

    return CompletionRequest(
        job,
        part,
        lambda: [part("", job.reason), *reply.usage_part(job)],
        lambda text: part(text, job.reason) | reply.usage(job),
    )


async def chat(service: Service, body: Body, client: str) -> CompletionRequest:
    """A request to /v1/chat/completions."""
    FIELDS["/v1/chat/completions"].check(body)
    messages = messages_of(body, MESSAGE)
    if not messages:
        raise Refused("messages: expected a list of at least one message")
    name = "max_tokens" if body.get("max_completion_tokens") is None else "max_completion_tokens"
    if name == "max_completion_tokens" and body.get("max_tokens") is not None:
        raise Refused("max_tokens: expected it or max_completion_tokens, got both")
    n = fields.max_tokens_of(body, name, -1, service.options.max_tokens)
    reply = _Reply(service, body, "chatcmpl", "chat.completion")
    prompt = await prompt_of(service, messages)
    job = _job(service, body, client, n, prompt)

    def part(delta: Body, reason: str | None = None) -> Body:
        return reply.choice({"delta": delta}, reason) | {"object": "chat.completion.chunk"}

    def whole(text: str) -> Body:
        message = {"role": "assistant", "content": text, "refusal": None}
        return reply.choice({"message": message}, job.reason) | reply.usage(job)

    return CompletionRequest(
        job,
        lambda text: part({"content": text}),
        lambda: [
            part({}, job.reason),
            *(each | {"object": "chat.completion.chunk"} for each in reply.usage_part(job)),
        ],
        whole,
        first_parts=[part({"role": "assistant", "content": ""})],
        strip_start=prompt.strip_start,
    )


class _Reply:
    """What the replies to one request have in common."""

    def __init__(self, service: Service, body: Body, prefix: str, kind: str):
        self.share_prompts = service.options.share_prompts
        self.head = {"id": f"{prefix}-{uuid4().hex}", "object": kind, "created": int(time.time())}
        self.head["model"] = body["model"]
        stream_options = take(body, "stream_options", dict, {})
        STREAM_OPTIONS.check(stream_options)
        self.usage_asked = take(stream_options, "include_usage", bool, False)

    def choice(self, content: Body, reason: str | None) -> Body:
        choice = {"index": 0, **content, "logprobs": None, "finish_reason": reason}
        return {**self.head, "choices": [choice]}

    def usage(self, job: Job) -> Body:
        counts: Body = {
            "prompt_tokens": len(job.ids),
            "completion_tokens": job.n_written,
            "total_tokens": len(job.ids) + job.n_written,
        }
        if self.share_prompts:  # else it would reveal that somebody else sent this prompt
            counts["prompt_tokens_details"] = {"cached_tokens": job.n_remembered}
        return {"usage": counts}

    def usage_part(self, job: Job) -> list[Body]:
        """The part of a stream with the usage, if the client asked for it."""
        return [{**self.head, "choices": [], **self.usage(job)}] if self.usage_asked else []


def _job(service: Service, body: Body, client: str, n: int, prompt: Prompt) -> Job:
    sampling = fields.sampling_of(body, "repetition_penalty")
    stops = fields.stops_of(body) + prompt.stops
    return Job(prompt.ids, sampling, n, stops, service.owner(client), prompt.end_ids)


def embed(service: Service, body: Body) -> EmbeddingRequest:
    """A request to /v1/embeddings."""
    FIELDS["/v1/embeddings"].check(body)
    encoding = take(body, "encoding_format", str, "float")
    if encoding not in ("float", "base64"):
        raise Refused("encoding_format: expected float or base64")

    def encoded(vector: torch.Tensor) -> Any:
        if encoding == "float":
            return vector.tolist()
        return base64.b64encode(vector.numpy().astype("<f4").tobytes()).decode()

    def whole(vectors: list[torch.Tensor], n_tokens: int, nanoseconds: int) -> Body:
        data = [
            {"object": "embedding", "index": i, "embedding": encoded(vector)}
            for i, vector in enumerate(vectors)
        ]
        usage = {"prompt_tokens": n_tokens, "total_tokens": n_tokens}
        return {"object": "list", "data": data, "model": body["model"], "usage": usage}

    return EmbeddingRequest(texts_of(body), whole)


def listed(service: Service) -> Body:
    """The served model, as OpenAI lists it."""
    created = int(service.modified.timestamp())
    return {"id": service.name, "object": "model", "created": created, "owned_by": "ysnake"}
