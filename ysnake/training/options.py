"""The settings of a training run: the options of `python -m ysnake.train`, and their bounds.

This file does not import torch, so `--help` and errors are quick.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, get_type_hints

from tyro.conf import arg

from ysnake.inference.model_options import DeviceOption, ThreadsOption
from ysnake.model.config import PRESETS
from ysnake.shared.errors import InputError, option
from ysnake.shared.field_types import is_a, name_of

Optimizer = Literal["adamw", "muon"]
MOMENTUM = 0.9  # of Muon, unless set
BETA2: dict[Optimizer, float] = {"adamw": 0.95, "muon": 0.99}  # of AdamW, unless set
Schedule = Literal["cosine", "linear"]
Precision = Literal["auto", "float32", "bfloat16"]
SHIPPED = Path(__file__).parents[2] / "training_data"


@dataclass
class Settings:
    """Train a Mamba-2 language model. Without arguments: the quick preset on the shipped corpus."""

    data: Annotated[tuple[Path, ...], arg(metavar="PATH...")] = (SHIPPED,)
    """Files and folders to train on: .txt and .md (a line <|endoftext|> separates documents) and
    .jsonl (each line is a document). About a twentieth of the text is held out for evaluation."""
    config: Annotated[Path | None, arg(metavar="FILE")] = None
    """Read settings from this file, TOML or the settings.json of a run. Other options win."""
    run: Annotated[Path | None, arg(metavar="DIR")] = None
    """Folder of the run; by default a new one in runs/. With --resume: the run to continue, by
    default the newest."""
    from_: Annotated[Path | None, arg(name="from", metavar="CHECKPOINT")] = None
    """Start a new run from this checkpoint's weights and tokenizer. Its sizes are the checkpoint's.
    The other settings are those of --preset."""
    resume: bool = False
    """Continue a run that was stopped, with its own settings."""
    size: Literal["3M", "10M", "24M", "71M", "auto"] | None = None
    """Number of parameters. It chooses the sizes, the optimizer and the batch, for your text and
    your time. Options that you give win. auto takes the size that suits --max-minutes here."""
    preset: Annotated[str | None, arg(metavar="NAME")] = "quick"
    """Sizes and training settings to start from: quick, ys-24m, ys-60m or ys-71m. For your own text
    --size is simpler."""

    tokenizer: Literal["bpe", "word"] | None = None
    """bpe, the default, works on bytes and loses nothing. word has a token for each frequent word
    and splits others into characters."""
    vocab_size: int | None = None
    """Entries of the tokenizer; by default those of the preset or size, or fewer if the corpus is
    small."""
    max_documents: int | None = None
    """Largest number of documents, from the files in turn; by default all of --data, or 128 of
    the shipped corpus with the quick preset."""
    encoding: str = "utf-8"
    """Encoding of the files, for example utf-16 or cp1252."""
    text_field: Annotated[str, arg(metavar="NAME")] = "text"
    """Field of a .jsonl line that holds the document."""
    tokens_from: Annotated[Path | None, arg(metavar="RUN")] = None
    """Train on the tokens of this run, with its tokenizer. The text is not read again."""

    seq_len: int = 256
    """Tokens of a training sequence. A trained model reads and writes text of any length."""
    batch_size: int = 16
    """Sequences per forward pass, over all processes together."""
    accumulate: int = 1
    """Forward passes per step of the optimizer."""
    carry_state: bool = False
    """Train on consecutive windows. Each starts with the state after the previous window, so the
    model learns long text from short sequences."""

    d_model: int = 512
    """Embedding size."""
    n_layers: int = 10
    """Layers."""
    d_state: int = 128
    """State size of each head."""
    head_dim: int = 64
    """Channels per head."""
    expand: int = 2
    """Inner size of a layer, as a multiple of its embedding size."""
    n_groups: int = 1
    """Groups of heads that share B and C."""
    chunk_size: int | None = None
    """Tokens per chunk ("attention block") of the scan; by default what is fastest on the device.
    It changes time and memory, and the result only by rounding. --resume may change it."""
    output_size: int | None = None
    """Size of an additional layer before the logits; by default there is none, and the head shares
    its weights with the embedding."""
    init: Literal["hippo", "uniform"] = "hippo"
    """Initial decay rates: hippo means A_n = -(n + 1) over the heads, uniform -A in [1, 16]."""
    zero_out: bool = False
    """Begin with output projections of zero. Each layer then begins as the identity."""

    lr: Annotated[float, arg(aliases=("--learning-rate",))] = 1e-3
    """Peak learning rate."""
    optimizer: Optimizer = "adamw"
    """adamw, or muon: Muon for the projections of each layer and AdamW for the other weights. A
    step with Muon learns more, and takes as long or a little longer. The same --lr suits both."""
    momentum: float = MOMENTUM
    """Momentum of Muon, from 0 to below 1: the weight of earlier steps in its mean of gradients."""
    beta2: float | None = None
    """Beta2 of AdamW, from 0 to below 1: the weight of earlier steps in its mean of squared
    gradients. By default 0.99 beside Muon, and 0.95 where AdamW updates all weights."""
    weight_decay: float = 0.1
    """Weight decay of matrices. There is none for A_log, D, dt_bias, norms and biases."""
    warmup_steps: int = 100
    """Steps until the learning rate reaches its peak."""
    schedule: Schedule = "cosine"
    """How the learning rate falls after its peak: along a cosine to a tenth, or in a line to 0."""
    max_steps: int | None = None
    """Stop after this many steps; by default those of the preset, with --size a number that suits
    the amount of text, or none with --max-minutes. With --resume the word None lifts the limit."""
    max_minutes: float | None = None
    """Stop after this many minutes of training, counted from the run's start. Without
    --max-steps the learning rate follows the time."""
    stop_at_loss: float | None = None
    """Stop when the mean training loss of 50 steps is at most this (nats per token)."""
    patience: int | None = None
    """Stop after this many evaluations without a better held-out loss."""
    eval_every: int = 250
    """Steps between evaluations. Each also writes a sample of text, and redraws loss.png unless
    that would take much of the time."""
    checkpoint_every: int = 250
    """Steps between checkpoints in last/."""

    log: Literal["tensorboard", "wandb", "trackio"] | None = None
    """Write the metrics to this tool too. TensorBoard reads the folder tensorboard/ of the run."""

    recompute: bool = False
    """Store only the input of each layer and compute the rest again in the backward pass. This
    takes less memory and more time. The result is the same."""
    memory: Annotated[str | None, arg(metavar="SIZE")] = None
    """Stay below this memory, for example 8GB. Training then takes smaller batches, accumulates
    more of them, and recomputes if necessary. The number of windows in a step stays the same."""
    plan: bool = False
    """Print the number of parameters, the predicted memory and the largest batch, and with --size
    also the time and loss to expect. Do not train."""

    seed: int = 0
    """Determines the first weights and the order of the windows."""
    device: DeviceOption = "auto"
    precision: Precision = "auto"
    """bfloat16 computes matrix products in 16 bits: on a GPU by autocast, on a CPU by rounding the
    factors. auto is bfloat16 on CUDA, and on a CPU where a short measurement finds it at least
    1.2 times as fast. Otherwise it is float32. State and decay are always float32."""
    no_graphs: bool = False
    """On one GPU: launch the kernels of a step one by one. By default a CUDA graph launches all at
    once, which trains small models several times as fast."""
    threads: ThreadsOption = None
    shard: bool = False
    """With torchrun: spread weights, gradients and optimizer over the processes (FSDP2). Repeat the
    option with --resume."""
    context_parallel: Annotated[int, arg(metavar="K")] = 1
    """With torchrun: split each sequence over K processes. Repeat the option with --resume."""

    @property
    def folder(self) -> Path:
        """The folder of the run, once it is known."""
        assert self.run is not None
        return self.run


LARGEST = 2**63  # too large for an integer of torch
MOST_TOKENS = 1 << 26  # in a step of the optimizer, whose batches are all in memory
LEAST_MEMORY = 1e6  # bytes; --memory 8 lacks its unit
UNITS = {"": 1, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
MODEL_SIZES = ("d_model", "n_layers", "d_state", "head_dim", "expand", "n_groups")


def check(settings: Settings) -> None:
    """Raise InputError for a value of a wrong type or out of range."""
    for name, kind in get_type_hints(Settings).items():
        value = getattr(settings, name)
        if not is_a(kind, value):
            raise InputError(f"expected {name_of(kind)}, got {value!r}"[:300], field=option(name))
    check_preset(settings.preset)
    if (settings.preset is None) == (settings.size is None):
        raise InputError("expected exactly one of the two", field="--preset, --size")
    least: dict[str, float] = {
        **dict.fromkeys(("seq_len", "batch_size", "accumulate", "max_steps", "patience"), 1),
        **dict.fromkeys(("eval_every", "checkpoint_every", "threads", "max_documents"), 1),
        "context_parallel": 1,
        **dict.fromkeys(("vocab_size", *MODEL_SIZES, "chunk_size", "output_size"), 1),
        **dict.fromkeys(("lr", "weight_decay", "warmup_steps", "stop_at_loss", "seed"), 0),
        "max_minutes": 0,
    }
    for name, bound in least.items():
        value = getattr(settings, name)
        if value is None:
            continue
        if not value >= bound:
            raise InputError(f"expected at least {bound}, got {value}", field=option(name))
        if value >= LARGEST:
            raise InputError(f"expected below {LARGEST}, got {value}", field=option(name))
    tokens = settings.accumulate * settings.batch_size * settings.seq_len
    if tokens > MOST_TOKENS:
        raise InputError(
            f"expected at most {MOST_TOKENS:,} tokens in a "
            f"step, got {settings.accumulate} * {settings.batch_size} * {settings.seq_len}",
            field="--accumulate, --batch-size, --seq-len",
        )
    if settings.max_steps is None and settings.max_minutes is None:
        raise InputError(
            "expected at least one of them, got neither", field="--max-steps, --max-minutes"
        )
    if settings.max_minutes == 0:
        raise InputError("expected above 0, got 0", field="--max-minutes")
    for name in ("momentum", "beta2"):
        share = getattr(settings, name)
        if share is not None and not 0 <= share < 1:
            raise InputError(f"expected from 0 to below 1, got {share}", field=f"--{name}")
    if settings.memory is not None:
        parse_size(settings.memory)
    if settings.from_ and (settings.vocab_size or settings.output_size):
        name = "vocab_size" if settings.vocab_size else "output_size"
        raise InputError(
            "cannot be set with --from, since the checkpoint determines it",
            field=option(name),
        )


def check_preset(name: str | None) -> None:
    """Raise InputError if a preset has an unknown name."""
    if name is not None and name not in PRESETS:
        raise InputError(
            f"expected one of {', '.join(PRESETS)}, got {name[:200]}; --size 3M, 10M, 24M or 71M "
            "chooses the other settings for your text",
            field="--preset",
        )


def parse_size(text: str) -> float:
    """The bytes in a text such as "8GB", "500 MB" or "1.5G".

    Raises:
        InputError: the text is no such size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)i?B?\s*", text, re.IGNORECASE)
    size = float(match[1]) * UNITS[match[2].upper()] if match else 0.0
    if size < LEAST_MEMORY:
        raise InputError(f"expected a size like 8GB, got {text!r}", field="--memory")
    return size
