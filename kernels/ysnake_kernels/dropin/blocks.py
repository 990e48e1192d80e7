"""The parts of mamba_ssm's models around a mixer: the block, and the states of decoding."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ysnake_kernels.dropin.norms import RMSNorm, layer_norm_fn


@dataclass
class InferenceParams:
    """What decoding passes to every layer: the layers' states, and the number of tokens so far."""

    max_seqlen: int
    max_batch_size: int
    seqlen_offset: int = 0
    batch_size_offset: int = 0
    key_value_memory_dict: dict[Any, Any] = field(default_factory=dict)
    lengths_per_sample: Tensor | None = None

    def reset(self, max_seqlen: int, max_batch_size: int) -> None:
        self.max_seqlen, self.max_batch_size, self.seqlen_offset = max_seqlen, max_batch_size, 0
        if self.lengths_per_sample is not None:
            self.lengths_per_sample.zero_()


class Block(nn.Module):
    """Addition, norm, mixer; then, if there is an MLP, addition, norm, MLP."""

    def __init__(
        self,
        dim: int,
        mixer_cls: Callable[[int], Any],
        mlp_cls: Callable[[int], nn.Module],
        norm_cls: Callable[[int], nn.Module] = nn.LayerNorm,
        fused_add_norm: bool = False,
        residual_in_fp32: bool = False,
    ):
        super().__init__()
        self.residual_in_fp32, self.fused_add_norm = residual_in_fp32, fused_add_norm
        self.norm = norm_cls(dim)
        self.mixer: Any = mixer_cls(dim)
        self.mlp = None
        if mlp_cls is not nn.Identity:
            self.norm2, self.mlp = norm_cls(dim), mlp_cls(dim)

    def forward(
        self,
        hidden_states: Tensor,
        residual: Tensor | None = None,
        inference_params: Any = None,
        **mixer_kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """The output and the residual. The next block adds them."""
        hidden_states, residual = self._add_and_norm(hidden_states, residual, self.norm)
        hidden_states = self.mixer(hidden_states, inference_params=inference_params, **mixer_kwargs)
        if self.mlp is not None:
            hidden_states, residual = self._add_and_norm(hidden_states, residual, self.norm2)
            hidden_states = self.mlp(hidden_states)
        return hidden_states, residual

    def _add_and_norm(self, x: Tensor, residual: Tensor | None, norm: Any) -> tuple[Tensor, Tensor]:
        if self.fused_add_norm:
            options: dict[str, Any] = {"residual": residual, "prenorm": True, "eps": norm.eps}
            options |= {"residual_in_fp32": self.residual_in_fp32}
            is_rms_norm = isinstance(norm, RMSNorm)
            out = layer_norm_fn(x, norm.weight, norm.bias, is_rms_norm=is_rms_norm, **options)
            assert isinstance(out, tuple)
            return out
        total = x if residual is None else x + residual
        y = norm(total.to(norm.weight.dtype))
        return y, total.to(torch.float32) if self.residual_in_fp32 else total

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> Any:
        return self.mixer.allocate_inference_cache(batch_size, max_seqlen, dtype=dtype, **kwargs)
