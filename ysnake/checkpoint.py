"""Checkpoints: a folder that is a Hugging Face Mamba2 checkpoint, written whole or not at all."""

import hashlib
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer

from ysnake import tokenizer as tokenizers
from ysnake.config import (
    VOCAB_MULTIPLE,
    InputError,
    ModelConfig,
    from_json,
    to_hugging_face,
    weight_name,
)
from ysnake.model import FactorisedHead, Model

WEIGHTS = "model.safetensors"
SHARDS = "model.safetensors.index.json"  # of others: the list of several such files
PICKLED = "pytorch_model.bin"  # of others: written by torch.save
STATE = "training_state.pt"
OPTIMIZER = "optimizer"  # of a sharded run: a folder of its own
PROGRESS = "progress.json"
MANIFEST = "manifest.json"  # SHA-256 of every file of the folder


def save(
    folder: Path | str,
    model: Model,
    tokenizer: Tokenizer | None = None,
    training: dict[str, Any] | None = None,
    progress: dict[str, Any] | None = None,
    optimizer: Path | None = None,
) -> None:
    """Write a checkpoint folder; one of that name is replaced once the new one is whole.

    Args:
        folder: its parent must exist.
        model: saved in float32 or its own dtype; a factorised head as its product.
        tokenizer: saved beside it.
        training: what resuming needs, tensors and plain values; read back by `load_training`.
        progress: the same for people: plain values.
        optimizer: a folder that becomes a part of this one.
    """
    folder = Path(folder)
    new, old = (folder.with_name(folder.name + end) for end in (".new", ".old"))
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    _write_json(new / "config.json", to_hugging_face(model.config))
    _write_json(new / "generation_config.json", _generation_config(model.config, tokenizer))
    if tokenizer is not None:
        tokenizers.save(tokenizer, new)
    save_file(_weights(model), new / WEIGHTS, {"format": "pt"})
    if training is not None:
        torch.save(training, new / STATE)
    if progress is not None:
        _write_json(new / PROGRESS, progress)
    if optimizer is not None:
        optimizer.rename(new / OPTIMIZER)
    files = sorted(path for path in new.rglob("*") if path.is_file())
    hashes = {path.relative_to(new).as_posix(): _sha256(path) for path in files}
    _write_json(new / MANIFEST, hashes)
    for path in [*new.rglob("*"), new]:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def find(folder: Path | str) -> Path:
    """The folder itself, or the one set aside when a save was cut short between two renames."""
    folder = Path(folder)
    old = folder.with_name(folder.name + ".old")
    if not folder.exists() and old.exists():
        return old
    if not folder.is_dir():
        raise InputError(f"{folder}: no such checkpoint folder")
    return folder


def resolve(path: Path | str, which: str | None = None) -> Path:
    """The checkpoint folder that `path` means: itself, or one of a run folder's two.

    Of a run it is `which`, "best" or "last"; None is best/ where patience ended it, else last/.
    """
    path = Path(path)
    if (path / "config.json").is_file() or not path.is_dir():
        return find(path)
    if which is None:
        progress = find(path / "last") / PROGRESS
        ended = json.loads(progress.read_text())["ended"] if progress.is_file() else None
        which = "best" if ended == "patience" else "last"
    return find(path / which)


def load(folder: Path | str, device: torch.device | str = "cpu") -> Model:
    """Read a model from a folder of ours, of Hugging Face's Mamba2, or of state-spaces/mamba2-*.

    Weights of 16 bits become float32, exactly: a CPU is slow in anything else, and training needs
    the precision.

    Raises:
        InputError: a file is missing, damaged, or of another shape than config.json says.
    """
    folder = find(folder)
    config = load_config(folder)
    path, weights = _read_weights(folder)
    with torch.device("meta"):
        model = Model(config)
    if config.tied:
        weights["lm_head.weight"] = weights.get("backbone.embeddings.weight")
    expected = model.state_dict()
    for name in sorted(expected.keys() | weights.keys()):
        if weights.get(name) is None:
            raise InputError(f"{path}: {name} is missing")
        if name not in expected:
            raise InputError(f"{path}: {name} does not belong to this model")
        if weights[name].shape != expected[name].shape:
            raise InputError(
                f"{path}: {name} has shape {tuple(weights[name].shape)}, "
                f"config.json asks for {tuple(expected[name].shape)}"
            )
    model.load_state_dict(weights, assign=True)
    if config.tied:
        model.lm_head.weight = model.backbone.embeddings.weight
    return model.requires_grad_(True).to(device)


