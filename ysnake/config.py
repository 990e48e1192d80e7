"""The sizes of a model, their names in the config.json of others, and the presets.

Inside ysnake sizes have the paper's names (`d_model`, `d_state`, ...) and weights have Hugging
Face's. This file alone also knows Hugging Face's names of sizes, and those of state-spaces.
"""

import json
import math
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

IGNORED = -100  # a target that does not count
VOCAB_MULTIPLE = 64  # vocabulary rows are padded to a multiple of this
LARGEST_JSON = 1 << 26  # bytes
LARGEST_MODEL = 1 << 48  # weights; a petabyte of them
MOST_LAYERS = 10_000


class InputError(ValueError):
    """The user gave something that cannot work; the message is one line and names it."""


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        InputError: it is missing, cannot be read, or is not JSON; it is named.
    """
    if not path.is_file():  # a pipe, for instance, might never end
        raise InputError(f"{path}: no such file")
    if path.stat().st_size > LARGEST_JSON:
        raise InputError(f"{path}: expected at most {LARGEST_JSON:,} bytes")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON ({error})") from error


@dataclass(frozen=True)
class ModelConfig:
    """Everything that decides the shapes and the arithmetic of a model.

    Raises:
        InputError: a size that cannot be, named.
    """

    vocab_size: int  # rows of the embedding, padding included
    d_model: int
    n_layers: int
    d_state: int = 128
    head_dim: int = 64
    expand: int = 2
    n_groups: int = 1
    conv_width: int = 4
    chunk_size: int | None = None  # None: the operators choose
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

    def __post_init__(self) -> None:
        for f in fields(self):
            _check_kind(f.name, getattr(self, f.name), f.type)
            if f.type is float:  # a file may hold a whole number, too large for torch
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
                f"head_dim: expected a divisor of expand * d_model = {self.d_inner}, "
                f"got {self.head_dim}"
            )
        if self.n_heads % self.n_groups:
            raise InputError(
                f"n_groups: expected a divisor of the {self.n_heads} heads, got {self.n_groups}"
            )
        if self.output_size is not None and self.tied:
            raise InputError("output_size: a factorised head cannot be tied to the embedding")
        if not 0 < self.dt_min <= self.dt_max < math.inf:
            given = f"{self.dt_min:g}, {self.dt_max:g}"
            raise InputError(f"dt_min, dt_max: expected a range, got {given}")
        if not 0 <= self.dt_limit[0] <= self.dt_limit[1]:
            raise InputError(f"dt_limit: expected 0 <= low <= high, got {self.dt_limit}")
        if not self.norm_eps >= 0:
            raise InputError(f"norm_eps: expected at least 0, got {self.norm_eps}")
        if self.n_layers > MOST_LAYERS:
            raise InputError(f"n_layers: expected at most {MOST_LAYERS}, got {self.n_layers}")
        if self.n_in_matrices > LARGEST_MODEL:
            raise InputError("these sizes ask for a model of more than a petabyte")
        for name in ("bos_id", "eos_id"):
            if (token := getattr(self, name)) is not None and token >= self.vocab_size:
                raise InputError(f"{name}: expected below vocab_size, got {token}")
        if self.bos_id is not None and self.bos_id < 0:
            raise InputError(f"bos_id: expected a token of the model or null, got {self.bos_id}")

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

    def check_frame(self) -> None:
        """Raise InputError unless there are tokens that begin and end a document."""
        for name in ("bos_id", "eos_id"):
            if getattr(self, name) is None or getattr(self, name) < 0:
                raise InputError(
                    f"{name}: expected a token of the model, got {getattr(self, name)}"
                )

    @property
    def n_in_matrices(self) -> int:
        """Parameters of the embedding, the projections and the convolutions: nearly all."""
        layer = self.d_model * (2 * self.d_inner + self.d_conv + self.n_heads)
        layer += self.d_conv * self.conv_width
        return self.vocab_size * self.d_model + self.n_layers * layer


def _check_kind(name: str, value: Any, kind: Any) -> None:
    """Raise InputError unless a value from a file is of the type that the field has."""
    if name == "dt_limit":
        pair = isinstance(value, tuple) and len(value) == 2
        if not pair or not all(isinstance(v, int | float) for v in value):
            raise InputError(f"{name}: expected two numbers, got {str(value)[:40]}")
        return
    wanted = int | float if kind is float else kind
    if not isinstance(value, wanted) or (isinstance(value, bool) and kind is not bool):
        said = {int: "a whole number", float: "a number", bool: "true or false"}
        said = said.get(kind, "a whole number or null")
        raise InputError(f"{name}: expected {said}, got {json.dumps(value)[:40]}")


def _as_float(name: str, value: float) -> float:
    try:
        return float(value)
    except OverflowError:
        raise InputError(f"{name}: expected a number below 1e308, got more") from None


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise InputError(f"{name}: expected at least {least}, got {value}")


def padded_vocab(size: int) -> int:
    """Rows of the embedding for a tokenizer of this size."""
    return -(-size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


_HUGGING_FACE_NAMES = {
    "vocab_size": "vocab_size",
    "d_model": "hidden_size",
    "n_layers": "num_hidden_layers",
    "d_state": "state_size",
    "head_dim": "head_dim",
    "expand": "expand",
    "n_groups": "n_groups",
    "conv_width": "conv_kernel",
    "tied": "tie_word_embeddings",
    "norm_eps": "layer_norm_epsilon",
    "bias": "use_bias",
    "conv_bias": "use_conv_bias",
    "residual_in_fp32": "residual_in_fp32",
    "dt_min": "time_step_min",
    "dt_max": "time_step_max",
    "dt_floor": "time_step_floor",
    "bos_id": "bos_token_id",
    "eos_id": "eos_token_id",
    "pad_id": "pad_token_id",
}
# What Hugging Face assumes where a config.json leaves a field out and ours differs.
_HUGGING_FACE_DEFAULTS = {
    "n_groups": 8,
    "tie_word_embeddings": False,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
}
_SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "state_size", "head_dim")


def to_hugging_face(config: ModelConfig) -> dict[str, Any]:
    """The content of config.json, every field of Mamba2Config written out.

    A factorised head is saved as its product, so it is an ordinary untied head there.
    """
    out: dict[str, Any] = {"architectures": ["Mamba2ForCausalLM"], "model_type": "mamba2"}
    out |= {theirs: getattr(config, ours) for ours, theirs in _HUGGING_FACE_NAMES.items()}
    out |= {
        "num_heads": config.n_heads,
        "chunk_size": config.chunk_size or 256,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "rescale_prenorm_residual": False,  # it would rescale again what is loaded
        "time_step_rank": math.ceil(config.d_model / 16),
        "use_cache": True,
        "dtype": "float32",
    }
    if not math.isinf(config.dt_limit[1]):
        out["time_step_limit"] = list(config.dt_limit)
    return out


def from_json(content: Any) -> ModelConfig:
    """The model that the content of a config.json describes, Hugging Face's or state-spaces'.

    Raises:
        InputError: not a Mamba-2 configuration, or one that this model cannot be.
    """
    if not isinstance(content, dict):
        raise InputError(f"expected an object, got {type(content).__name__}")
    read = from_state_spaces if "ssm_cfg" in content else from_hugging_face
    try:
        return read(content)
    except InputError:
        raise
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        raise InputError(f"a value of a wrong kind ({error})") from error


def from_hugging_face(content: dict[str, Any]) -> ModelConfig:
    """The model that a config.json describes; its chunk size is left to the operators.

    Raises:
        InputError: not a Mamba-2 configuration, or one that this model cannot be.
    """
    if content.get("model_type") != "mamba2":
        raise InputError(f"expected model_type mamba2, got {content.get('model_type')}")
    missing = [name for name in _SIZES if name not in content]
    if missing:
        raise InputError(f"{', '.join(missing)} missing")
    if content.get("hidden_act", "silu") not in ("silu", "swish"):
        raise InputError(f"hidden_act {content['hidden_act']} is not supported")
    content = _HUGGING_FACE_DEFAULTS | content
    known = {
        ours: content[theirs] for ours, theirs in _HUGGING_FACE_NAMES.items() if theirs in content
    }
    if isinstance(known["eos_id"], list):
        known["eos_id"] = known["eos_id"][0]
    low, high = content.get("time_step_limit") or (0.0, math.inf)
    if isinstance(high, dict):  # transformers writes infinity as {"__float__": "Infinity"}
        high = high["__float__"]
    config = ModelConfig(**known, dt_limit=(float(low), float(high)))
    if content.get("num_heads", config.n_heads) != config.n_heads:
        raise InputError(
            f"num_heads {content['num_heads']} is not expand * hidden_size / head_dim "
            f"= {config.n_heads}"
        )
    return config


_STATE_SPACES_NAMES = {
    "d_state": "d_state",
    "head_dim": "headdim",
    "expand": "expand",
    "n_groups": "ngroups",
    "conv_width": "d_conv",
    "bias": "bias",
    "conv_bias": "conv_bias",
    "dt_min": "dt_min",
    "dt_max": "dt_max",
    "dt_floor": "dt_init_floor",
    "dt_limit": "dt_limit",
}
# What a state-spaces model is that this one can be: any other value is refused.
_STATE_SPACES_MODEL = {"d_intermediate": 0, "attn_layer_idx": [], "rms_norm": True}
_STATE_SPACES_LAYER = {
    "d_ssm": None,
    "D_has_hdim": False,
    "rmsnorm": True,
    "norm_before_gate": False,
}
# What changes nothing in the weights or the result.
_STATE_SPACES_IGNORED = {"layer", "A_init_range", "conv_init", "chunk_size", "use_mem_eff_path"}


def from_state_spaces(content: dict[str, Any]) -> ModelConfig:
    """The model that a config.json of state-spaces/mamba2-* describes.

    It names no special tokens: they are 0, `<|endoftext|>` in the tokenizer those models share.

    Raises:
        InputError: not a Mamba-2 configuration, or one that this model cannot be.
    """
    layer = content["ssm_cfg"]
    if layer.get("layer") != "Mamba2":
        raise InputError(f"expected layer Mamba2, got {layer.get('layer', 'Mamba1')}")
    missing = [name for name in ("d_model", "n_layer", "vocab_size") if name not in content]
    if missing:
        raise InputError(f"{', '.join(missing)} missing")
    for values, only in ((content, _STATE_SPACES_MODEL), (layer, _STATE_SPACES_LAYER)):
        for name, value in only.items():
            if values.get(name, value) != value:
                raise InputError(f"{name} {values[name]} is not supported")
    known = set(_STATE_SPACES_NAMES.values()) | set(_STATE_SPACES_LAYER) | _STATE_SPACES_IGNORED
    if unknown := sorted(set(layer) - known):
        raise InputError(f"ssm_cfg.{unknown[0]} is not supported")
    sizes = {ours: layer[theirs] for ours, theirs in _STATE_SPACES_NAMES.items() if theirs in layer}
    if "dt_limit" in sizes:
        sizes["dt_limit"] = tuple(sizes["dt_limit"])
    multiple = content.get("pad_vocab_size_multiple", 8)
    return ModelConfig(
        vocab_size=-(-content["vocab_size"] // multiple) * multiple,
        d_model=content["d_model"],
        n_layers=content["n_layer"],
        tied=content.get("tie_embeddings", True),
        residual_in_fp32=content.get("residual_in_fp32", True),
        **sizes,
    )


def weight_name(name: str) -> str:
    """The name that a weight of a Hugging Face or state-spaces checkpoint has in the model."""
    return name.replace("backbone.embedding.", "backbone.embeddings.")


@dataclass(frozen=True)
class Preset:
    """What `--preset` sets: a vocabulary ceiling, a length of training, other settings."""

    about: str
    max_vocab: int
    max_steps: int
    settings: dict[str, Any] = field(default_factory=dict)


PRESETS = {
    "quick": Preset(
        "about 3M parameters; learns a part of the shipped corpus by heart in minutes on a CPU",
        max_vocab=4096,
        max_steps=600,
        settings={
            "d_model": 256,
            "n_layers": 4,
            "d_state": 64,
            "max_documents": 128,
            "seq_len": 128,
            "batch_size": 8,
            "lr": 3e-3,
            "warmup_steps": 50,
            "eval_every": 50,
            "stop_at_loss": 0.15,
        },
    ),
    "ys-24m": Preset(
        "24M parameters at a vocabulary of 13,183",
        max_vocab=13_183,
        max_steps=20_000,
        settings={"d_model": 512, "n_layers": 10},
    ),
    "ys-60m": Preset(
        "60M parameters at a vocabulary of 13,183",
        max_vocab=13_183,
        max_steps=20_000,
        settings={"d_model": 768, "n_layers": 13},
    ),
    "ys-71m": Preset(
        "71M parameters at a vocabulary of 28,590",
        max_vocab=28_590,
        max_steps=20_000,
        settings={"d_model": 768, "n_layers": 13},
    ),
}


def model_config(settings: Any, vocab_size: int, eot_id: int) -> ModelConfig:
    """The model that training settings ask for, with a tokenizer of `vocab_size` entries."""
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
