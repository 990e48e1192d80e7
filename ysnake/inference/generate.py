"""Completing token ids: a context of constant size that reads tokens and draws the next ones.

This file knows nothing of text.
"""

from collections.abc import Iterable, Iterator
from copy import copy
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ysnake.inference.decoding import Decoder
from ysnake.inference.sampling import Sampling
from ysnake.model.network import LayerState, Model
from ysnake.shared import files
from ysnake.shared.errors import InputError

PROMPT_STEP = 512  # tokens of a prompt that are read in one step
LOWEST = 1e-30  # temperature above 0; with a lower one, logits would become infinite
FEW = 256  # likeliest tokens that are sorted at first to draw one


class Context:
    """What a model has read so far. Its size does not grow with the text."""

    def __init__(self, reader: Model | Decoder, n_tokens: int):
        """`n_tokens` is the size of the tokenizer. Larger ids only pad the embedding."""
        model = reader.model if isinstance(reader, Decoder) else reader.eval()
        self.model, self.step, self.n_tokens = model, reader.step, n_tokens
        self.state = model.empty_state(1)
        self.device = model.backbone.embeddings.weight.device
        self.logits: Tensor | None = None  # (vocab_size,), for the next token
        self.last_token: int | None = None
        self.seen = torch.zeros(model.config.vocab_size, dtype=torch.bool, device=self.device)

    def feed(self, ids: list[int]) -> None:
        """Read these tokens."""
        for i in range(0, len(ids), PROMPT_STEP):
            some = torch.tensor([ids[i : i + PROMPT_STEP]], device=self.device)
            logits, self.state = self.step(some, self.state, last_only=True)
            self.logits = logits[0].float()
            self.seen[some[0]] = True
            self.last_token = ids[i : i + PROMPT_STEP][-1]

    def generate(self, sampling: Sampling, max_tokens: int) -> Iterator[int]:
        """Draw up to `max_tokens` tokens. Stops at an eos, which is neither read nor yielded."""
        generator = random_generator(sampling.seed)
        for _ in range(max_tokens):
            token = choose(self.next_logits()[: self.n_tokens], self.seen, sampling, generator)
            if token in self.model.config.end_ids:
                return
            self.feed([token])
            yield token

    def copy(self) -> "Context":
        """A copy that can be continued independently."""
        context = copy(self)
        context.state = [LayerState(s.conv.clone(), s.ssm.clone()) for s in self.state]
        context.seen = self.seen.clone()
        return context

    def next_logits(self) -> Tensor:
        """The logits (vocab_size,) of the token that comes next.

        Raises:
            ValueError: nothing has been read yet.
        """
        if self.logits is None:
            raise ValueError("logits: expected a context that has read at least one token")
        return self.logits

    def save(self, path: Path) -> None:
        """Write the context to a file, from which `load` continues later."""
        tensors = {"logits": self.next_logits(), "seen": self.seen}
        for i, layer in enumerate(self.state):
            tensors |= {f"{i}.conv": layer.conv, f"{i}.ssm": layer.ssm}
        tensors = {name: t.contiguous() for name, t in tensors.items()}
        with files.replacing(path) as new:
            try:
                about = {"model": self._fingerprint(), "last_token": str(self.last_token)}
                save_file(tensors, new, about)
            except SafetensorError as error:
                raise InputError(f"{path}: cannot be written ({error})") from error

    def load(self, path: Path) -> None:
        """Continue from a file that `save` wrote with the same model."""
        if not path.exists():
            raise InputError(f"{path}: no such file")
        try:
            with safe_open(path, framework="pt") as file:
                about = file.metadata() or {}
                if about.get("model") != self._fingerprint():
                    raise InputError(f"{path}: the state of another model")
                tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path}: not a saved state ({error})") from error
        expected = {"seen": self.seen, "logits": self.seen.float()}
        for i, layer in enumerate(self.state):
            expected |= {f"{i}.conv": layer.conv, f"{i}.ssm": layer.ssm}
        for name, like in expected.items():
            kind = (like.shape, like.dtype)
            if name not in tensors or (tensors[name].shape, tensors[name].dtype) != kind:
                raise InputError(
                    f"{path}: not a saved state ({name} is missing or of another kind)"
                )
        last_token = about.get("last_token", "")
        self.last_token = int(last_token) if last_token.isdecimal() else None
        self.logits, self.seen = (tensors[name].to(self.device) for name in ("logits", "seen"))
        for i, layer in enumerate(self.state):  # copy, to keep the memory layout
            layer.conv.copy_(tensors[f"{i}.conv"])
            layer.ssm.copy_(tensors[f"{i}.ssm"])

    def _fingerprint(self) -> str:
        """A cheap text that differs between models with different weights.

        It covers only weights that every format of `Decoder` stores unchanged.
        """
        kept = [(name, p) for name, p in self.model.named_parameters() if "_proj." not in name]
        kept = [(name, p) for name, p in kept if not name.startswith("lm_head.")]
        # sums of integers, which do not depend on the order in which threads add them
        sums = [p.detach().cpu().contiguous().view(torch.uint8).sum().item() for _, p in kept]
        return " ".join(map(str, [self.model.config.vocab_size, *sums]))


