"""Ollama's HTTP API: what its requests ask for, and the shapes of its replies."""

from datetime import datetime, timezone

from ysnake.inference.batch import Job
from ysnake.serving import fields
from ysnake.serving.completion_request import CompletionRequest
from ysnake.serving.fields import Body, Refused, check_fields, take
from ysnake.serving.service import Service

USED = {"model", "name", "stream", "options"}
# unsupported fields, with the values that change nothing
NEUTRAL = {"images": ([],), "format": ("",), "think": (False,), "template": ("",)}
NEUTRAL |= {"logprobs": (False,), "top_logprobs": (0,)}
GENERATE_NEUTRAL = NEUTRAL | {"suffix": ("",), "context": ([],)}
CHAT_NEUTRAL = NEUTRAL | {"tools": ([],)}
MESSAGE_NEUTRAL = {"images": ([],), "tool_calls": ([],), "thinking": ("",), "tool_name": ("",)}
IGNORED = {"keep_alive", "raw"}
OPTIONS_NEUTRAL = fields.SAMPLING_NEUTRAL | {"penalize_newline": (True,)}
# how Ollama runs a model; these change no text
OPTIONS_IGNORED = fields.SAMPLING_IGNORED | {"num_ctx", "num_keep", "num_batch", "num_thread"}
OPTIONS_IGNORED |= {"num_gpu", "main_gpu", "low_vram", "f16_kv", "use_mmap", "use_mlock", "numa"}


async def completion(service: Service, body: Body, client: str, chat: bool) -> CompletionRequest:
    """A request to /api/generate or /api/chat."""
    if chat:
        check_fields(body, USED | {"messages"}, CHAT_NEUTRAL, IGNORED)
    else:
        check_fields(body, USED | {"prompt", "system"}, GENERATE_NEUTRAL, IGNORED)
    settings = take(body, "options", dict, {})
    used = fields.SAMPLING | {"repeat_penalty", "num_predict"}
    check_fields(settings, used, OPTIONS_NEUTRAL, OPTIONS_IGNORED)
    most = service.options.max_tokens
    sampling = fields.sampling_of(settings, "repeat_penalty")
    n = fields.max_tokens_of(settings, "num_predict", -1, most)
    stops, owner = fields.stops_of(settings), service.owner(client)
    if chat:
        prompt = conversation(body)
    else:
        texts = (take(body, "system", str, ""), take(body, "prompt", str, ""))
        prompt = "\n\n".join(filter(None, texts)) if texts[1] else ""
    # a request without a prompt only asks whether the model exists
    ids = await service.prompt_ids(prompt) if prompt else None
    job = None if ids is None else Job(ids, sampling, n, stops, owner)

    def part(text: str) -> Body:
        now = datetime.now(timezone.utc).isoformat().replace("+00:00", "Z")
        content = (
            {"message": {"role": "assistant", "content": text}} if chat else {"response": text}
        )
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

    return CompletionRequest(job, part, lambda: [whole("")], whole)


def conversation(body: Body) -> str:
    """The messages of a chat as one text, since a model completes text.

    Each message begins a paragraph, except that a message of the assistant continues the text.
    """
    text = ""
    for i, message in enumerate(take(body, "messages", list, [])):
        if not isinstance(message, dict):
            raise Refused(f"messages[{i}]: expected an object")
        check_fields(message, {"role", "content"}, MESSAGE_NEUTRAL, set())
        role, content = take(message, "role", str), take(message, "content", str, "")
        if role not in ("system", "user", "assistant"):
            raise Refused(f"messages[{i}].role: expected system, user or assistant")
        text += content if role == "assistant" or not text else "\n\n" + content
    return text


def tags(service: Service) -> list[Body]:
    """The served model, as Ollama lists it."""
    n = service.n_parameters
    details: Body = {"parent_model": "", "format": "safetensors", "family": "mamba2"}
    details |= {"families": ["mamba2"], "parameter_size": f"{n / 1e6:.1f}M"}
    dtype = str(service.decoder.model.backbone.embeddings.weight.dtype).removeprefix("torch.")
    weights = service.options.weights
    details |= {"quantization_level": dtype if weights == "float32" else weights}
    name, when = f"{service.name}:latest", service.modified.isoformat()
    about: Body = {"name": name, "model": name, "modified_at": when, "size": service.size}
    return [about | {"digest": service.digest, "details": details}]


def show(service: Service, body: Body) -> Body:
    """The reply to /api/show: information about the model."""
    check_fields(body, {"model", "name"}, {}, {"verbose"})
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
        "capabilities": ["completion"],
        "modified_at": tag["modified_at"],
    }
