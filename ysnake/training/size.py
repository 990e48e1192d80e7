"""The sizes of `--size`, and the rules that follow from a size, a text and a time.

All numbers that --size chooses are in this file. docs/train.md, "Which size", gives the reasons.
This file does not import torch, so `--help` and errors are quick.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ysnake.model.config import PRESETS, ModelConfig, padded_vocab
from ysnake.shared.errors import InputError
from ysnake.training.options import Settings

AUTO = "auto"
# The same for all sizes: the batch, the warm-up and the optimizer with which they were measured.
RECIPE: dict[str, Any] = {
    "seq_len": 128,
    "batch_size": 16,
    "optimizer": "muon",
    "schedule": "cosine",
    "warmup_steps": 30,
    "eval_every": 100,
    "checkpoint_every": 100,
    "patience": 5,
}
RATE_TIMES_WIDTH = 3.0  # the best learning rate is about this, divided by d_model
LARGEST_RATE = 12e-3
BYTES_PER_TOKEN = 3  # of English text, about
BYTES_PER_ENTRY = 100  # of text for each entry of the vocabulary: each then occurs about 30 times
LEAST_VOCABULARY = 512
MOST_PASSES = 4  # over the text; more passes teach little (arXiv 2305.16264)
MOST_TOKENS_PER_PARAMETER = 20  # of training; beyond it a larger size is better (arXiv 2203.15556)
LEAST_STEPS = 200  # however small the text is
LEAST_TOKENS_PER_PARAMETER = 1  # that --size auto asks for, before it takes a larger size


@dataclass(frozen=True)
class Size:
    """What a name of --size stands for."""

    d_model: int
    n_layers: int
    d_state: int
    vocabulary: int  # at most
    measured: tuple[tuple[float, float], ...] = ()
    """Tokens of training, and the held-out loss after them in nats per byte of MEASURED_ON."""

    @property
    def parameters(self) -> int:
        """About how many parameters a model of this size has."""
        rows = padded_vocab(self.vocabulary)
        return ModelConfig(rows, self.d_model, self.n_layers, self.d_state).n_in_matrices

    @property
    def rate(self) -> float:
        """The peak learning rate, to two digits."""
        return min(LARGEST_RATE, float(f"{RATE_TIMES_WIDTH / self.d_model:.2g}"))


MEASURED_ON = "Vim's documentation (9.4 MB)"
SIZES = {
    "3M": Size(256, 4, 64, 4096, measured=((0.31e6, 1.21), (2.2e6, 0.91))),
    "10M": Size(384, 7, 128, 8192),
    "24M": Size(512, 10, 128, 13_183, measured=((0.17e6, 1.26),)),
    "71M": Size(768, 13, 128, 28_590),
}
NAMES = (*SIZES, AUTO)


def settings_of(name: str) -> dict[str, Any]:
    """The settings that a size determines, whatever the text and the time are."""
    size = SIZES[name]
    own = {"d_model": size.d_model, "n_layers": size.n_layers, "d_state": size.d_state}
    return {"preset": None, "size": name, **RECIPE, **own, "lr": size.rate}


def check(known: dict[str, Any]) -> None:
    """Raise InputError if --size is no size, or does not go with the other settings."""
    name = known.get("size")
    if name is None:
        return
    if name not in NAMES:
        raise InputError(f"expected one of {', '.join(NAMES)}, got {name}"[:300], field="--size")
    if known.get("preset") is not None:
        raise InputError(
            f"give only one of them, since both choose the sizes and the training; got "
            f"{known['preset']} and {name}",
            field="--preset, --size",
        )
    if known.get("from_") is not None:
        raise InputError("the checkpoint that --from names has its own size", field="--size")


def vocabulary(settings: Settings, n_bytes: int | None) -> int:
    """The largest vocabulary to learn.

    Args:
        settings: a new run's.
        n_bytes: bytes of the text; None if unknown.
    """
    if settings.vocab_size is not None:
        return settings.vocab_size
    if settings.size is None:
        assert settings.preset is not None  # one of the two is set
        return PRESETS[settings.preset].max_vocab
    largest = SIZES[settings.size].vocabulary
    if n_bytes is None or settings.tokenizer == "word":
        return largest
    return min(largest, max(LEAST_VOCABULARY, n_bytes // BYTES_PER_ENTRY))


def text_bytes(settings: Settings) -> int:
    """About how many bytes of text there are to train on."""
    if settings.tokens_from is not None:
        tokens = settings.tokens_from / "data" / "train.tokens"
        of_each = 2 if (settings.vocab_size or 0) <= 1 << 16 else 4
        return tokens.stat().st_size // of_each * BYTES_PER_TOKEN if tokens.is_file() else 0
    from ysnake.text.documents import find_files

    return sum(path.stat().st_size for path in find_files(settings.data))


def tokens_worth(name: str, n_bytes: int) -> int:
    """The most tokens of training that a size can use well on a text of so many bytes."""
    passes = MOST_PASSES * n_bytes // BYTES_PER_TOKEN
    return min(passes, MOST_TOKENS_PER_PARAMETER * SIZES[name].parameters)


def steps(settings: Settings) -> int:
    """The number of steps of a new run with --size, if the user limits neither steps nor time."""
    if settings.max_documents is not None and settings.tokens_from is None:
        raise InputError(
            "with --size it needs --max-steps or --max-minutes, since the size of the text is not "
            "known then",
            field="--max-documents",
        )
    assert settings.size is not None
    of_a_step = max(1, settings.accumulate * settings.batch_size * settings.seq_len)
    return max(LEAST_STEPS, tokens_worth(settings.size, text_bytes(settings)) // of_a_step)


def largest_for(
    minutes: float, n_bytes: int, speed: Callable[[str], float | None], say: Callable[[str], None]
) -> str:
    """The size that --size auto takes.

    It is the largest size that sees enough tokens for its parameters, or else the smallest size.

    Args:
        minutes: the time for training.
        n_bytes: bytes of the text.
        speed: the tokens per second with which a size trains here, or None if a step does not fit
            into the memory. It is called for the sizes in turn, up to the first that is too large.
        say: takes a line for the user with the reason.
    """
    chosen, *larger = SIZES
    for name in larger:
        least = LEAST_TOKENS_PER_PARAMETER * SIZES[name].parameters
        reason = f"in at most {MOST_PASSES} passes over this text"
        tokens: float = tokens_worth(name, n_bytes)
        if tokens >= least:
            per_second = speed(name)
            if per_second is None:
                say(f"--size auto: {chosen}, since a step of {name} does not fit into the memory")
                return chosen
            reason = f"in {minutes:g} minutes"
            tokens = min(tokens, 60 * minutes * per_second)
        if tokens < least:
            say(
                f"--size auto: {chosen}, since {name} would learn from {tokens / 1e6:,.2f} million "
                f"tokens {reason}, fewer than one for each of its parameters"
            )
            return chosen
        chosen = name
    say(f"--size auto: {chosen}, the largest")
    return chosen
