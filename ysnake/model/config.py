"""The sizes of a model, and the presets.

Sizes have the names of the paper (`d_model`, `d_state`, ...). `ysnake.checkpoints.config_json`
translates them into the names that other projects use.
"""

import json
import math
from dataclasses import dataclass, field, fields
from typing import Any

from ysnake.shared.errors import InputError

IGNORED = -100  # a target that the loss ignores
VOCAB_MULTIPLE = 64  # vocabulary rows are padded to a multiple of this
LARGEST_MODEL = 1 << 48  # weights; a petabyte of them
MOST_LAYERS = 10_000


@dataclass(frozen=True)
class ModelConfig:
    """Everything that decides the shapes and the arithmetic of a model.

    Raises:
        InputError: a value is impossible. `InputError.field` names it.
    """

    vocab_size: int  # rows of the embedding, padding included
    d_model: int
    n_layers: int
    d_state: int = 128
    head_dim: int = 64
    expand: int = 2
    n_groups: int = 1
    conv_width: int = 4
    chunk_size: int | None = None  # of the scan; changes its speed, not its result. None: automatic
    output_size: int | None = None  # None: no factorised head
    tied: bool = True
    norm_eps: float = 1e-5
    bias: bool = False
    conv_bias: bool = True
    residual_in_fp32: bool = True
    dt_min: float = 0.001
    dt_max: float = 0.1
    dt_floor: float = 1e-4
    dt_limit: tuple[float, float] = (0.0, math.inf)
    bos_id: int | None = 0
    eos_id: int | None = 0
    pad_id: int | None = 0
    more_eos_ids: tuple[int, ...] = ()  # further tokens that end a generated text

    def __post_init__(self) -> None:
        for f in fields(self):
            _check_kind(f.name, getattr(self, f.name), f.type)
            if f.type is float:  # a file may hold an integer that is too large for torch
                object.__setattr__(self, f.name, _as_float(f.name, getattr(self, f.name)))
        for name in ("vocab_size", "d_model", "n_layers", "d_state", "head_dim", "expand"):
            _at_least(name, getattr(self, name), 1)
        _at_least("n_groups", self.n_groups, 1)
        _at_least("conv_width", self.conv_width, 2)
        for name in ("chunk_size", "output_size"):
            if getattr(self, name) is not None:
                _at_least(name, getattr(self, name), 1)
        if self.d_inner % self.head_dim:
            raise InputError(
                f"expected a divisor of expand * d_model = {self.d_inner}, got {self.head_dim}",
                field="head_dim",
            )
        if self.n_heads % self.n_groups:
            raise InputError(
                f"expected a divisor of the {self.n_heads} heads, got {self.n_groups}",
                field="n_groups",
            )
        if self.output_size is not None and self.tied:
            raise InputError(
                "a factorised head cannot be tied to the embedding", field="output_size"
            )
        if not 0 < self.dt_min <= self.dt_max < math.inf:
            given = f"{self.dt_min:g}, {self.dt_max:g}"
            raise InputError(f"expected a range, got {given}", field="dt_min, dt_max")
        if not 0 <= self.dt_limit[0] <= self.dt_limit[1]:
            raise InputError(f"expected 0 <= low <= high, got {self.dt_limit}", field="dt_limit")
        if not self.norm_eps >= 0:
            raise InputError(f"expected at least 0, got {self.norm_eps}", field="norm_eps")
        if self.n_layers > MOST_LAYERS:
            raise InputError(
                f"expected at most {MOST_LAYERS}, got {self.n_layers}", field="n_layers"
            )
        if self.n_in_matrices > LARGEST_MODEL:
            raise InputError("these sizes ask for a model of more than a petabyte")
        for name in ("bos_id", "eos_id"):
            if (token := getattr(self, name)) is not None and token >= self.vocab_size:
                raise InputError(f"expected below vocab_size, got {token}", field=name)
        if self.bos_id is not None and self.bos_id < 0:
            raise InputError(
                f"expected a token of the model or null, got {self.bos_id}", field="bos_id"
            )

    @property
    def d_inner(self) -> int:
        return self.expand * self.d_model

    @property
    def n_heads(self) -> int:
        return self.d_inner // self.head_dim

    @property
    def d_conv(self) -> int:
        """Channels of the convolution: x, B and C."""
        return self.d_inner + 2 * self.n_groups * self.d_state

    @property
    def end_ids(self) -> frozenset[int]:
        """The tokens that end a generated text."""
        return frozenset(
            self.more_eos_ids if self.eos_id is None else (self.eos_id, *self.more_eos_ids)
        )

    def document_tokens(self) -> tuple[int, int]:
        """The tokens that begin and end a document.

        Raises:
            InputError: the model has no such tokens.
        """
        tokens = []
        for name, token in (("bos_id", self.bos_id), ("eos_id", self.eos_id)):
            if token is None or token < 0:
                raise InputError(f"expected a token of the model, got {token}", field=name)
            tokens.append(token)
        return tokens[0], tokens[1]

    @property
    def n_in_matrices(self) -> int:
        """Nearly all parameters: those of the embedding, the projections and the convolutions."""
        layer = self.d_model * (2 * self.d_inner + self.d_conv + self.n_heads)
        layer += self.d_conv * self.conv_width
        return self.vocab_size * self.d_model + self.n_layers * layer


