"""The settings of a training run: the options of `python -m ysnake.train`, defaults and checks.

This file does not import torch, so `--help` and errors are quick.
"""

import argparse
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

from tyro.conf import DisallowNone, arg

from ysnake.inference.model_options import DeviceOption, ThreadsOption
from ysnake.model.config import PRESETS, model_config
from ysnake.shared import cli, files
from ysnake.shared.errors import InputError, option
from ysnake.shared.field_types import is_a, name_of
from ysnake.shared.files import read_json
from ysnake.training import settings_file

Optimizer = Literal["adamw", "muon"]
Schedule = Literal["cosine", "linear"]
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
    """Start a new run from this checkpoint's weights and tokenizer."""
    resume: bool = False
    """Continue a run that was stopped, with its own settings."""
    preset: Annotated[str, arg(metavar="NAME")] = "quick"
    """Sizes and training settings to start from: quick, ys-24m, ys-60m or ys-71m."""

    tokenizer: Annotated[Literal["bpe", "word"] | None, DisallowNone] = None
    """bpe, the default, works on bytes and loses nothing. word has a token for each frequent word
    and splits others into characters."""
    vocab_size: int | None = None
    """Entries of the tokenizer; by default those of the preset, or fewer if the corpus is small."""
    max_documents: int | None = None
    """Use at most this many documents, from each file in turn; by default all of --data."""
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

    lr: float = 1e-3
    """Peak learning rate."""
    optimizer: Optimizer = "adamw"
    """adamw, or muon: Muon for the projections of each layer and AdamW for the other weights. A
    step with Muon learns more and takes longer. The same --lr suits both."""
    weight_decay: float = 0.1
    """Weight decay of matrices. There is none for A_log, D, dt_bias, norms and biases."""
    warmup_steps: int = 100
    """Steps until the learning rate reaches its peak."""
    schedule: Schedule = "cosine"
    """How the learning rate falls after its peak: along a cosine to a tenth, or in a line to 0."""
    max_steps: int | None = None
    """Stop after this many steps; by default those of the preset, or none with --max-minutes."""
    max_minutes: float | None = None
    """Stop after this many minutes of the whole run, also before it was resumed. Without
    --max-steps the learning rate follows the time."""
    stop_at_loss: float | None = None
    """Stop when the mean training loss of 50 steps is at most this (nats per token)."""
    patience: int | None = None
    """Stop after this many evaluations without a better held-out loss."""
    eval_every: int = 250
    """Steps between evaluations. Each also writes a sample of text and redraws loss.png."""
    checkpoint_every: int = 250
    """Steps between checkpoints in last/."""

    log: Annotated[Literal["tensorboard", "wandb", "trackio"] | None, DisallowNone] = None
    """Write the metrics to this tool too. TensorBoard reads the folder tensorboard/ of the run."""

    recompute: bool = False
    """Store only the input of each block and compute the rest again for the gradient. This takes
    less memory and more time. The result is the same."""
    memory: Annotated[str | None, arg(metavar="SIZE")] = None
    """Stay below this memory, for example 8GB. Training then takes smaller batches, accumulates
    more of them, and recomputes if necessary. The number of windows in a step stays the same."""
    plan: bool = False
    """Print the number of parameters, the predicted memory and the largest batch; do not train."""

    seed: int = 0
    """Determines the first weights and the order of the windows."""
    device: DeviceOption = "auto"
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """bfloat16 computes matrix products in 16 bits: on a GPU by autocast, on a CPU by rounding the
    factors. On a CPU that is faster with AMX or AVX512-BF16 only. auto is bfloat16 on CUDA and
    float32 elsewhere. State and decay are always float32."""
    no_graphs: bool = False
    """On one GPU: launch the kernels of a step one by one. By default a CUDA graph launches all of
    them at once. Small models then train several times as fast."""
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


