"""The norms of mamba_ssm, RMSNorm by our operator and LayerNorm by torch.

Those of `ops.triton.layernorm_gated` have a gate. Those of `ops.triton.layer_norm` first add a
residual.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ysnake_kernels.dropin.functions import rmsnorm_fn
from ysnake_kernels.numerics import accumulator


def layernorm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
    is_rms_norm: bool = False,
) -> Tensor:
    """LayerNorm of each group, with a gate; or with `is_rms_norm`, `rmsnorm_fn`."""
    if is_rms_norm:
        return rmsnorm_fn(x, weight, bias, z, eps, group_size, norm_before_gate)
    acc = accumulator(x, weight, bias, z)
    y, gate = x.to(acc), None if z is None else F.silu(z.to(acc))
    if gate is not None and not norm_before_gate:
        y = y * gate
    groups = y.unflatten(-1, (-1, group_size or x.shape[-1]))
    y = F.layer_norm(groups, groups.shape[-1:], eps=eps).flatten(-2) * weight.to(acc)
    if bias is not None:
        y = y + bias.to(acc)
    if gate is not None and norm_before_gate:
        y = y * gate
    return y.to(x.dtype)


def layer_norm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    is_rms_norm: bool = False,
    return_dropout_mask: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The norm of x + residual, in x's dtype. With `prenorm`, also the sum.

    The sum has the residual's dtype. Without a residual it has x's dtype, or float32 with
    `residual_in_fp32` (float64 if x is).

    Raises:
        NotImplementedError: a second branch, dropout or scaled rows are asked for.
    """
    refused: dict[str, object] = {"x1": x1, "weight1": weight1, "bias1": bias1}
    refused |= {"rowscale": rowscale, "dropout_p": dropout_p or None}
    refused |= {"return_dropout_mask": return_dropout_mask or None}
    for name, value in refused.items():
        if value is not None:
            raise NotImplementedError(f"{name}: not offered by ysnake_kernels.dropin")
    dtype = x.dtype
    if residual is not None:
        dtype, x_exact = residual.dtype, accumulator(x, residual)
        total = x.to(x_exact) + residual.to(x_exact)
    else:
        dtype = torch.float32 if residual_in_fp32 and dtype != torch.float64 else dtype
        total = x
    y = layernorm_fn(total, weight, bias, eps=eps, is_rms_norm=is_rms_norm).to(x.dtype)
    return (y, total.to(dtype)) if prenorm else y


def rms_norm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    return_dropout_mask: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`layer_norm_fn` with RMSNorm."""
    options = (x1, weight1, bias1, eps, dropout_p, rowscale, prenorm, residual_in_fp32, True)
    return layer_norm_fn(x, weight, bias, residual, *options, return_dropout_mask)


class GatedRMSNorm(nn.Module):
    """RMSNorm over groups of features, gated by silu(z) before or after."""

    norm = staticmethod(rmsnorm_fn)
    has_bias = False
    bias: nn.Parameter | None

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        group_size: int | None = None,
        norm_before_gate: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.eps, self.group_size, self.norm_before_gate = eps, group_size, norm_before_gate
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.empty(hidden_size, **made))
        bias = nn.Parameter(torch.empty(hidden_size, **made)) if self.has_bias else None
        self.register_parameter("bias", bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        options = (self.eps, self.group_size, self.norm_before_gate)
        return self.norm(x, self.weight, self.bias, z, *options)


class GatedLayerNorm(GatedRMSNorm):
    """The same with LayerNorm, which has a bias."""

    norm = staticmethod(layernorm_fn)
    has_bias = True


class RMSNorm(nn.Module):
    """RMSNorm of a sum, as `rms_norm_fn`.

    Raises:
        NotImplementedError: dropout.
    """

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        dropout_p: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if dropout_p:
            raise NotImplementedError("dropout_p: not offered by ysnake_kernels.dropin")
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", None)

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        prenorm: bool = False,
        residual_in_fp32: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        options: dict[str, Any] = {"prenorm": prenorm, "residual_in_fp32": residual_in_fp32}
        return rms_norm_fn(x, self.weight, None, residual, eps=self.eps, **options)
