"""Ollama's HTTP API: what its requests ask for, and the shapes of its replies."""

from datetime import datetime, timezone
from typing import NamedTuple

import torch

from ysnake.inference.batch import Job
from ysnake.inference.sampling import Sampling
from ysnake.serving import fields
from ysnake.serving.chat import Prompt, messages_of, prompt_of
from ysnake.serving.completion_request import CompletionRequest
from ysnake.serving.embeddings import EmbeddingRequest, texts_of
from ysnake.serving.fields import Body, Fields, take
from ysnake.serving.service import Service

# Fields of /api/generate and /api/chat, as the class `Fields` explains them.
USED = {"model", "name", "stream", "options"}
NEUTRAL: dict[str, tuple] = {"format": ("",), "think": (False,), "template": ("",)}
NEUTRAL |= {"images": ([],), "logprobs": (False,), "top_logprobs": (0,)}
IGNORED = {"keep_alive", "raw"}
# how Ollama runs a model; these change no text
HARDWARE = {"num_ctx", "num_keep", "num_batch", "num_thread", "num_gpu", "main_gpu", "low_vram"}
HARDWARE |= {"f16_kv", "use_mmap", "use_mlock", "numa"}
FIELDS = {
    "/api/generate": Fields(
        USED | {"prompt", "system"}, NEUTRAL | {"suffix": ("",), "context": ([],)}, IGNORED
    ),
    "/api/chat": Fields(USED | {"messages"}, NEUTRAL | {"tools": ([],)}, IGNORED),
    "/api/embed": Fields(
        {"model", "name", "input", "options"},
        {"truncate": (False,), "dimensions": ()},
        {"keep_alive"},
    ),
    "/api/show": Fields({"model", "name"}, ignored={"verbose"}),
}
OPTIONS = Fields(
    fields.SAMPLING | {"repeat_penalty", "num_predict"},
    fields.SAMPLING_NEUTRAL | {"penalize_newline": (True,)},
    fields.SAMPLING_IGNORED | HARDWARE,
)
MESSAGE = Fields(
    {"role", "content"},
    {"images": ([],), "tool_calls": ([],), "thinking": ("",), "tool_name": ("",)},
)


class Settings(NamedTuple):
    """How a request wants its text to be written."""

    sampling: Sampling
    max_tokens: int
    stops: tuple[str, ...]


def settings_of(service: Service, body: Body) -> Settings:
    """The `options` of a request."""
    options = take(body, "options", dict, {})
    OPTIONS.check(options)
    sampling = fields.sampling_of(options, "repeat_penalty")
    n = fields.max_tokens_of(options, "num_predict", -1, service.options.max_tokens)
    return Settings(sampling, n, fields.stops_of(options))


async def generate(service: Service, body: Body, client: str) -> CompletionRequest:
    """A request to /api/generate."""
    FIELDS["/api/generate"].check(body)
    settings = settings_of(service, body)
    system, prompt = take(body, "system", str, ""), take(body, "prompt", str, "")
    text = "\n\n".join(filter(None, (system, prompt)))
    # a request without a prompt only asks whether the model exists
    asked = Prompt(await service.prompt_ids(text)) if prompt else None
    return _completion(service, body, client, settings, asked, chat=False)


async def chat(service: Service, body: Body, client: str) -> CompletionRequest:
    """A request to /api/chat."""
    FIELDS["/api/chat"].check(body)
    settings = settings_of(service, body)
    messages = messages_of(body, MESSAGE)
    asked = await prompt_of(service, messages) if messages else None
    return _completion(service, body, client, settings, asked, chat=True)


def _completion(
    service: Service,
    body: Body,
    client: str,
    settings: Settings,
    prompt: Prompt | None,
    chat: bool,
) -> CompletionRequest:
    job = None
    if prompt is not None:
        job = Job(
            prompt.ids,
            settings.sampling,
            settings.max_tokens,
            settings.stops + prompt.stops,
            service.owner(client),
            prompt.end_ids,
        )

    def part(text: str) -> Body:
        now = datetime.now(timezone.utc).isoformat().replace("+00:00", "Z")
        message = {"role": "assistant", "content": text}
        content = {"message": message} if chat else {"response": text}
        return {"model": body["model"], "created_at": now, **content, "done": False}

    def whole(text: str) -> Body:
        if job is None:
            return part("") | {"done": True, "done_reason": "load"}
        return part(text) | {
            "done": True,
            "done_reason": job.reason,
            "total_duration": job.ended - job.started,
            "load_duration": 0,
            "prompt_eval_count": len(job.ids),
            "prompt_eval_duration": job.read - job.started,
            "eval_count": job.n_written,
            "eval_duration": job.ended - job.read,
        }

    strip = prompt is not None and prompt.strip_start
    return CompletionRequest(job, part, lambda: [whole("")], whole, strip_start=strip)


def embed(service: Service, body: Body) -> EmbeddingRequest:
    """A request to /api/embed. Its options change nothing, but wrong ones are refused."""
    FIELDS["/api/embed"].check(body)
    settings_of(service, body)

    def whole(vectors: list[torch.Tensor], n_tokens: int, nanoseconds: int) -> Body:
        return {
            "model": body["model"],
            "embeddings": [vector.tolist() for vector in vectors],
            "total_duration": nanoseconds,
            "load_duration": 0,
            "prompt_eval_count": n_tokens,
        }

    return EmbeddingRequest(texts_of(body), whole)


def tags(service: Service) -> list[Body]:
    """The served model, as Ollama lists it."""
    n = service.n_parameters
    details: Body = {"parent_model": "", "format": "safetensors", "family": "mamba2"}
    details |= {"families": ["mamba2"], "parameter_size": f"{n / 1e6:.1f}M"}
    details |= {"quantization_level": service.decoder.weights}
    name, when = f"{service.name}:latest", service.modified.isoformat()
    about: Body = {"name": name, "model": name, "modified_at": when, "size": service.size}
    return [about | {"digest": service.digest, "details": details}]


def show(service: Service, body: Body) -> Body:
    """The reply to /api/show: information about the model."""
    FIELDS["/api/show"].check(body)
    service.check_name(body)
    c, (tag,) = service.decoder.model.config, tags(service)
    info: Body = {"general.architecture": "mamba2", "general.basename": service.name}
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
        "capabilities": ["completion", "embedding"],
        "modified_at": tag["modified_at"],
    }
