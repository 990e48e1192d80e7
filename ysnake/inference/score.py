"""How well a model predicts documents: loss per token and bits per byte."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from ysnake.inference.decoding import Decoder
    from ysnake.text.data import Piece

READ = 1024  # tokens at once
DROPPED = 8  # bits that a byte costs for which the tokenizer has no token, as any of 256 values


@dataclass
class Score:
    """Sums over all documents read."""

    documents: int = 0
    tokens: int = 0
    bytes: int = 0
    nats: float = 0.0
    dropped: int = 0  # of the bytes, those of characters that the tokenizer has no token for

    @property
    def loss_per_token(self) -> float:
        return self.nats / max(1, self.tokens)

    @property
    def bits_per_byte(self) -> float:
        return (self.nats / math.log(2) + DROPPED * self.dropped) / max(1, self.bytes)

    def warning(self) -> str | None:
        """What the tokenizer could not read, if anything."""
        if not self.dropped:
            return None
        return (
            f"warning: the tokenizer drops {self.dropped / self.bytes:.1%} of the text "
            f"({self.dropped:,} of {self.bytes:,} bytes), characters that it does not know; in "
            f"bits per byte each such byte counts as {DROPPED}"
        )


def score(
    decoder: "Decoder",
    tokenizer: "Tokenizer",
    pieces: Iterable["Piece"],
    progress: Callable[[int], None],
) -> Score:
    """Read each document from bos to eos with one state, so at any length in the same memory.

    Every token after the bos counts, the eos that ends a document too. `progress` is called with
    the number of characters just done.
    """
    import torch
    from torch.nn.functional import cross_entropy

    from ysnake.text.tokenizer import dropped_bytes, encode

    model = decoder.model
    device = model.backbone.embeddings.weight.device
    total = Score()
    state, before = model.empty_state(1), model.config.bos_id  # read so far, and not yet read
    for text, ends in pieces:
        ids = encode(tokenizer, text)
        total.dropped += dropped_bytes(tokenizer, text, ids)
        ids += [model.config.eos_id] if ends else []
        for i in range(0, len(ids), READ):
            targets = torch.tensor(ids[i : i + READ], device=device)
            inputs = torch.cat([targets.new_tensor([before]), targets[:-1]])
            logits, state = decoder.step(inputs[None], state)
            total.nats += cross_entropy(logits[0], targets, reduction="sum").item()
            before = ids[i : i + READ][-1]
        total.tokens += len(ids)
        total.bytes += len(text.encode("utf-8", "replace"))
        if ends:
            total.documents += 1
            state, before = model.empty_state(1), model.config.bos_id
        progress(len(text))
    return total
