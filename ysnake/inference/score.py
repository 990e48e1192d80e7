"""How well a model predicts documents: loss per token and bits per byte."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ysnake.shared.shown import amount

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from ysnake.inference.decoding import Decoder
    from ysnake.text.data import Piece

READ = 1024  # tokens that are read in one step
DROPPED = 8  # bits for each byte that the tokenizer drops: as many as any of 256 values needs


@dataclass
class Score:
    """Sums over all documents read."""

    documents: int = 0
    tokens: int = 0
    bytes: int = 0
    nats: float = 0.0
    dropped: int = 0  # bytes of characters that the tokenizer does not know

    @property
    def loss_per_token(self) -> float:
        return self.nats / max(1, self.tokens)

    @property
    def bits_per_byte(self) -> float:
        return (self.nats / math.log(2) + DROPPED * self.dropped) / max(1, self.bytes)

    def warning(self) -> str | None:
        """How much of the text the tokenizer drops, if any."""
        if not self.dropped:
            return None
        return (
            f"warning: the tokenizer drops {self.dropped / self.bytes:.1%} of the text "
            f"({self.dropped:,} of {amount(self.bytes, 'byte')}), characters that it does not "
            f"know; in bits per byte each such byte counts as {DROPPED}"
        )


def score(
    decoder: "Decoder",
    tokenizer: "Tokenizer",
    pieces: Iterable["Piece"],
    progress: Callable[[int], None],
) -> Score:
    """Measure the loss on documents. Memory does not grow with their length.

    Every token of a document counts except its bos; its eos counts. `progress` is called with the
    number of characters just read.
    """
    import torch
    from torch.nn.functional import cross_entropy

    from ysnake.text.tokenizer import dropped_bytes, encode

    model = decoder.model
    device = model.backbone.embeddings.weight.device
    total = Score()
    bos, eos = model.config.document_tokens()
    state, before = model.empty_state(1), bos  # the state so far, and the token to read next
    for text, ends in pieces:
        ids = encode(tokenizer, text)
        total.dropped += dropped_bytes(tokenizer, text, ids)
        ids += [eos] if ends else []
        for i in range(0, len(ids), READ):
            targets = torch.tensor(ids[i : i + READ], device=device)
            inputs = torch.cat([targets.new_tensor([before]), targets[:-1]])
            logits, state = decoder.step(inputs[None], state)
            logits = logits[0].to(torch.promote_types(logits.dtype, torch.float32))
            total.nats += cross_entropy(logits, targets, reduction="sum").item()
            before = ids[i : i + READ][-1]
        total.tokens += len(ids)
        total.bytes += len(text.encode("utf-8", "replace"))
        if ends:
            total.documents += 1
            state, before = model.empty_state(1), bos
        progress(len(text))
    return total
