"""Tiny random models of the families in transformers that look for mamba_ssm or causal_conv1d.

`FAMILIES` has their sizes. `VARIANTS` has settings of some families that a drop-in may easily get
wrong. `families_that_ask` also finds new families, of a later transformers.
"""

import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

VOCABULARY = 64
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": None,
    "pad_token_id": 0,
}
ATTENTION = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
MAMBA_2 = {"state_size": 16, "num_heads": 8, "head_dim": 8, "n_groups": 2, "chunk_size": 8}
BAMBA = {
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_state": 16,
    "mamba_n_groups": 2,
    "mamba_chunk_size": 8,
}
DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}
QWEN = {**ATTENTION, **DELTA, "head_dim": 8}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
MOE_QWEN = {**QWEN, **EXPERTS, "shared_expert_intermediate_size": 16}
LATENT = {  # of the latent attention of DeepSeek
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
}

# module of the family -> prefix of the model's class, and its sizes
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "bailing_hybrid": (
        "BailingHybrid",
        {
            **ATTENTION,
            **LATENT,
            "num_key_value_heads": 4,
            "qk_rope_head_dim": 8,
            "num_local_experts": 4,
            "head_dim": 8,
            "layer_types": ["linear_attention", "full_attention"],
            "mlp_layer_types": ["dense", "sparse"],
            "num_mtp_layers": 0,
        },
    ),
    "bamba": ("Bamba", {**ATTENTION, **BAMBA, "attn_layer_indices": [1]}),
    "falcon_h1": ("FalconH1", {**ATTENTION, **BAMBA, "mamba_d_ssm": 64}),
    "falcon_mamba": ("FalconMamba", {"state_size": 8}),
    "glm5_next": (
        "Glm5Next",
        {
            "text_config": {
                **ATTENTION,
                **LATENT,
                "num_key_value_heads": 4,
                "q_lora_rank": 16,
                "n_routed_experts": 4,
                "linear_head_dim": 8,
                "linear_num_heads": 4,
                "layer_types": ["linear_attention", "full_attention"],
                "mlp_layer_types": ["dense", "sparse"],
                "index_head_dim": 8,
                "index_n_heads": 2,
                "index_topk": 64,
                "hc_mult": 2,
            },
            "vision_config": {
                "depth": 1,
                "hidden_size": 16,
                "num_heads": 2,
                "intermediate_size": 16,
                "out_hidden_size": 32,
                "projection_intermediate_size": 16,
            },
        },
    ),
    "granitemoehybrid": (
        "GraniteMoeHybrid",
        {
            **ATTENTION,
            **BAMBA,
            "layer_types": ["mamba", "attention"],
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "shared_intermediate_size": 48,
        },
    ),
    "inkling": (
        "InklingText",
        {
            **ATTENTION,
            "head_dim": 8,
            "swa_num_attention_heads": 4,
            "swa_num_key_value_heads": 2,
            "swa_head_dim": 8,
            "sliding_window_size": 8,
            "d_rel": 4,
            "rel_extent": 16,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_shared_experts": 1,
            "moe_intermediate_size": 16,
        },
    ),
    "inkling2": (
        "Inkling2Text",
        {
            **ATTENTION,
            "unpadded_vocab_size": VOCABULARY,
            "head_dim": 8,
            "swa_num_attention_heads": 4,
            "swa_num_key_value_heads": 2,
            "swa_head_dim": 8,
            "sliding_window_size": 8,
            "d_rel": 4,
            "rel_extent": 16,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
        },
    ),
    "jamba": (
        "Jamba",
        {
            **ATTENTION,
            "mamba_d_state": 8,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "num_experts": 4,
        },
    ),
    "kimi_linear": (
        "KimiLinear",
        {
            **ATTENTION,
            **LATENT,
            "num_key_value_heads": 4,
            "qk_rope_head_dim": 8,
            "num_local_experts": 4,
            "linear_head_dim": 8,
            "linear_num_heads": 4,
            "layer_types": ["linear_attention", "full_attention"],
            "mlp_layer_types": ["dense", "sparse"],
        },
    ),
    "lfm2": ("Lfm2", {**ATTENTION, "layer_types": ["conv", "full_attention"]}),
    "lfm2_moe": (
        "Lfm2Moe",
        {**ATTENTION, **EXPERTS, "num_dense_layers": 1, "layer_types": ["conv", "full_attention"]},
    ),
    "mamba": ("Mamba", {"state_size": 8}),
    "mamba2": ("Mamba2", MAMBA_2),
    "nemotron_h": (
        "NemotronH",
        {
            **ATTENTION,
            "layers_block_type": ["mamba", "attention", "mlp"],
            "num_hidden_layers": 3,
            "head_dim": 8,
            "mamba_num_heads": 8,
            "mamba_head_dim": 8,
            "ssm_state_size": 16,
            "n_groups": 2,
            "chunk_size": 8,
        },
    ),
    "olmo_hybrid": ("OlmoHybrid", {**ATTENTION, **DELTA}),
    "qwen3_5": ("Qwen3_5Text", QWEN),
    "qwen3_5_moe": ("Qwen3_5MoeText", MOE_QWEN),
    "qwen3_next": ("Qwen3Next", MOE_QWEN),
    "qwen4_exp": (
        "Qwen4ExpText",
        {
            **MOE_QWEN,
            "hc_count": 2,
            "hc_lowrank": 8,
            "ngram_vocab_size_base": 64,
            "make_ngram_vocab_size_divisible_by": 8,
            "split_ngram_parts": 1,
            "heads_per_ngram": 2,
            "indexer_n_heads": 2,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 8,
            "indexer_budget": 32,
            "indexer_compress_ratio": 4,
        },
    ),
    "zamba": (
        "Zamba",
        {
            **ATTENTION,
            "num_key_value_heads": 4,
            "mamba_d_state": 8,
            "mamba_dt_rank": 4,
            "layers_block_type": ["mamba", "hybrid"],
        },
    ),
    "zamba2": (
        "Zamba2",
        {
            **ATTENTION,
            "num_key_value_heads": 4,
            "layers_block_type": ["mamba", "hybrid"],
            "n_mamba_heads": 8,
            "mamba_headdim": 8,
            "mamba_d_state": 16,
            "mamba_ngroups": 2,
            "chunk_size": 8,
            "adapter_rank": 4,
            "num_mem_blocks": 1,
        },
    ),
}
# variant -> the family, and sizes that replace those above
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "mamba, gelu": ("mamba", {"hidden_act": "gelu"}),
    "mamba2, gelu": ("mamba2", {"hidden_act": "gelu"}),
    "jamba, gelu": ("jamba", {"hidden_act": "gelu"}),
    "mamba2, width 1": ("mamba2", {"conv_kernel": 1}),
    "mamba2, width 6": ("mamba2", {"conv_kernel": 6}),
    "falcon_h1, norm before gate": (
        "falcon_h1",
        {"mamba_rms_norm": True, "mamba_norm_before_gate": True},
    ),
    "falcon_h1, norm after gate": (
        "falcon_h1",
        {"mamba_rms_norm": True, "mamba_norm_before_gate": False},
    ),
}


