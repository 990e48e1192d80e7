"""Settings from a command line, a file, a preset, a run or a checkpoint; settings in a run.

This file does not import torch, so `--help` and errors are quick.
"""

import argparse
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, get_type_hints

from ysnake.model.config import PRESETS, model_config
from ysnake.shared import cli, files
from ysnake.shared.errors import InputError, option
from ysnake.shared.files import read_json
from ysnake.training import launch, settings_file, size
from ysnake.training.options import MODEL_SIZES, MOMENTUM, Settings, check, check_preset

# A resumed run may change these. The others are fixed, since they determine the weights. lr and
# warmup_steps determine them as well, but may change, so that a diverged run can be rescued.
FREE_ON_RESUME = (
    *("config", "run", "resume", "plan", "shard", "context_parallel", "device", "threads"),
    *("recompute", "no_graphs", "log", "chunk_size"),
    *("max_steps", "max_minutes", "stop_at_loss", "patience", "eval_every", "checkpoint_every"),
    *("lr", "warmup_steps"),
)
# The settings.json of older runs lacks these.
OF_OLD_RUNS = {
    **{"optimizer": "adamw", "schedule": "cosine", "zero_out": False},
    **{"momentum": 0.95, "beta2": 0.95},
}
OF_ANY_RUN = {"d_model", "seq_len", "lr", "seed", "device"}  # a file with all of these is a run's
# These settings are not stored: each start determines them again.
OF_A_LAUNCH = {"resume": False, "plan": False, "shard": False, "context_parallel": 1}
OF_THE_TEXT = ("data", "max_documents", "encoding", "text_field", "tokenizer", "vocab_size")


Say = Callable[[str], None]  # takes a line for the user


def parse(argv: list[str], program: str = cli.MODULES) -> Settings:
    """Read and check the settings of a command line.

    A setting comes from its option, else from the file of --config, else from the resumed run, the
    checkpoint of --from, the size, or the preset.
    """
    if argv and not argv[0].startswith("-"):
        raise InputError(f"{argv[0]}: the files to train on stand after --data")
    options = _look_ahead(argv)
    from_file = read_config(options["config"], options) if "config" in options else {}

    def add_options(default: Settings) -> Settings:
        # A flag that is set already may be given again; tyro then knows only --no-NAME.
        flags = {option(f.name) for f in fields(Settings) if getattr(default, f.name) is True}
        words = [word for word in argv if word.replace("_", "-") not in flags]
        return cli.parse(Settings, words, cli.command_line("train", program), default=default)

    return _complete(from_file, from_file | options, add_options, print)


def from_values(values: Mapping[str, Any], say: Say = print) -> Settings:
    """Check settings that were given by name, and add the defaults of the others.

    Args:
        values: the settings by name.
        say: what --size auto tells.

    Raises:
        InputError: a name is unknown or a value is wrong.
    """
    given = settings_file.checked(values, get_type_hints(Settings), "ysnake.train")
    if given.get("config") is not None:
        given = read_config(given["config"], given) | given
    return _complete(given, given, lambda settings: settings, say)