def random_generator(seed: int | None) -> torch.Generator:
    """The random generator of one completion. With None every call gives another one."""
    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    return generator


def choose(logits: Tensor, seen: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """Draw a token from logits (tokens,). `seen` (at least tokens,) marks those that appeared."""
    return draw(logits[None], seen[None], [sampling], [generator])[0]


def draw(
    logits: Tensor, seen: Tensor, samplings: list[Sampling], generators: list[torch.Generator]
) -> list[int]:
    """Draw a token for each row of logits (rows, tokens), with the row's sampling and generator."""

    def column(values: Iterable[float]) -> Tensor:
        return torch.tensor(list(values), device=logits.device)[:, None]

    n_tokens = logits.shape[1]
    seen = seen[:, :n_tokens]
    if any(s.repetition_penalty != 1 for s in samplings):
        penalty = column(s.repetition_penalty for s in samplings)
        penalised = torch.where(logits > 0, logits / penalty, logits * penalty)
        logits = torch.where(seen, penalised, logits)
    likeliest = logits.argmax(-1).tolist()
    greedy = [s.temperature == 0 for s in samplings]
    if all(greedy):
        return likeliest
    logits = logits / column(max(s.temperature or 1.0, LOWEST) for s in samplings)
    limits = [s.top_k if 0 < s.top_k < n_tokens else n_tokens for s in samplings]
    top_p = column(0.0 if s.temperature == 0 else s.top_p for s in samplings)
    chance = column(torch.rand((), generator=generator).item() for generator in generators)
    rows = (logits, column(limits), top_p, chance)
    # Sorting the likeliest few is much cheaper than sorting all, and enough for most rows.
    few = max([FEW, *(k for k in limits if k < n_tokens)])
    drawn, enough = _pick(min(few, n_tokens), *rows)
    if not enough.all():
        drawn[~enough] = _pick(n_tokens, *(each[~enough] for each in rows))[0]
    return [a if g else b for a, b, g in zip(likeliest, drawn.tolist(), greedy, strict=True)]


def _pick(
    n: int, logits: Tensor, top_k: Tensor, top_p: Tensor, chance: Tensor
) -> tuple[Tensor, Tensor]:
    """Draw among the n likeliest tokens of each row.

    Args:
        n: how many tokens are sorted.
        logits: (rows, tokens).
        top_k: (rows, 1), at most n or all tokens.
        top_p: (rows, 1).
        chance: (rows, 1), uniform in [0, 1): which token of the cumulated distribution is drawn.

    Returns:
        (rows,) tokens, and (rows,) whether the n likeliest contain all that may be drawn.
    """
    ordered, order = logits.topk(n)
    ordered = ordered.masked_fill(torch.arange(n, device=logits.device) >= top_k, -torch.inf)
    every = logits.logsumexp(-1, keepdim=True)
    every = torch.where(top_k < logits.shape[1], ordered.logsumexp(-1, keepdim=True), every)
    probabilities = (ordered - every).exp()
    reached = probabilities.cumsum(-1)
    kept = (reached - probabilities < top_p) & (probabilities > 0)
    last = kept.sum(-1, keepdim=True).clamp(min=1) - 1  # the first one always stays
    place = (reached <= chance * reached.gather(-1, last)).sum(-1, keepdim=True).minimum(last)
    enough = (reached[:, -1:] >= top_p) | (top_k <= n)
    return order.gather(-1, place)[:, 0], enough[:, 0]