# A resumed run may change these. The others are fixed, since they determine the weights. lr and
# warmup_steps determine them as well, but may change, so that a diverged run can be rescued.
FREE_ON_RESUME = (
    *("config", "run", "resume", "plan", "shard", "context_parallel", "device", "threads"),
    *("recompute", "no_graphs", "log", "chunk_size"),
    *("max_steps", "max_minutes", "stop_at_loss", "patience", "eval_every", "checkpoint_every"),
    *("lr", "warmup_steps"),
)
OF_OLD_RUNS = {"optimizer": "adamw", "schedule": "cosine"}  # their settings.json lacks them
# These settings are not stored: each start determines them again.
OF_A_LAUNCH = {"resume": False, "plan": False, "shard": False, "context_parallel": 1}
LARGEST = 2**63  # too large for an integer of torch
MOST_TOKENS = 1 << 26  # in a step of the optimizer, whose batches are all in memory
LEAST_MEMORY = 1e6  # bytes; --memory 8 lacks its unit
UNITS = {"": 1, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
OF_THE_TEXT = ("data", "max_documents", "encoding", "text_field", "tokenizer", "vocab_size")
MODEL_SIZES = ("d_model", "n_layers", "d_state", "head_dim", "expand", "n_groups")


def parse(argv: list[str], program: str = cli.MODULES) -> Settings:
    """Read and check the settings of a command line.

    A setting comes from its option, else from the file of --config, else from the resumed run, the
    checkpoint of --from, or the preset.
    """
    options = _look_ahead(argv)
    from_file = read_config(options["config"]) if "config" in options else {}

    def add_options(default: Settings) -> Settings:
        # A flag that is set already may be given again; tyro then knows only --no-NAME.
        flags = {option(f.name) for f in fields(Settings) if getattr(default, f.name) is True}
        words = [word for word in argv if word.replace("_", "-") not in flags]
        return cli.parse(Settings, words, cli.command_line("train", program), default=default)

    return _complete(from_file, from_file | options, add_options)


def from_values(values: Mapping[str, Any]) -> Settings:
    """Check settings that were given by name, and add the defaults of the others.

    Raises:
        InputError: a name is unknown or a value is wrong.
    """
    given = settings_file.checked(values, get_type_hints(Settings), "ysnake.train")
    if given.get("config") is not None:
        given = read_config(given["config"]) | given
    return _complete(given, given, lambda settings: settings)


def read_config(path: Path) -> dict[str, Any]:
    """The settings in a file. Those of a run come without what belongs to a single launch."""
    values = settings_file.read(path)
    if path.suffix == ".json":
        values = {k: v for k, v in (OF_OLD_RUNS | values).items() if k not in OF_A_LAUNCH}
    if "config" in values:
        raise InputError(f"{path}: config: a file of settings cannot name another one")
    return settings_file.checked(values, get_type_hints(Settings), str(path))


def _look_ahead(argv: list[str]) -> dict[str, Any]:
    """The options that determine the defaults of others, if they are given."""
    first = argparse.ArgumentParser(
        add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS
    )
    for name in ("--preset", "--tokenizer", "--init"):
        first.add_argument(name)
    for name in ("--run", "--config", "--tokens-from"):
        first.add_argument(name, type=Path)
    first.add_argument("--from", type=Path, dest="from_")
    first.add_argument("--resume", action="store_true")
    first.add_argument("--data", nargs="*")
    return vars(first.parse_known_args([a for a in argv if a not in ("-h", "--help")])[0])


def _complete(
    values: dict[str, Any], known: dict[str, Any], add_options: Callable[[Settings], Settings]
) -> Settings:
    """Settings from defaults, values and options, checked.

    Args:
        values: settings that replace the defaults.
        known: all that determines the defaults: `values`, and some options.
        add_options: replaces settings by the options of the command line.
    """
    if known.get("resume"):
        stored = read(known.get("run") or cli.newest_run())
        settings = add_options(replace(stored, **values))
        _check_resumed(settings, stored)
        settings.run = stored.run
    else:
        settings = add_options(replace(_defaults(known), **values))
        _finish_new(settings)
    check(settings)
    if not (settings.resume or settings.from_):
        _check_model(settings)
    return settings


def _defaults(known: dict[str, Any]) -> Settings:
    """The settings of a new run where nothing else is said."""
    preset = known.get("preset", "quick")
    if preset not in PRESETS:
        raise InputError(f"expected one of {', '.join(PRESETS)}, got {preset}", field="--preset")
    default = Settings(preset=preset, **PRESETS[preset].settings | _sizes_of(known.get("from_")))
    if known.get("data") is not None:  # the preset's limit is for the shipped corpus
        default.max_documents = None
    if known.get("tokens_from") is not None:
        stored = read(known["tokens_from"])
        default = replace(default, **{name: getattr(stored, name) for name in OF_THE_TEXT})
    return default


def _sizes_of(source: Path | None) -> dict[str, int]:
    """The sizes of the model in the checkpoint of --from."""
    if source is None:
        return {}
    from ysnake.checkpoints import checkpoint

    _, config = checkpoint.newest_good(checkpoint.resolve(source), checkpoint.load_config)
    return {name: getattr(config, name) for name in MODEL_SIZES}


def _finish_new(settings: Settings) -> None:
    """Check a new run against the checkpoint of --from, and choose its tokenizer and its end."""
    if settings.tokens_from is not None:
        _check_text(settings, read(settings.tokens_from))
    if settings.from_ is None:
        settings.tokenizer = settings.tokenizer or "bpe"
    else:
        if settings.tokenizer is not None or settings.init != Settings.init:
            name = "init" if settings.tokenizer is None else "tokenizer"
            raise InputError("fixed by the checkpoint that --from names", field=option(name))
        for name, size in _sizes_of(settings.from_).items():
            if getattr(settings, name) != size:
                raise InputError(
                    f"the checkpoint {settings.from_} has {size}, got {getattr(settings, name)}",
                    field=option(name),
                )
    if settings.max_steps is None and settings.max_minutes is None:
        settings.max_steps = PRESETS[settings.preset].max_steps


def _check_model(settings: Settings) -> None:
    """Raise InputError if no model and tokenizer can have these sizes, before any text is read."""
    if settings.vocab_size is not None:
        from ysnake.text import tokenizer

        tokenizer.check_size(settings.tokenizer or "bpe", settings.vocab_size)
    try:
        model_config(settings, settings.vocab_size or PRESETS[settings.preset].max_vocab, 0)
    except InputError as error:
        names = "|".join(MODEL_SIZES)
        reason = re.sub(rf"\b({names})\b", lambda found: option(found[0]), error.reason)
        raise InputError(reason, error.field and option(error.field)) from error


def _check_text(settings: Settings, stored: Settings) -> None:
    """Raise InputError if another text or tokenizer is wanted than that of --tokens-from."""
    if settings.from_ is not None:
        raise InputError("has a tokenizer too, so --tokens-from cannot be given", field="--from")
    for name in OF_THE_TEXT:
        given, own = getattr(settings, name), getattr(stored, name)
        if not _same(given, own):
            raise InputError(
                f"fixed by the run that --tokens-from names, {_shown(own)}; got {_shown(given)}",
                field=option(name),
            )


def _shown(value: Any) -> str:
    """A value as a user writes it."""
    if value is None:
        return "the default"
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _check_resumed(settings: Settings, stored: Settings) -> None:
    """Raise InputError if a command line asks for another run than the stored one.

    The command line that started the run must be accepted too. So paths are resolved before they
    are compared, and a batch that --memory has changed is compared by the windows of a step.
    """
    if settings.from_ and not _same(settings.from_, stored.from_):
        raise InputError("starts a new run, so it does not go with --resume", field="--from")
    windows, planned = (s.batch_size * s.accumulate for s in (settings, stored))
    if stored.memory is not None and (settings.memory, windows) == (stored.memory, planned):
        settings.batch_size, settings.accumulate = stored.batch_size, stored.accumulate
        settings.recompute = settings.recompute or stored.recompute
    for f in fields(Settings):
        given, own = getattr(settings, f.name), getattr(stored, f.name)
        if f.name not in FREE_ON_RESUME and not _same(given, own):
            reason = f"a run is resumed with its own, {_shown(own)}; got {_shown(given)}"
            if f.name == "data":
                reason += f"; --from {stored.folder} trains its weights on other text in a new run"
            raise InputError(reason, field=option(f.name))


def _same(given: Any, own: Any) -> bool:
    def resolved(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(resolved, value))
        return value.resolve() if isinstance(value, Path) else value

    return resolved(given) == resolved(own)


def check(settings: Settings) -> None:
    """Raise InputError for a value of a wrong type or out of range."""
    for name, kind in get_type_hints(Settings).items():
        value = getattr(settings, name)
        if not is_a(kind, value):
            raise InputError(f"expected {name_of(kind)}, got {value!r}"[:300], field=option(name))
    if settings.preset not in PRESETS:
        raise InputError(
            f"expected one of {', '.join(PRESETS)}, got {settings.preset}"[:300], field="--preset"
        )
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
    if settings.memory is not None:
        parse_size(settings.memory)
    if settings.from_ and (settings.vocab_size or settings.output_size):
        name = "vocab_size" if settings.vocab_size else "output_size"
        raise InputError("fixed by the checkpoint that --from names", field=option(name))


def write(settings: Settings) -> None:
    """Write the settings into the folder of their run, completely or not at all."""

    def plain(value: Any) -> Any:
        if isinstance(value, tuple):
            return [plain(each) for each in value]
        return str(value.resolve()) if isinstance(value, Path) else value

    values = {k: plain(v) for k, v in asdict(settings).items() if k not in ("run", "config")}
    with files.replacing(settings.folder / "settings.json") as path:
        path.write_text(json.dumps(values, indent=2) + "\n")


def read(folder: Path) -> Settings:
    """The settings of the run in this folder."""
    path = folder / "settings.json"
    if not path.exists():
        raise InputError(f"{path}: no such file, so there is no run to resume")
    values = read_json(path)
    try:
        if not isinstance(values["data"], list):
            raise InputError(
                f"expected a list of paths, got {values['data']!r}"[:300], field="--data"
            )
        values["data"] = tuple(map(Path, values["data"]))
        for name in ("from_", "tokens_from"):
            values[name] = Path(values[name]) if values.get(name) else None
        settings = Settings(**values | {"run": folder} | OF_A_LAUNCH)
        check(settings)
    except (TypeError, LookupError, InputError) as error:
        raise InputError(f"{path}: not the settings of a run ({error})") from error
    return settings


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
