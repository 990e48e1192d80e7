"""A tiny random model of every family in transformers that has Mamba-2 layers.

Run by test_dropin.py in a process of its own, with `install()` before or without: transformers
chooses its operators when a model is imported. Prints what the models gave to a file.
"""

import logging
import sys
import warnings

import torch

SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "tie_word_embeddings": False}
IDS = {"bos_token_id": 0, "eos_token_id": None, "pad_token_id": 0}
ATTENTION = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
MAMBA = {
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_state": 16,
    "mamba_n_groups": 2,
    "mamba_chunk_size": 8,
}
FAMILIES = {
    "Mamba2": {
        "num_heads": 8,
        "head_dim": 8,
        "state_size": 16,
        "n_groups": 2,
        "chunk_size": 8,
    },
    "Bamba": {**ATTENTION, **MAMBA, "attn_layer_indices": [1]},
    "FalconH1": {**ATTENTION, **MAMBA, "mamba_d_ssm": 64},
    "GraniteMoeHybrid": {
        **ATTENTION,
        **MAMBA,
        "layer_types": ["mamba", "attention"],
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "shared_intermediate_size": 48,
    },
    "NemotronH": {
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
    "Zamba2": {
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
}
LENGTHS = (13, 6, 10)  # of the documents in a packed sequence


def random_model(family: str):
    """The same at every call: weights that make the layers matter."""
    import transformers

    config = getattr(transformers, f"{family}Config")(**SIZES | IDS | FAMILIES[family])
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return model


def outputs(family: str) -> dict[str, object]:
    """Logits, greedy tokens with their logits, and gradients."""
    model = random_model(family).eval()
    ids = random_ids()
    with torch.no_grad():
        logits = model(ids).logits
        greedy = model.generate(
            ids[:, :11],
            max_new_tokens=12,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    model.train()
    loss = model(ids, labels=ids, use_cache=False).loss
    loss.backward()
    return {
        "logits": logits,
        "tokens": greedy.sequences,
        "cached logits": torch.stack(greedy.logits),
        "loss": loss.detach(),
        "gradients": gradients(model),
    }


def packed(family: str) -> dict[str, object]:
    """Hidden states and gradients of documents in one sequence, and of each alone."""
    model = random_model(family).base_model
    parts = random_ids()[:1].split(LENGTHS, dim=1)
    numbers = torch.cat([torch.full((1, n), i) for i, n in enumerate(LENGTHS)], 1)
    options = {
        "position_ids": torch.cat([torch.arange(n)[None] for n in LENGTHS], 1),
        "seq_idx": numbers.int(),
    }
    if family == "GraniteMoeHybrid":  # its attention does not tell documents by their positions
        sees = numbers[:, :, None] == numbers[:, None]
        mask = torch.zeros(sees.shape).masked_fill(~sees.tril(), -torch.inf)[:, None]
        options["attention_mask"] = {"full_attention": mask, "linear_attention": None}
    out = {}
    for mode in ("eval", "train"):  # which run different operators
        getattr(model, mode)()
        for name, inputs in {"together": [torch.cat(parts, 1)], "alone": parts}.items():
            more = options if name == "together" else {}
            model.zero_grad()
            hidden = [model(i, use_cache=False, **more).last_hidden_state for i in inputs]
            hidden = torch.cat(hidden, 1)
            weights = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(2))
            (hidden * weights).sum().backward()
            out[name, mode] = hidden.detach(), gradients(model)
    return out


def random_ids() -> torch.Tensor:
    return torch.randint(1, 64, (2, 29), generator=torch.Generator().manual_seed(1))


def gradients(model) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


class Messages(logging.Handler):
    """Keeps what is logged."""

    def __init__(self):
        super().__init__()
        self.kept = []

    def emit(self, record):
        self.kept.append(record.getMessage())


def main(install: bool, file: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    import ysnake_kernels.dropin

    if install:
        ysnake_kernels.dropin.install()
    import transformers

    messages = Messages()
    transformers.logging.get_logger("transformers").addHandler(messages)
    results = {}
    for family in FAMILIES:
        messages.kept.clear()
        transformers.utils.logging.warning_once.cache_clear()
        results[family] = outputs(family)
        if install:
            results[family]["packed"] = packed(family)
        results[family]["messages"] = list(messages.kept)
    if not install:
        try:
            ysnake_kernels.dropin.install()
        except RuntimeError as error:
            results["too late"] = str(error)
    torch.save(results, file)


if __name__ == "__main__":
    main(sys.argv[1] == "install", sys.argv[2])
