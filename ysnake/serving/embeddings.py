"""Requests for embeddings, as both APIs hand them to the application."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ysnake.serving.fields import Body, Refused
from ysnake.serving.service import Service

MOST_TEXTS = 2048  # in one request


@dataclass
class EmbeddingRequest:
    """What a client asks for, and how the API shapes the reply."""

    texts: list[str]
    # the reply, from the vectors, the number of tokens and the nanoseconds that they took
    whole: Callable[[list[torch.Tensor], int, int], Body]


def texts_of(body: Body) -> list[str]:
    """The texts of a request: one, or a list."""
    given = body.get("input")
    texts = [given] if isinstance(given, str) else given
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise Refused("input: expected a string or a list of strings")
    if not 1 <= len(texts) <= MOST_TEXTS:
        raise Refused(f"input: expected 1 to {MOST_TEXTS} texts, got {len(texts)}")
    return texts


async def embedded(service: Service, request: EmbeddingRequest) -> Body:
    """The reply to a request. Its texts are read one after another."""
    began = time.perf_counter_ns()
    prompts = [await service.prompt_ids(text) for text in request.texts]
    vectors = [await service.embedding(ids) for ids in prompts]
    return request.whole(vectors, sum(map(len, prompts)), time.perf_counter_ns() - began)
