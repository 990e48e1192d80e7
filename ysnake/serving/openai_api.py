"""OpenAI's HTTP API: what a request for a completion asks for, and the shapes of the replies."""

import time
from uuid import uuid4

from ysnake.inference.batch import Job
from ysnake.serving import fields
from ysnake.serving.completion_request import CompletionRequest
from ysnake.serving.fields import Body, Refused, check_fields, take
from ysnake.serving.service import Service

USED = fields.SAMPLING | {"model", "name", "prompt", "stream", "stream_options"}
USED |= {"max_tokens", "repetition_penalty"}
# unsupported fields, with the values that change nothing
NEUTRAL: dict[str, tuple] = fields.SAMPLING_NEUTRAL | {"suffix": ("",), "n": (1,), "best_of": (1,)}
NEUTRAL |= {"echo": (False,), "logprobs": (), "logit_bias": ({},)}
IGNORED = fields.SAMPLING_IGNORED | {"user"}


async def completion(service: Service, body: Body, client: str) -> CompletionRequest:
    """A request to /v1/completions."""
    check_fields(body, USED, NEUTRAL, IGNORED)
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1:
        prompt = prompt[0]
    if not isinstance(prompt, str):
        raise Refused("prompt: expected a string, or a list of one")
    stream_options = take(body, "stream_options", dict, {})
    check_fields(stream_options, {"include_usage"}, {}, {"include_obfuscation"})
    usage_asked = take(stream_options, "include_usage", bool, False)
    sampling = fields.sampling_of(body, "repetition_penalty")
    n = fields.max_tokens_of(body, "max_tokens", 16, service.options.max_tokens)
    stops, owner = fields.stops_of(body), service.owner(client)
    job = Job(await service.prompt_ids(prompt), sampling, n, stops, owner)
    head = {"id": f"cmpl-{uuid4().hex}", "object": "text_completion", "created": int(time.time())}
    head["model"] = body["model"]

    def part(text: str, reason: str | None = None) -> Body:
        choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": reason}
        return {**head, "choices": [choice]}

    def usage() -> Body:
        counts: Body = {
            "prompt_tokens": len(job.ids),
            "completion_tokens": job.n_written,
            "total_tokens": len(job.ids) + job.n_written,
        }
        if (
            service.options.share_prompts
        ):  # else it would reveal that somebody else sent this prompt
            counts["prompt_tokens_details"] = {"cached_tokens": job.n_remembered}
        return counts

    def last_parts() -> list[Body]:
        counts = [{**head, "choices": [], "usage": usage()}] if usage_asked else []
        return [part("", job.reason), *counts]

    return CompletionRequest(
        job, part, last_parts, lambda text: part(text, job.reason) | {"usage": usage()}
    )


def listed(service: Service) -> Body:
    """The served model, as OpenAI lists it."""
    created = int(service.modified.timestamp())
    return {"id": service.name, "object": "model", "created": created, "owned_by": "ysnake"}