class Adapter(nn.Module):
    """A frozen layer plus a low-rank layer that learns, as in LoRA."""

    def __init__(self, layer: nn.Linear):
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.down = nn.Linear(layer.in_features, 2, bias=False)
        self.up = nn.Linear(2, layer.out_features, bias=False)

    @property
    def weight(self) -> Tensor:
        return self.layer.weight

    @property
    def bias(self) -> Tensor | None:
        return self.layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.up(self.down(x))


def random_model(name: str, adapters: bool = False) -> nn.Module:
    """A model that is the same at every call. Its weights make every layer matter.

    Args:
        name: of `FAMILIES` or `VARIANTS`.
        adapters: put an `Adapter` in the place of every output projection.
    """
    import transformers

    family, changes = VARIANTS.get(name, (name, {}))
    prefix, sizes = FAMILIES[family]
    if "text_config" in sizes:
        sizes, kind = (
            {**sizes, "text_config": COMMON | sizes["text_config"]},
            "ConditionalGeneration",
        )
    else:
        sizes, kind = COMMON | sizes | changes, "CausalLM"
    config = getattr(transformers, f"{prefix}Config")(**sizes)
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = getattr(transformers, f"{prefix.removesuffix('Text')}For{kind}")(config)
    if adapters:
        for module in list(model.modules()):
            if isinstance(getattr(module, "out_proj", None), nn.Linear):
                module.out_proj = Adapter(module.out_proj)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.1
            parameter.add_(torch.randn_like(parameter), alpha=scale)
    return model


@cache
def families_that_ask() -> tuple[str, ...]:
    """The families of the installed transformers that look for one of the two packages."""
    folder = Path(find_spec("transformers").submodule_search_locations[0], "models")
    asks = re.compile(r'use_kernel_func_from_hub_with_fallback\([^)]*"(mamba_ssm|causal_conv1d)"')
    files = sorted(folder.glob("*/modeling_*.py"))
    return tuple(file.parent.name for file in files if asks.search(file.read_text("utf-8")))