def _read_weights(folder: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """The file of the weights (of several, the one that lists them), and what they hold."""
    path = next((folder / n for n in (WEIGHTS, SHARDS, PICKLED) if (folder / n).is_file()), None)
    if path is None:
        raise InputError(f"{folder / WEIGHTS}: no such file")
    names = {path.name}
    if path.name == SHARDS:
        try:
            names = {Path(n).name for n in json.loads(path.read_text())["weight_map"].values()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{path}: damaged ({error})") from error
    weights: dict[str, torch.Tensor] = {}
    for file in (folder / name for name in sorted(names)):
        _verify(file)
        weights |= _read_pickled(file) if file.name == PICKLED else _read_safetensors(file)
    return path, {
        weight_name(name): t.float() if t.dtype in (torch.float16, torch.bfloat16) else t
        for name, t in weights.items()
    }


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file") from error
    except SafetensorError as error:
        raise InputError(f"{path}: damaged ({error})") from error


def _read_pickled(path: Path) -> dict[str, torch.Tensor]:
    """What torch.save wrote; nothing in the file can run code."""
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged file
        raise InputError(f"{path}: damaged ({type(error).__name__})") from error
    if not isinstance(weights, dict) or not all(map(torch.is_tensor, weights.values())):
        raise InputError(f"{path}: expected tensors by name")
    return weights


def load_config(folder: Path) -> ModelConfig:
    """The model that the folder's config.json describes."""
    path = folder / "config.json"
    try:
        return from_json(json.loads(path.read_text()))
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not JSON ({error})") from error
    except InputError as error:
        raise InputError(f"{folder}: {error}") from error


def load_tokenizer(folder: Path | str) -> Tokenizer:
    """Read the tokenizer of a checkpoint.

    Raises:
        InputError: it is missing, or not the one that this model was trained with.
    """
    folder = find(folder)
    path = folder / tokenizers.FILE
    if not path.is_file():
        raise InputError(
            f"{path}: no such file; a folder without one needs the tokenizer.json that its model "
            "was trained with (state-spaces/mamba2-*: that of EleutherAI/gpt-neox-20b)"
        )
    tokenizer = tokenizers.load(folder)
    rows = load_config(folder).vocab_size
    size = tokenizer.get_vocab_size()
    _verify(path)
    if not rows - 4 * VOCAB_MULTIPLE < size <= rows:  # others pad to larger multiples than we do
        raise InputError(f"{path}: {size} tokens do not fit a model with {rows} rows")
    return tokenizer


def load_training(folder: Path | str) -> dict[str, Any]:
    """What `save` was given as `training`; nothing in the file can run code."""
    path = find(folder) / STATE
    if not path.is_file():
        raise InputError(f"{path}: no such file, so training cannot be resumed from here")
    for file in (path, *path.parent.glob(f"{OPTIMIZER}/*")):
        _verify(file, path.parent)
    try:
        return torch.load(path, weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged file
        raise InputError(f"{path}: damaged ({type(error).__name__})") from error


def head_factors(model: Model) -> dict[str, torch.Tensor]:
    """The factors of a factorised head, which the saved weights only hold the product of."""
    return model.lm_head.state_dict() if isinstance(model.lm_head, FactorisedHead) else {}


def with_factors(model: Model, factors: dict[str, torch.Tensor], output_size: int) -> Model:
    """The loaded model with its head taken apart again into the factors it is trained as."""
    model.config = replace(model.config, output_size=output_size)
    model.lm_head = FactorisedHead(model.config)
    model.lm_head.load_state_dict(factors)
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
        "eos_token_id": config.eos_id,
        "pad_token_id": config.pad_id,
    }
    if tokenizer is not None and tokenizer.get_vocab_size() < config.vocab_size:
        # rows that only pad the embedding stand for no token
        out["suppress_tokens"] = list(range(tokenizer.get_vocab_size(), config.vocab_size))
    return out


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def _verify(path: Path, folder: Path | None = None) -> None:
    """Raise InputError if the manifest of its folder says that it is not the file saved there."""
    folder = folder or path.parent
    manifest = folder / MANIFEST
    if not manifest.is_file():
        return  # a checkpoint of somebody else's
    try:
        saved = json.loads(manifest.read_text()).get(path.relative_to(folder).as_posix())
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError) as error:
        raise InputError(f"{manifest}: damaged ({error})") from error
    if saved is not None and saved != _sha256(path):
        raise InputError(f"{path}: damaged or exchanged, it is not the file that was saved here")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
