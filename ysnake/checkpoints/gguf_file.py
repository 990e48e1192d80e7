"""Writing a model as a GGUF file, which llama.cpp, Ollama and programs based on them read.

The file has the content that llama.cpp's own converter would write for the same checkpoint and our
tokenizer.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ysnake.model.config import ModelConfig
from ysnake.shared import files
from ysnake.shared.errors import InputError
from ysnake.shared.shown import escape_controls

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, GGUFWriter
    from tokenizers import Tokenizer
    from torch import Tensor

    from ysnake.model.network import Model

CONTEXT = 2**20  # the format requires a limit; such a model has none


def write_gguf(
    file: Path,
    model: "Model",
    tokenizer: "Tokenizer",
    type: str,
    name: str,
    chat_template: str | None = None,
    end_of_turn: int | None = None,
) -> None:
    """Write the model to `file`, completely or not at all.

    Args:
        file: an existing one is replaced.
        model: its weights are written as float32, or as `type` where they are matrices.
        tokenizer: of the model.
        type: f32, f16, bf16, q8_0 or q4_0.
        name: of the model, for people.
        chat_template: how messages become text, in Jinja's language, if the model has one.
        end_of_turn: the id of the token that ends a reply in a chat, if it is not the eos.

    Raises:
        InputError: llama.cpp does not support the tokenizer or the model, or gguf is not installed.
    """
    try:
        import gguf
    except ImportError as error:
        raise InputError(
            'needs the package gguf: pip install -c constraints.txt -e ".[gguf]"', field="--gguf"
        ) from error

    writer = gguf.GGUFWriter(None, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.MAMBA2])
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(escape_controls(name))
    _add_sizes(writer, model.config)
    _add_tokenizer(writer, model.config, tokenizer)
    if chat_template is not None:
        writer.add_chat_template(chat_template)
    if end_of_turn is not None:
        writer.add_eot_token_id(end_of_turn)
    mostly = "ALL_F32" if type == "f32" else f"MOSTLY_{type.upper()}"
    writer.add_file_type(gguf.LlamaFileType[mostly])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for tensor, weight in _tensors(model):
        kind = _stored_as(tensor, weight.shape[-1], type)
        writer.add_tensor(tensor, gguf.quants.quantize(weight.numpy(), kind), raw_dtype=kind)
    with files.replacing(file) as new:
        try:
            writer.write_header_to_file(new)
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()


def _add_sizes(writer: "GGUFWriter", config: ModelConfig) -> None:
    c = config
    if c.bias:
        raise InputError(
            "llama.cpp has no biases in the projections of this architecture", field="bias"
        )
    if c.dt_limit != ModelConfig.dt_limit:
        raise InputError(
            f"llama.cpp has no limits of the step size, got {c.dt_limit}", field="dt_limit"
        )
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(c.d_model)
    writer.add_feed_forward_length(0)
    writer.add_head_count(0)
    writer.add_block_count(c.n_layers)
    writer.add_ssm_conv_kernel(c.conv_width)
    writer.add_ssm_inner_size(c.d_inner)
    writer.add_ssm_state_size(c.d_state)
    writer.add_ssm_time_step_rank(c.n_heads)
    writer.add_ssm_group_count(c.n_groups)
    writer.add_layer_norm_rms_eps(c.norm_eps)


def _add_tokenizer(writer: "GGUFWriter", config: ModelConfig, tokenizer: "Tokenizer") -> None:
    """Add the tokens, merges and special tokens. The tokenizer must work like GPT-2's."""
    from gguf import TokenType

    content = json.loads(tokenizer.to_str())
    model, split = content["model"], content["pre_tokenizer"] or {}
    gpt2 = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    # NFC changes only text with uncomposed characters
    normalizer = (content["normalizer"] or {}).get("type", "NFC")
    if (
        model["type"] != "BPE"
        or model["ignore_merges"]
        or gpt2.items() - split.items()
        or normalizer != "NFC"
    ):
        raise InputError(
            "llama.cpp does not support the tokenizer of this model; "
            "train a new run with --tokenizer bpe, the default",
            field="--gguf",
        )
    if not model["merges"]:
        raise InputError(
            "llama.cpp takes no tokenizer without merges, and this one has learnt none; "
            "it needs more text, or a larger --vocab-size",
            field="--gguf",
        )
    added = {token["id"]: token for token in content["added_tokens"]}
    by_id = {i: token for token, i in tokenizer.get_vocab(with_added_tokens=True).items()}
    tokens, types = [], []
    for i in range(config.vocab_size):
        tokens.append(by_id.get(i, f"[PAD{i}]"))
        if i not in by_id:
            types.append(TokenType.UNUSED)
        elif i in added:
            special = added[i]["special"]
            types.append(TokenType.CONTROL if special else TokenType.USER_DEFINED)
        else:
            types.append(TokenType.NORMAL)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([" ".join(pair) for pair in model["merges"]])
    for add, token in (
        (writer.add_bos_token_id, config.bos_id),
        (writer.add_eos_token_id, config.eos_id),
        (writer.add_pad_token_id, config.pad_id),
    ):
        if token is not None and 0 <= token < config.vocab_size:
            add(token)
    writer.add_add_bos_token(config.bos_id is not None)
    if padding := [i for i in range(config.vocab_size) if i not in by_id]:
        writer.add_array(
            "tokenizer.ggml.suppress_tokens", padding
        )  # known to llama.cpp as of 2026; older ones ignore it


def _tensors(model: "Model") -> Iterator[tuple[str, "Tensor"]]:
    """Every tensor in float32, with its name and shape in llama.cpp."""
    import gguf

    c = model.config
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MAMBA2, c.n_layers)
    weights = {name: weight.detach().float().cpu() for name, weight in model.state_dict().items()}
    if c.tied:
        del weights["lm_head.weight"]
    if not c.conv_bias:  # llama.cpp requires a bias
        zeros = weights["backbone.norm_f.weight"].new_zeros(c.d_conv)
        weights |= {f"backbone.layers.{i}.mixer.conv1d.bias": zeros for i in range(c.n_layers)}
    for name, weight in weights.items():
        if name.endswith("mixer.A_log"):
            weight = -weight.exp()[:, None]
        elif name.endswith("mixer.D"):
            weight = weight[:, None]
        elif name.endswith("mixer.conv1d.weight"):
            weight = weight[:, 0]
        elif name.endswith("mixer.norm.weight"):
            weight = weight.view(c.n_groups, -1)
        name = name.replace("mixer.dt_bias", "mixer.dt_proj.bias")
        tensor = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert tensor is not None, name
        yield tensor, weight.contiguous()


def _stored_as(tensor: str, columns: int, type: str) -> "GGMLQuantizationType":
    """The type to store: `type` for matrices, or f16 if rows have no whole blocks; else f32."""
    import gguf

    if not tensor.endswith(
        ("token_embd.weight", "output.weight", "ssm_in.weight", "ssm_out.weight")
    ):
        return gguf.GGMLQuantizationType.F32
    kind = gguf.GGMLQuantizationType[type.upper()]
    block, _ = gguf.GGML_QUANT_SIZES[kind]
    return gguf.GGMLQuantizationType.F16 if columns % block else kind
