"""The settings of a training run: each option of `python -m ysnake.train`, its default and checks.

Without torch, so that `--help` and errors are quick.
"""

import argparse
import json
import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from tyro.conf import arg

from ysnake.model.config import PRESETS
from ysnake.shared import cli, files
from ysnake.shared.errors import InputError
from ysnake.shared.files import read_json

SHIPPED = Path(__file__).parents[2] / "training_data"


@dataclass
class Settings:
    """Train a Mamba-2 language model. Without arguments: the quick preset on the shipped corpus."""

    data: Annotated[tuple[Path, ...], arg(metavar="PATH...")] = (SHIPPED,)
    """Files and folders of .txt and .md (documents separated by a line <|endoftext|>) and .jsonl (a
    document in each line). About a twentieth of the text is held out to measure with."""
    run: Annotated[Path | None, arg(metavar="DIR")] = None
    """Folder of this run; by default a new one in runs/. With --resume: the run to go on with, by
    default the newest."""
    from_: Annotated[Path | None, arg(name="from", metavar="CHECKPOINT")] = None
    """Start a new run from this checkpoint's weights and tokenizer."""
    resume: bool = False
    """Go on with a run that was stopped, with its own settings."""
    preset: Annotated[str, arg(metavar="NAME")] = "quick"
    """Sizes and training settings to start from: quick, ys-24m, ys-60m or ys-71m."""

    tokenizer: Literal["bpe", "word"] | None = None
    """bpe, the default, works on bytes and loses nothing; word knows whole words, else
    characters."""
    vocab_size: int | None = None
    """Entries of the tokenizer; by default the preset's number or as many as the corpus gives."""
    max_documents: int | None = None
    """Take so many documents only, in turn from each file; by default all of --data."""
    encoding: str = "utf-8"
    """Encoding of the files, for example utf-16 or cp1252."""
    text_field: Annotated[str, arg(metavar="NAME")] = "text"
    """Field of a .jsonl line that holds the document."""

    seq_len: int = 256
    """Tokens trained on at a time. Running has no such limit."""
    batch_size: int = 16
    """Sequences per forward pass, those of all processes together."""
    accumulate: int = 1
    """Forward passes per step of the optimiser."""
    carry_state: bool = False
    """Train on consecutive windows and hand the state on from one to the next, so that short
    sequences teach long text."""

    d_model: int = 512
    """Embedding size."""
    n_layers: int = 10
    """Layers."""
    d_state: int = 128
    """State size of each head."""
    head_dim: int = 64
    """Channels per head."""
    expand: int = 2
    """Inner size of a layer over its embedding size."""
    n_groups: int = 1
    """Groups of heads that share B and C."""
    chunk_size: int | None = None
    """Tokens per chunk ("attention block") of the scan; by default the device's best. Changes time
    and memory, not the result."""
    output_size: int | None = None
    """Size of a layer between the embedding and the logits; by default there is none and the head
    is tied to the embedding."""
    init: Literal["hippo", "uniform"] = "hippo"
    """How the decay rates start: A_n = -(n + 1) over the heads, or -A uniform in [1, 16]."""

    lr: float = 1e-3
    """Peak learning rate of AdamW."""
    weight_decay: float = 0.1
    """Of matrices; never of A_log, D, dt_bias, norms and biases."""
    warmup_steps: int = 100
    """Steps until the learning rate is at its peak; from there a cosine takes it to a tenth."""
    max_steps: int | None = None
    """Stop after so many steps; by default the preset's number, or none with --max-minutes."""
    max_minutes: float | None = None
    """Stop after so many minutes. Without --max-steps the learning rate follows the clock."""
    stop_at_loss: float | None = None
    """Stop when the training loss, averaged over 50 steps, is this low (nats per token)."""
    patience: int | None = None
    """Stop after so many evaluations without a better held-out loss."""
    eval_every: int = 250
    """Steps between evaluations, each with a sample of text and a new picture."""
    checkpoint_every: int = 250
    """Steps between writes of last/."""

    recompute: bool = False
    """Keep of each block its input alone and compute the rest again for the gradient: less memory,
    more time, the same result."""
    memory: Annotated[str | None, arg(metavar="SIZE")] = None
    """Stay below this memory, for example 8GB: smaller batches, more of them in a step, and
    --recompute if need be. A step sees as many windows as without it."""
    plan: bool = False
    """Print parameters, predicted memory and the largest batch that fits, and train nothing."""

    seed: int = 0
    """Decides the first weights and the order of the windows."""
    device: str = "auto"
    """auto (CUDA, else CPU), cpu, cuda or mps."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto: bfloat16 autocast on CUDA, float32 elsewhere. State and decay are float32 always."""
    no_graphs: bool = False
    """On one GPU: launch the kernels of a step one by one. By default a CUDA graph launches them
    all at once, with which small models train several times as fast."""
    threads: int | None = None
    """Threads on the CPU; by default one for each core."""
    shard: bool = False
    """Under torchrun: spread weights, gradients and optimizer over the processes (FSDP2). Say it
    again with --resume."""
    context_parallel: Annotated[int, arg(metavar="K")] = 1
    """Under torchrun: split each sequence over K processes. Say it again with --resume."""


