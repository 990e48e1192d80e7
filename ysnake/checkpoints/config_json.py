"""Translating config.json, of Hugging Face and of state-spaces, to and from our ModelConfig.

Only this file knows the names that these projects give to the sizes of a model.
"""

import math
from typing import Any

from ysnake.model.config import ModelConfig
from ysnake.shared.errors import InputError

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
# Defaults of Hugging Face for missing fields, where they differ from ours.
_HUGGING_FACE_DEFAULTS = {
    "n_groups": 8,
    "tie_word_embeddings": False,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
}
_SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "state_size", "head_dim")


def to_hugging_face(config: ModelConfig) -> dict[str, Any]:
    """The content of config.json, with every field of Mamba2Config.

    A factorised head is saved as its product, so there it is an ordinary untied head.
    """
    out: dict[str, Any] = {"architectures": ["Mamba2ForCausalLM"], "model_type": "mamba2"}
    out |= {theirs: getattr(config, ours) for ours, theirs in _HUGGING_FACE_NAMES.items()}
    out["eos_token_id"] = eos_token_ids(config)
    out |= {
        "num_heads": config.n_heads,
        "chunk_size": config.chunk_size or 256,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "rescale_prenorm_residual": False,  # else loading would rescale the weights again
        "time_step_rank": math.ceil(config.d_model / 16),
        "use_cache": True,
        "dtype": "float32",
    }
    if config.dt_limit != ModelConfig.dt_limit:
        low, high = config.dt_limit
        out["time_step_limit"] = [low, {"__float__": "Infinity"} if math.isinf(high) else high]
    return out


def eos_token_ids(config: ModelConfig) -> int | list[int] | None:
    """What Hugging Face calls `eos_token_id`: one id, or a list of several."""
    if config.eos_id is None or not config.more_eos_ids:
        return config.eos_id
    return [config.eos_id, *config.more_eos_ids]


def from_json(content: Any) -> ModelConfig:
    """The configuration in a config.json of Hugging Face or of state-spaces.

    Raises:
        InputError: not a Mamba-2 configuration, or one that is not supported.
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
    """The configuration in a config.json of Hugging Face. The operators choose the chunk size.

    Raises:
        InputError: not a Mamba-2 configuration, or one that is not supported.
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
        known["eos_id"], *more = known["eos_id"]
        known["more_eos_ids"] = tuple(more)
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
# The values of these fields that are supported. Any other value is refused.
_STATE_SPACES_MODEL = {"d_intermediate": 0, "attn_layer_idx": [], "rms_norm": True}
_STATE_SPACES_LAYER = {
    "d_ssm": None,
    "D_has_hdim": False,
    "rmsnorm": True,
    "norm_before_gate": False,
}
# Fields that change neither the weights nor the result.
_STATE_SPACES_IGNORED = {"layer", "A_init_range", "conv_init", "chunk_size", "use_mem_eff_path"}


def from_state_spaces(content: dict[str, Any]) -> ModelConfig:
    """The configuration in a config.json of state-spaces/mamba2-*.

    It names no special tokens. All are 0, `<|endoftext|>` in the tokenizer that these models share.

    Raises:
        InputError: not a Mamba-2 configuration, or one that is not supported.
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
    """The name in our model of a weight in a Hugging Face or state-spaces checkpoint."""
    return name.replace("backbone.embedding.", "backbone.embeddings.")
