"""Completing token ids: a context of constant size that reads and writes. Knows nothing of text."""

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ysnake.config import InputError
from ysnake.model import LayerState, Model
from ysnake.sampling import Sampling

PIECE = 512  # tokens of a prompt read at once


class Context:
    """What a model has read so far. Its size does not grow with the text."""

    def __init__(self, model: Model, n_tokens: int):
        """`n_tokens`: size of the tokenizer; ids beyond it only pad the embedding."""
        self.model, self.n_tokens = model.eval(), n_tokens
        self.state = model.empty_state(1)
        self.device = model.backbone.embeddings.weight.device
        self.logits: Tensor | None = None  # (vocab_size,), of the token that comes next
        self.seen = torch.zeros(model.config.vocab_size, dtype=torch.bool, device=self.device)

    def feed(self, ids: list[int]) -> None:
        """Read some tokens."""
        for i in range(0, len(ids), PIECE):
            piece = torch.tensor([ids[i : i + PIECE]], device=self.device)
            logits, self.state = self.model.step(piece, self.state, last_only=True)
            self.logits = logits[0].float()
            self.seen[piece[0]] = True

    def generate(self, sampling: Sampling, max_tokens: int) -> Iterator[int]:
        """Write up to `max_tokens` tokens; ends before an eos, which is not read."""
        if self.logits is None:
            raise ValueError("logits: expected a context that has read at least one token")
        generator = torch.Generator()
        if sampling.seed is None:
            generator.seed()
        else:
            generator.manual_seed(sampling.seed)
        for _ in range(max_tokens):
            token = choose(self.logits[: self.n_tokens], self.seen, sampling, generator)
            if token == self.model.config.eos_id:
                return
            self.feed([token])
            yield token

    def save(self, path: Path) -> None:
        """Write the context to a file, to read on from it another day."""
        tensors = {"logits": self.logits, "seen": self.seen}
        for i, layer in enumerate(self.state):
            tensors |= {f"{i}.conv": layer.conv, f"{i}.ssm": layer.ssm}
        tensors = {name: t.contiguous() for name, t in tensors.items()}
        save_file(tensors, path, {"model": self._fingerprint()})

    def load(self, path: Path) -> None:
        """Take over the context in a file that `save` wrote with the same model."""
        try:
            with safe_open(path, framework="pt") as file:
                if (file.metadata() or {}).get("model") != self._fingerprint():
                    raise InputError(f"{path}: the state of another model")
                tensors = {name: file.get_tensor(name).to(self.device) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path}: not a saved state ({error})") from error
        self.logits, self.seen = tensors["logits"], tensors["seen"]
        self.state = [
            LayerState(tensors[f"{i}.conv"], tensors[f"{i}.ssm"]) for i in range(len(self.state))
        ]

    def _fingerprint(self) -> str:
        """Tells this model's weights from another's, cheaply."""
        norms = [p.detach().double().sum().item().hex() for p in self.model.parameters()]
        return " ".join([str(self.model.config.vocab_size), *norms])


def choose(logits: Tensor, seen: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """Draw a token from logits (tokens,), of which `seen` (at least tokens,) have appeared."""
    if sampling.repetition_penalty != 1:
        penalised = torch.where(
            logits > 0, logits / sampling.repetition_penalty, logits * sampling.repetition_penalty
        )
        logits = torch.where(seen[: len(logits)], penalised, logits)
    if sampling.temperature == 0:
        return int(logits.argmax())
    logits = logits / sampling.temperature
    if 0 < sampling.top_k < len(logits):
        least = logits.topk(sampling.top_k).values[-1]
        logits = logits.masked_fill(logits < least, -torch.inf)
    probabilities = logits.softmax(-1)
    if sampling.top_p < 1:
        ordered, order = probabilities.sort(descending=True)
        beyond = ordered.cumsum(-1) - ordered >= sampling.top_p  # the first one always stays
        probabilities[order[beyond]] = 0
    return int(torch.multinomial(probabilities.cpu(), 1, generator=generator))