# What may differ when a run is resumed. The rest decides its weights. lr and warmup_steps do too,
# but a run that has diverged needs others.
FREE_ON_RESUME = (
    *("run", "resume", "plan", "shard", "context_parallel", "device", "threads"),
    *("recompute", "no_graphs"),
    *("max_steps", "max_minutes", "stop_at_loss", "patience", "eval_every", "checkpoint_every"),
    *("lr", "warmup_steps"),
)
# What a launch decides anew.
OF_A_LAUNCH = {"resume": False, "plan": False, "shard": False, "context_parallel": 1}
LARGEST = 2**63  # what fits no number of torch's
MOST_TOKENS = 1 << 26  # in a step of the optimiser; all its batches are cut before it begins
UNITS = {"": 1, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
MODEL_SIZES = ("d_model", "n_layers", "d_state", "head_dim", "expand", "n_groups")


def parse(argv: list[str]) -> Settings:
    """The settings of a command line, checked.

    Its defaults come from the run it resumes, else the checkpoint it starts from, else the preset.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", default="quick")
    first.add_argument("--resume", action="store_true")
    first.add_argument("--run", type=Path)
    first.add_argument("--from", type=Path, dest="from_")
    first.add_argument("--data", nargs="*")
    first.add_argument("--tokenizer")
    first.add_argument("--init")
    known, _ = first.parse_known_args([a for a in argv if a not in ("-h", "--help")])
    if known.preset not in PRESETS:
        raise InputError(f"--preset: expected one of {', '.join(PRESETS)}, got {known.preset}")
    if known.resume:
        stored = read(known.run or cli.newest_run())
        # A flag that the run has set already may be given again; tyro then knows only --no-NAME.
        flags = {option(f.name) for f in fields(Settings) if getattr(stored, f.name) is True}
        argv = [word for word in argv if word.replace("_", "-") not in flags]
        settings = cli.parse(Settings, argv, "train", default=stored)
        _check_resumed(settings, stored)
        settings.run = stored.run
    else:
        preset = PRESETS[known.preset]
        sizes = {}
        if known.from_:
            from ysnake.checkpoints import checkpoint

            source = checkpoint.resolve(known.from_)
            _, config = checkpoint.newest_good(source, checkpoint.load_config)
            sizes = {name: getattr(config, name) for name in MODEL_SIZES}
        default = Settings(preset=known.preset, **preset.settings | sizes)
        if known.data is not None:  # a preset's limit is for the shipped corpus
            default.max_documents = None
        settings = cli.parse(Settings, argv, "train", default=default)
        for name in ("tokenizer", "init"):
            if known.from_ and getattr(known, name) is not None:
                raise InputError(f"{option(name)}: fixed by the checkpoint that --from names")
        if not known.from_:
            settings.tokenizer = settings.tokenizer or "bpe"
        for name, size in sizes.items():
            if getattr(settings, name) != size:
                raise InputError(
                    f"{option(name)}: the checkpoint {known.from_} has {size}, "
                    f"got {getattr(settings, name)}"
                )
        if settings.max_steps is None and settings.max_minutes is None:
            settings.max_steps = preset.max_steps
    check(settings)
    return settings


def _check_resumed(settings: Settings, stored: Settings) -> None:
    """Raise InputError where a command line asks for another run than the stored one.

    The command line that began the run is right too, so paths are compared by what they lead to,
    and the batch that --memory has changed by the windows of a step.
    """
    if settings.from_ and not _same(settings.from_, stored.from_):
        raise InputError("--from: starts a new run, so it does not go with --resume")
    windows, planned = (s.batch_size * s.accumulate for s in (settings, stored))
    if stored.memory is not None and (settings.memory, windows) == (stored.memory, planned):
        settings.batch_size, settings.accumulate = stored.batch_size, stored.accumulate
        settings.recompute = settings.recompute or stored.recompute
    for f in fields(Settings):
        given, own = getattr(settings, f.name), getattr(stored, f.name)
        if f.name not in FREE_ON_RESUME and not _same(given, own):
            raise InputError(f"{option(f.name)}: a run is resumed with its own, {own}; got {given}")


def _same(given: Any, own: Any) -> bool:
    def resolved(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(resolved, value))
        return value.resolve() if isinstance(value, Path) else value

    return resolved(given) == resolved(own)


def check(settings: Settings) -> None:
    """Raise InputError for a value of a wrong type or out of range, naming the option."""
    for name, kind in get_type_hints(Settings).items():
        value = getattr(settings, name)
        if not _is_a(kind, value):
            raise InputError(f"{option(name)}: expected {_name_of(kind)}, got {value!r}"[:300])
    if settings.preset not in PRESETS:
        raise InputError(
            f"--preset: expected one of {', '.join(PRESETS)}, got {settings.preset}"[:300]
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
            raise InputError(f"{option(name)}: expected at least {bound}, got {value}")
        if value >= LARGEST:
            raise InputError(f"{option(name)}: expected below {LARGEST}, got {value}")
    tokens = settings.accumulate * settings.batch_size * settings.seq_len
    if tokens > MOST_TOKENS:
        raise InputError(
            f"--accumulate, --batch-size, --seq-len: expected at most {MOST_TOKENS:,} tokens in a "
            f"step, got {settings.accumulate} * {settings.batch_size} * {settings.seq_len}"
        )
    if settings.max_steps is None and settings.max_minutes is None:
        raise InputError("--max-steps, --max-minutes: expected at least one of them, got neither")
    if settings.max_minutes == 0:
        raise InputError("--max-minutes: expected above 0, got 0")
    if settings.memory is not None:
        parse_size(settings.memory)
    if settings.from_ and (settings.vocab_size or settings.output_size):
        name = "vocab_size" if settings.vocab_size else "output_size"
        raise InputError(f"{option(name)}: fixed by the checkpoint that --from names")


def _is_a(kind: Any, value: Any) -> bool:
    """Whether a value, which may come from a file, is of the type that a field has."""
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if get_origin(kind) in (Union, UnionType):
        return any(_is_a(each, value) for each in get_args(kind))
    if get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(_is_a(get_args(kind)[0], v) for v in value)
    if kind in (int, float):
        return isinstance(value, int | kind) and not isinstance(value, bool)
    return isinstance(value, kind)


def _name_of(kind: Any) -> str:
    if get_origin(kind) in (Union, UnionType):
        kind = get_args(kind)[0]  # the other is None
    if get_origin(kind) is Literal:
        return f"one of {', '.join(get_args(kind))}"
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    return names.get(kind, "a path")


def option(name: str) -> str:
    return "--" + name.rstrip("_").replace("_", "-")


def write(settings: Settings) -> None:
    """Write the settings into the folder of their run, whole or not at all."""

    def plain(value: Any) -> Any:
        if isinstance(value, tuple):
            return [plain(each) for each in value]
        return str(value.resolve()) if isinstance(value, Path) else value

    values = {k: plain(v) for k, v in asdict(settings).items() if k != "run"}
    with files.replacing(settings.run / "settings.json") as path:
        path.write_text(json.dumps(values, indent=2) + "\n")


def read(folder: Path) -> Settings:
    """The settings of the run in this folder."""
    path = folder / "settings.json"
    if not path.exists():
        raise InputError(f"{path}: no such file, so there is no run to resume")
    values = read_json(path)
    try:
        if not isinstance(values["data"], list):
            raise InputError(f"--data: expected a list of paths, got {values['data']!r}"[:300])
        values["data"] = tuple(map(Path, values["data"]))
        values["from_"] = values["from_"] and Path(values["from_"])
        settings = Settings(**values | {"run": folder} | OF_A_LAUNCH)
        check(settings)
    except (TypeError, LookupError, InputError) as error:
        raise InputError(f"{path}: not the settings of a run ({error})") from error
    return settings


def parse_size(text: str) -> float:
    """Bytes of "8GB", "500 MB" or "1.5G".

    Raises:
        InputError: it is none of these.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)i?B?\s*", text, re.IGNORECASE)
    if match is None or float(match[1]) == 0:
        raise InputError(f"--memory: expected a size like 8GB, got {text!r}")
    return float(match[1]) * UNITS[match[2].upper()]