def read_config(path: Path, given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings in a file. Those of a run come without what belongs to a single launch.

    Args:
        path: the file.
        given: other settings, which will win. Another size or preset than a run's is refused, since
            the file has all settings that it would choose.
    """
    values = settings_file.read(path)
    if values.keys() >= OF_ANY_RUN:
        values = {k: v for k, v in (OF_OLD_RUNS | values).items() if k not in OF_A_LAUNCH}
        for name in ("size", "preset"):
            if given.get(name) not in (None, values.get(name)):
                raise InputError(
                    f"{path} has all settings of a run, so it cannot be combined with "
                    f"{option(name)} {given[name]}",
                    field=f"--config, {option(name)}",
                )
    if "config" in values:
        raise InputError(f"{path}: config: a file of settings cannot name another one")
    return settings_file.checked(values, get_type_hints(Settings), str(path))


def _look_ahead(argv: list[str]) -> dict[str, Any]:
    """The options that determine the defaults of others, if they are given."""
    first = argparse.ArgumentParser(
        add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS
    )
    for name in ("--size", "--preset", "--tokenizer", "--init"):
        first.add_argument(name)
    for name in ("--run", "--config", "--tokens-from"):
        first.add_argument(name, type=Path)
    first.add_argument("--from", type=Path, dest="from_")
    first.add_argument("--resume", action="store_true")
    first.add_argument("--data", nargs="*")
    named = [_spelled(word) for word in argv]
    return vars(first.parse_known_args([a for a in named if a not in ("-h", "--help")])[0])


def _spelled(word: str) -> str:
    """An argument, with the name of an option as argparse knows it: with - between its words."""
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value if word.startswith("--") else word


def _complete(
    values: dict[str, Any],
    known: dict[str, Any],
    add_options: Callable[[Settings], Settings],
    say: Say,
) -> Settings:
    """Settings from defaults, values and options, checked.

    Args:
        values: settings that replace the defaults.
        known: all that determines the defaults: `values`, and some options.
        add_options: replaces settings by the options of the command line.
        say: what --size auto tells.
    """
    if known.get("resume"):
        stored = read(known.get("run") or cli.newest_run())
        settings = add_options(replace(stored, **values))
        if settings.size == size.AUTO and stored.size:  # it was chosen when the run began
            settings.size = stored.size
        _check_resumed(settings, stored)
        settings.run = stored.run
        check(settings)
        return settings

    def of_size(name: Any) -> Settings:
        """The settings with this size, from options and values too, checked."""
        settings = add_options(replace(_defaults(known | {"size": name}), **values))
        settings.size = name
        if name is None:
            settings.preset = settings.preset or "quick"
        _finish_new(settings)
        check(settings)
        if settings.from_ is None:
            _check_model(settings)
        return settings

    size.check(known)
    if known.get("size") == size.AUTO:
        return of_size(_measured_size(of_size, say))
    return of_size(known.get("size"))


def _measured_size(of_size: Callable[[str], Settings], say: Say) -> str:
    """The size that --size auto takes for the text and --max-minutes on this machine."""
    first = of_size(next(iter(size.SIZES)))
    if first.max_minutes is None:
        raise InputError("auto needs a time, --max-minutes M", field="--size")
    if launch.launched():
        raise InputError(
            "auto works with one process only; with several name a size", field="--size"
        )
    n_bytes = size.text_bytes(first)

    def speed(name: str) -> float | None:
        from ysnake.training.speed import measure_if_it_fits

        settings = of_size(name)
        vocabulary = size.vocabulary(settings, n_bytes)
        return measure_if_it_fits(settings, model_config(settings, vocabulary, 0))

    cli.use_threads(first.threads)
    say("--size auto: measuring how fast this machine trains")
    return size.largest_for(first.max_minutes, n_bytes, speed, say)


def _defaults(known: dict[str, Any]) -> Settings:
    """The settings of a new run where nothing else is said."""
    name = known.get("size")
    preset = known.get("preset") or "quick"
    check_preset(preset)
    chosen = size.settings_of(name) if name else {"preset": preset, **PRESETS[preset].settings}
    default = Settings(**chosen | _sizes_of(known.get("from_")))
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
    if settings.optimizer == "adamw" and settings.momentum != MOMENTUM:
        raise InputError("applies to --optimizer muon only, got adamw", field="--momentum")
    if settings.from_ is None:
        settings.tokenizer = settings.tokenizer or "bpe"
    else:
        assert settings.preset is not None  # --from does not go with --size
        preset = PRESETS[settings.preset].settings
        for name in ("tokenizer", "init", "zero_out"):
            if getattr(settings, name) != preset.get(name, getattr(Settings, name)):
                raise InputError(
                    "cannot be set with --from, since the checkpoint determines it",
                    field=option(name),
                )
        for name, own in _sizes_of(settings.from_).items():
            if getattr(settings, name) != own:
                raise InputError(
                    f"the checkpoint {settings.from_} has {own}, got {getattr(settings, name)}",
                    field=option(name),
                )
    if settings.max_steps is None and settings.max_minutes is None:
        if settings.preset is None:
            settings.max_steps = size.steps(settings)
        else:
            settings.max_steps = PRESETS[settings.preset].max_steps


def _check_model(settings: Settings) -> None:
    """Raise InputError if no model and tokenizer can have these sizes, before any text is read."""
    if settings.vocab_size is not None:
        from ysnake.text import tokenizer

        tokenizer.check_size(settings.tokenizer or "bpe", settings.vocab_size)
    try:
        model_config(settings, size.vocabulary(settings, None), 0)
    except InputError as error:
        names = "|".join(MODEL_SIZES)
        reason = re.sub(rf"\b({names})\b", lambda found: option(found[0]), error.reason)
        raise InputError(reason, error.field and option(error.field)) from error


def _check_text(settings: Settings, stored: Settings) -> None:
    """Raise InputError if another text or tokenizer is wanted than that of --tokens-from."""
    if settings.from_ is not None:
        raise InputError(
            "give only one of them, since each brings its own tokenizer",
            field="--from, --tokens-from",
        )
    for name in OF_THE_TEXT:
        given, own = getattr(settings, name), getattr(stored, name)
        if not _same(given, own):
            raise InputError(
                f"expected {_shown(own)}, as in the run of --tokens-from, got {_shown(given)}",
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
    if settings.precision == "auto":  # what it came to is stored
        settings.precision = stored.precision
    windows, planned = (s.batch_size * s.accumulate for s in (settings, stored))
    if stored.memory is not None and (settings.memory, windows) == (stored.memory, planned):
        settings.batch_size, settings.accumulate = stored.batch_size, stored.accumulate
        settings.recompute = settings.recompute or stored.recompute
    for f in fields(Settings):
        given, own = getattr(settings, f.name), getattr(stored, f.name)
        if f.name not in FREE_ON_RESUME and not _same(given, own):
            reason = f"cannot change in a resumed run, which has {_shown(own)}; got {_shown(given)}"
            if f.name == "data":
                reason += f"; --from {stored.folder} trains its weights on other text in a new run"
            else:
                reason += "; leave the option out, or start a new run"
            raise InputError(reason, field=option(f.name))


def _same(given: Any, own: Any) -> bool:
    def resolved(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(resolved, value))
        return value.resolve() if isinstance(value, Path) else value

    return resolved(given) == resolved(own)


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
        raise InputError(f"{path}: no such file, so {folder} is not a run")
    values = read_json(path)
    try:
        if not isinstance(values["data"], list):
            raise InputError(
                f"expected a list of paths, got {values['data']!r}"[:300], field="--data"
            )
        values["data"] = tuple(map(Path, values["data"]))
        for name in ("from_", "tokens_from"):
            values[name] = Path(values[name]) if values.get(name) else None
        settings = Settings(**OF_OLD_RUNS | values | {"run": folder} | OF_A_LAUNCH)
        check(settings)
    except (TypeError, LookupError, InputError) as error:
        raise InputError(f"{path}: not the settings of a run ({error})") from error
    return settings