def _check_kind(name: str, value: Any, kind: Any) -> None:
    """Raise InputError unless a value from a file has the type of its field."""
    if name == "dt_limit":
        pair = isinstance(value, tuple) and len(value) == 2
        if not pair or not all(isinstance(v, int | float) for v in value):
            raise InputError(f"expected two numbers, got {str(value)[:40]}", field=name)
        return
    if name == "more_eos_ids":
        if not isinstance(value, tuple) or not all(type(v) is int for v in value):
            raise InputError(f"expected whole numbers, got {str(value)[:40]}", field="eos_id")
        return
    wanted = int | float if kind is float else kind
    if not isinstance(value, wanted) or (isinstance(value, bool) and kind is not bool):
        names = {int: "a whole number", float: "a number", bool: "true or false"}
        said = names.get(kind, "a whole number or null")
        raise InputError(f"expected {said}, got {json.dumps(value)[:40]}", field=name)


def _as_float(name: str, value: float) -> float:
    try:
        return float(value)
    except OverflowError:
        raise InputError("expected a number below 1e308, got more", field=name) from None


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise InputError(f"expected at least {least}, got {value}", field=name)


def padded_vocab(size: int) -> int:
    """Rows of the embedding for a tokenizer of this size: rounded up to VOCAB_MULTIPLE."""
    return -(-size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


@dataclass(frozen=True)
class Preset:
    """What `--preset` sets: the largest vocabulary, the length of training, and other settings."""

    about: str
    max_vocab: int
    max_steps: int
    settings: dict[str, Any] = field(default_factory=dict)


BY_MUON = {"optimizer": "muon", "lr": 3e-3}  # among the best rates at 24M and 71M parameters
PRESETS = {
    "quick": Preset(
        "about 3M parameters; learns a part of the shipped corpus by heart in minutes on a CPU",
        max_vocab=4096,
        max_steps=350,
        settings={
            "d_model": 256,
            "n_layers": 4,
            "d_state": 64,
            "max_documents": 128,
            "seq_len": 128,
            "batch_size": 8,
            "optimizer": "muon",
            "lr": 6e-3,
            "schedule": "linear",
            "warmup_steps": 50,
            "eval_every": 50,
            "stop_at_loss": 0.15,
        },
    ),
    "ys-24m": Preset(
        "24M parameters at a vocabulary of 13,183",
        max_vocab=13_183,
        max_steps=20_000,
        settings={"d_model": 512, "n_layers": 10, **BY_MUON},
    ),
    "ys-60m": Preset(
        "60M parameters at a vocabulary of 13,183",
        max_vocab=13_183,
        max_steps=20_000,
        settings={"d_model": 768, "n_layers": 13, **BY_MUON},
    ),
    "ys-71m": Preset(
        "71M parameters at a vocabulary of 28,590",
        max_vocab=28_590,
        max_steps=20_000,
        settings={"d_model": 768, "n_layers": 13, **BY_MUON},
    ),
}


def model_config(settings: Any, vocab_size: int, eot_id: int) -> ModelConfig:
    """The configuration of a new model, from training settings and its tokenizer.

    Args:
        settings: the settings of training.
        vocab_size: entries of the tokenizer.
        eot_id: the token that begins, ends and pads documents.
    """
    shared = {f.name for f in fields(ModelConfig)} & set(vars(settings))
    sizes = {name: getattr(settings, name) for name in shared - {"vocab_size"}}
    return ModelConfig(
        vocab_size=padded_vocab(vocab_size),
        tied=settings.output_size is None,
        bos_id=eot_id,
        eos_id=eot_id,
        pad_id=eot_id,
        **sizes,
    )
