"""The messages of a chat as a prompt, in the same way for both APIs.

A checkpoint with a chat template gets the tokens that its template makes. A base model has none, so
it gets a transcript, "User: ..." and "Assistant:", and its reply ends where it writes "User:".
"""

import asyncio
from dataclasses import dataclass
from typing import Any

from ysnake.serving.fields import Body, Fields, Refused, take
from ysnake.serving.service import Service
from ysnake.shared.errors import InputError

SYSTEM = {"system": "system", "developer": "system"}
ROLES = SYSTEM | {"user": "user", "assistant": "assistant"}
TEXT_PART = Fields({"type", "text"})
LABELS = {"user": "User: ", "assistant": "Assistant: "}
REPLY = "Assistant:"
STOP = "\nUser:"


@dataclass
class Prompt:
    """A prompt for a reply, and where the reply ends."""

    ids: tuple[int, ...]
    stops: tuple[str, ...] = ()
    end_ids: frozenset[int] = frozenset()
    strip_start: bool = False  # the reply's first space only separates it from its label


async def prompt_of(service: Service, messages: list[dict[str, str]]) -> Prompt:
    """The tokens of a chat, up to where the reply begins."""
    template = service.template
    if template is None:
        begun = messages[-1]["role"] == "assistant"  # a reply that is to be continued
        stops = (STOP,)
        return Prompt(await service.prompt_ids(transcript(messages)), stops, strip_start=not begun)
    try:
        pieces = await asyncio.to_thread(template.render, messages)
    except InputError as error:
        raise Refused(str(error)) from error
    ids = await service.piece_ids(pieces)
    end = template.end_id
    return Prompt(ids, end_ids=frozenset(() if end is None else (end,)))


def transcript(messages: list[dict[str, str]]) -> str:
    """A chat as a text, with a line for each message and a paragraph for what the system says."""
    text = ""
    for message in messages:
        role, content = message["role"], message["content"]
        text += f"{content}\n\n" if role == "system" else f"{LABELS[role]}{content}\n"
    return text.removesuffix("\n") if messages[-1]["role"] == "assistant" else text + REPLY


def messages_of(body: Body, known: Fields) -> list[dict[str, str]]:
    """The messages of a request: their roles, system, user or assistant, and their texts.

    Args:
        body: the request.
        known: the fields that a message of this API may have.
    """
    messages = []
    for i, message in enumerate(take(body, "messages", list, [])):
        name = f"messages[{i}]"
        if not isinstance(message, dict):
            raise Refused(f"{name}: expected an object")
        try:
            known.check(message)
            role, content = take(message, "role", str), content_of(message.get("content"))
        except Refused as refused:
            raise Refused(f"{name}: {refused.message}") from refused
        if role not in ROLES:
            raise Refused(f"{name}.role: expected one of {', '.join(ROLES)}")
        messages.append({"role": ROLES[role], "content": content})
    return messages


def content_of(content: Any) -> str:
    """The text of a message: a string, or a list of parts with text."""
    parts = [] if content is None else content
    if isinstance(parts, str):
        return parts
    if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
        raise Refused("content: expected a string, or a list of parts with text")
    for part in parts:
        if part.get("type") != "text":
            raise Refused("content: expected parts of type text, this model reads nothing else")
        TEXT_PART.check(part)
    return "".join(take(part, "text", str, "") for part in parts)
