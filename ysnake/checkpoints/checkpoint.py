"""Checkpoints: folders in the format of Hugging Face's Mamba2, written completely or not at all.

The checkpoint before stays beside a new one, in case the new one is damaged. A checkpoint that is
read may come from anybody: nothing in it can run code, and the size of its files limits the memory
that it takes.
"""

import errno
import json
import logging
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from tokenizers import Tokenizer

from ysnake.checkpoints.config_json import eos_token_ids, from_json, to_hugging_face, weight_name
from ysnake.checkpoints.weight_files import (
    HEADER,
    Shapes,
    check_tensors,
    list_shards,
    read_pickled,
    read_safetensors,
    read_shapes,
)
from ysnake.model.config import VOCAB_MULTIPLE, ModelConfig
from ysnake.model.network import FactorisedHead, Model
from ysnake.shared import manifest, run_lock
from ysnake.shared.errors import InputError, why
from ysnake.shared.files import move_folder, read_json
from ysnake.shared.shown import escape_controls
from ysnake.text import tokenizer as tokenizers

WEIGHTS = "model.safetensors"
SHARDS = "model.safetensors.index.json"  # a list of several such files, as others write it
PICKLED = "pytorch_model.bin"  # written by torch.save, as others do
STATE = "training_state.pt"
OPTIMIZER = "optimizer"  # a folder, in the checkpoint of a sharded run
PROGRESS = "progress.json"
# errors of a file system on which only files can be synced
NO_FOLDER_SYNC = (errno.EINVAL, errno.EBADF, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
LONGEST_SAVE = 600  # seconds that a save waits for another process to save the same folder

Read = TypeVar("Read")


def save(
    folder: Path | str,
    model: Model,
    tokenizer: Tokenizer | None = None,
    training: dict[str, Any] | None = None,
    progress: dict[str, Any] | None = None,
    optimizer: Path | None = None,
    tokenizer_settings: dict[str, str] | None = None,
) -> None:
    """Write a checkpoint folder, completely or not at all. An existing one becomes `folder`.old.

    Args:
        folder: its parent must exist.
        model: saved in its dtype. A factorised head is saved as its product.
        tokenizer: of the model.
        training: tensors and plain values that resuming needs; `load_training` reads them.
        progress: plain values about the run, for people.
        optimizer: a folder that is moved into this one.
        tokenizer_settings: for tokenizer_config.json, such as a chat template.

    Raises:
        InputError: a file cannot be written. The message names it; the folder is unchanged.
    """
    folder = _named_in_utf8(folder)
    new, old = (folder.with_name(folder.name + end) for end in (".new", ".old"))
    config, generation = to_hugging_face(model.config), _generation_config(model.config, tokenizer)
    config["dtype"] = str(model.backbone.embeddings.weight.dtype).removeprefix("torch.")
    files: dict[str, Callable[[Path], object]] = {
        "config.json": lambda path: write_json(path, config),
        "generation_config.json": lambda path: write_json(path, generation),
        WEIGHTS: lambda path: save_file(_weights(model), path, {"format": "pt"}),
    }
    if tokenizer is not None:
        c = model.config
        ids = {"bos_token": c.bos_id, "eos_token": c.eos_id, "pad_token": c.pad_id}
        size = tokenizer.get_vocab_size()
        known = {k: id for k, id in ids.items() if id is not None and 0 <= id < size}
        named = {name: tokenizer.id_to_token(id) for name, id in known.items()}
        settings = named | (tokenizer_settings or {})
        files[tokenizers.FILE] = lambda path: tokenizers.save(tokenizer, path.parent, **settings)
    if training is not None:
        files[STATE] = lambda path: _write_pickled(path, training)
    if optimizer is not None:
        files[OPTIMIZER] = lambda path: optimizer.rename(path)
    files[manifest.FILE] = lambda path: manifest.write(path.parent)
    if progress is not None:  # after the hashes, so that it may change later
        files[PROGRESS] = lambda path: write_json(path, progress)
    path = new
    busy = f"{folder}: another process is writing this checkpoint"
    try:
        with run_lock.lock(folder.with_name(folder.name + ".lock"), busy, LONGEST_SAVE):
            try:
                shutil.rmtree(new, ignore_errors=True)
                new.mkdir()
                for name, write in files.items():
                    path = new / name
                    write(path)
                sync(new)
                path = folder
                if folder.exists():  # if not, an earlier save was interrupted between the renames
                    move_folder(folder, old)
                move_folder(new, folder)
                sync(folder.parent, contents=False)
            except BaseException:
                shutil.rmtree(new, ignore_errors=True)
                raise
    except (OSError, RuntimeError, SafetensorError) as error:  # of torch and of safetensors, too
        raise InputError(f"{path}: cannot be written ({_reason(error)})") from error


def sync(folder: Path, contents: bool = True) -> None:
    """Wait until a folder and all files in it are on the disk."""
    windows = os.name == "nt"  # can sync only files that are open for writing
    for path in [*(folder.rglob("*") if contents else ()), folder]:
        if windows and path.is_dir():
            continue
        descriptor = os.open(path, os.O_RDWR if windows else os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError as error:  # some shared folders cannot sync a folder
            if not (path.is_dir() and error.errno in NO_FOLDER_SYNC):
                raise
        finally:
            os.close(descriptor)


def _reason(error: BaseException) -> str:
    """Why a file could not be written.

    torch's error has the reason in its cause or context. The error of safetensors has it in its
    text, as an error number.
    """
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    found = re.search(r"\(os error (\d+)\)", str(error))
    if found and os.name != "nt":  # Windows has other numbers than errno
        cause = OSError(int(found[1]), os.strerror(int(found[1])))
    return why(cause) if cause else str(error)


def find(folder: Path | str) -> Path:
    """The folder, or its .old folder if a save was interrupted between its two renames."""
    folder = _named_in_utf8(folder)
    old = folder.with_name(folder.name + ".old")
    if not folder.exists() and old.exists():
        return old
    if not folder.is_dir():
        raise InputError(f"{folder}: no such checkpoint folder; `ysnake runs` lists the runs")
    return folder


def _named_in_utf8(folder: Path | str) -> Path:
    """The folder. Raises InputError if safetensors and tokenizers cannot open such a path."""
    try:
        str(folder).encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{folder}: the name is not UTF-8; rename the folder") from error
    return Path(folder)


def newest_good(folder: Path | str, read: Callable[[Path], Read]) -> tuple[Path, Read]:
    """Read a checkpoint folder, or the checkpoint before it if that is damaged.

    Returns the folder, and what `read` returned for it. If the older one is used, a warning names
    the damage.
    """
    folder = find(folder)
    old = folder.with_name(folder.name + ".old")
    try:
        return folder, read(folder)
    except InputError as error:
        damage = error
    try:
        found = read(old)
    except InputError:
        best = folder.with_name("best")
        if folder.name == "last" and (best / "config.json").is_file():
            damage = InputError(f"{damage}; --checkpoint best reads {best}")
        raise damage from None
    warning = escape_controls(f"warning: {damage}; continues from {old}, the checkpoint before")
    logging.getLogger(__name__).warning("%s", warning)
    return old, found


def name_of(folder: Path) -> str:
    """The name of the model in a checkpoint folder: that of its run, or else of the folder."""
    folder = folder.resolve()
    name = folder.name.removesuffix(".old")
    return folder.parent.name if name in ("best", "last") else name


def put_back(good: Path, folder: Path) -> None:
    """Make the checkpoint `good` the one at `folder`; the one there becomes `folder`.damaged."""
    damaged = folder.with_name(folder.name + ".damaged")
    if folder.exists():
        move_folder(folder, damaged)
    move_folder(good, folder)


def resolve(path: Path | str, which: str | None = None) -> Path:
    """The checkpoint folder for a path to a checkpoint or to a run.

    In a run it is `which`, "best" or "last". None means best/ if --patience ended the run, else
    last/.
    """
    path = Path(path)
    of_a_run = any((path / name).is_dir() for name in ("last", "last.old", "best"))
    if (path / "config.json").is_file() or not of_a_run:
        if which is not None and path.is_dir():
            raise InputError(f"{path}: not a run, so it has no {which}/", field="--checkpoint")
        return find(path)
    if which is None:
        _, ended = newest_good(path / "last", _ended)
        which = "best" if ended == "patience" else "last"
    return find(path / which)


def _ended(folder: Path) -> str | None:
    """How the training of this checkpoint ended, if it has ended and the checkpoint says so."""
    path = folder / PROGRESS
    if not path.is_file():
        return None
    progress = read_json(path)
    if not isinstance(progress, dict):
        raise InputError(f"{path}: damaged (expected an object)")
    return progress.get("ended")


def load_all(
    path: Path | str, which: str | None = None, device: torch.device | str = "cpu"
) -> tuple[Path, Tokenizer, Model]:
    """Load the checkpoint that `resolve` finds, or the one before it if that is damaged."""
    folder, (tokenizer, model) = newest_good(
        resolve(path, which), lambda folder: (load_tokenizer(folder), load(folder, device))
    )
    return folder, tokenizer, model


def load(folder: Path | str, device: torch.device | str = "cpu") -> Model:
    """Load a model from a folder of ysnake, of Hugging Face's Mamba2, or of state-spaces/mamba2-*.

    16-bit weights become float32, without loss: a CPU is slow in 16 bits, and training needs the
    precision.

    Raises:
        InputError: a file is missing or damaged, or a shape does not match config.json.
    """
    folder = find(folder)
    config = load_config(folder)
    weights = _read_weights(folder, config)
    with torch.device("meta"):
        model = Model(config)
    if config.tied:
        weights["lm_head.weight"] = weights["backbone.embeddings.weight"]
    model.load_state_dict(weights, assign=True)
    if config.tied:
        model.lm_head.weight = model.backbone.embeddings.weight
    return model.requires_grad_(True).to(device)


def _read_weights(folder: Path, config: ModelConfig) -> dict[str, torch.Tensor]:
    """The weights by their names in our model, in float32 or float64. Checks that they fit."""
    path = next((folder / n for n in (WEIGHTS, SHARDS, PICKLED) if (folder / n).is_file()), None)
    if path is None:
        raise InputError(f"{folder / WEIGHTS}: no such file")
    if path.name == PICKLED:
        largest = (
            16 * config.n_in_matrices + HEADER
        )  # float64, a tied embedding twice, and a header
        if path.stat().st_size > largest:
            raise InputError(f"{path}: larger than the model that config.json describes")
        weights = check_tensors(path, read_pickled(path))
        shapes = {name: tuple(t.shape) for name, t in weights.items()}
        _check_shapes(path, shapes, config)
    else:
        names = list_shards(path) if path.name == SHARDS else [path.name]
        files = [folder / name for name in names]
        shapes = {name: shape for file in files for name, shape in read_shapes(file).items()}
        _check_shapes(path, shapes, config)
        for file in files:  # after the shapes, which bound its size
            manifest.verify(file)
        weights = {name: t for file in files for name, t in read_safetensors(file).items()}
    for name, weight in weights.items():
        if not weight.is_floating_point() or weight.itemsize == 1:
            raise InputError(f"{path}: {name} has dtype {weight.dtype}, expected floating point")
    return {
        weight_name(name): t.float() if t.dtype in (torch.float16, torch.bfloat16) else t
        for name, t in weights.items()
        if not (config.tied and name == "lm_head.weight")  # the embedding is used instead
    }


def _check_shapes(path: Path, found: Shapes, config: ModelConfig) -> None:
    """Raise InputError unless a model of `config` has weights of these names and shapes."""
    found = {weight_name(name): shape for name, shape in found.items()}
    if config.n_layers > len(found):
        raise InputError(
            f"{path}: holds {len(found)} weights, too few for the {config.n_layers} layers that "
            "config.json asks for"
        )
    expected = _shapes(config)
    if config.tied:
        found = found | {"lm_head.weight": expected["lm_head.weight"]}
    for name in sorted(expected.keys() | found.keys()):
        if name not in found:
            raise InputError(f"{path}: {name} is missing")
        if name not in expected:
            raise InputError(f"{path}: {name} does not belong to this model")
        if found[name] != expected[name]:
            raise InputError(
                f"{path}: {name} has shape {found[name]}, config.json asks for {expected[name]}"
            )


def _shapes(config: ModelConfig) -> Shapes:
    """The names and shapes of the weights of a model, without allocating them."""
    with torch.device("meta"):
        one = Model(replace(config, n_layers=1)).state_dict()
    layer = "backbone.layers.0."
    shapes: Shapes = {}
    for name, weight in one.items():
        each = range(config.n_layers if name.startswith(layer) else 1)
        names = (name.replace(layer, f"backbone.layers.{i}.", 1) for i in each)
        shapes |= dict.fromkeys(names, tuple(weight.shape))
    return shapes


def load_config(folder: Path) -> ModelConfig:
    """The model that the folder's config.json describes."""
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(f"{path}: no such file, so {folder} is neither a checkpoint nor a run")
    content = read_json(path)
    try:
        config = from_json(content)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    manifest.verify(path)
    return config


def load_tokenizer(folder: Path | str) -> Tokenizer:
    """Read the tokenizer of a checkpoint.

    Raises:
        InputError: it is missing, or does not fit the model.
    """
    folder = find(folder)
    rows = load_config(folder).vocab_size
    path = folder / tokenizers.FILE
    if not path.is_file():
        raise InputError(
            f"{path}: no such file; put the tokenizer.json there that the model was trained with "
            "(for state-spaces/mamba2-*: that of EleutherAI/gpt-neox-20b)"
        )
    tokenizer = tokenizers.load(folder)
    manifest.verify(path)
    size = tokenizer.get_vocab_size()
    last = max(tokenizer.get_vocab().values(), default=-1)
    if last >= rows:
        raise InputError(f"{path}: token {last} does not fit a model with {rows} rows")
    if not rows - 4 * VOCAB_MULTIPLE < size <= rows:  # others pad to larger multiples
        raise InputError(f"{path}: {size} tokens do not fit a model with {rows} rows")
    return tokenizer


def load_training(folder: Path | str) -> dict[str, Any]:
    """Read what `save` got as `training`. Nothing in the file can run code."""
    path = find(folder) / STATE
    if not path.is_file():
        raise InputError(f"{path}: no such file, so training cannot be resumed from here")
    for file in path.parent.glob(f"{OPTIMIZER}/*"):
        manifest.verify(file, path.parent)
    return read_pickled(path)


def head_factors(model: Model) -> dict[str, torch.Tensor]:
    """The factors of a factorised head. The saved weights contain only their product."""
    return model.lm_head.state_dict() if isinstance(model.lm_head, FactorisedHead) else {}


def with_factors(model: Model, factors: dict[str, torch.Tensor], output_size: int) -> Model:
    """Replace the head of a loaded model by the two factors that are trained."""
    c = model.config = replace(model.config, output_size=output_size)
    with torch.device("meta"):  # no first weights, which would take random numbers
        model.lm_head = FactorisedHead(c.d_model, output_size, c.vocab_size)
    model.lm_head.load_state_dict(factors, assign=True)
    return model


def _weights(model: Model) -> dict[str, torch.Tensor]:
    weights = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    if isinstance(model.lm_head, FactorisedHead):
        weights["lm_head.weight"] = weights.pop("lm_head.up.weight") @ weights.pop(
            "lm_head.down.weight"
        )
    elif model.config.tied:
        del weights["lm_head.weight"]
    return weights


def _generation_config(config: ModelConfig, tokenizer: Tokenizer | None) -> dict[str, Any]:
    out: dict[str, Any] = {
        "bos_token_id": config.bos_id,
        "eos_token_id": eos_token_ids(config),
        "pad_token_id": config.pad_id,
    }
    if tokenizer is not None and tokenizer.get_vocab_size() < config.vocab_size:
        # rows that only pad the embedding are no tokens
        out["suppress_tokens"] = list(range(tokenizer.get_vocab_size(), config.vocab_size))
    return out


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a file of a checkpoint that people can read."""
    path.write_text(json.dumps(content, indent=2) + "\n")


def _write_pickled(path: Path, content: dict[str, Any]) -> None:
    with path.open("wb") as file:  # opened here, so that an OSError says why it fails
        torch.save(content, file)
