"""The mixer made of the other operators, by whichever implementation was chosen for them.

What is computed on the way is not kept: torch's checkpoint computes it again in backward.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ysnake_kernels.backend import backend
from ysnake_kernels.conv import causal_conv1d
from ysnake_kernels.norm import rms_norm_gated
from ysnake_kernels.ssd import ssd_scan


def mixer(
    name: str,
    zxbcdt: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    dt_bias: Tensor | None,
    A: Tensor,
    D: Tensor | None,
    conv_states: Tensor | None,
    initial_states: Tensor | None,
    seq_idx: Tensor | None,
    norm_weight: Tensor | None,
    out_weight: Tensor | None,
    out_bias: Tensor | None,
    sizes: list[int],
    ngroups: int,
    activation: str | None,
    scan_options: tuple[int | None, bool, tuple[float, float]],
    norm_options: tuple[float, int, bool],
    return_states: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Arguments as `mamba_split_conv1d_scan_combined` has checked them, by implementation `name`.

    `conv_states` are its conv_initial_states, `sizes` those of z, of the convolution's input and of
    dt; `scan_options` are chunk_size, dt_softplus and dt_limit, `norm_options` eps, group_size and
    norm_before_gate; `dtype` is that of the output projection.
    """
    chunk_size, dt_softplus, dt_limit = scan_options
    if name == "fused" and norm_weight is not None and not torch.compiler.is_compiling():
        from ysnake_kernels.mixer import fused

        fused.check_sizes(sizes, ngroups, conv_weight, norm_options[1])
        projection = (None if t is None else t.to(dtype) for t in (out_weight, out_bias))
        return fused.Mixer.apply(
            *(zxbcdt, conv_weight, conv_bias, dt_bias, A, D, conv_states, initial_states, seq_idx),
            *(norm_weight, *projection, sizes, ngroups, activation),
            (dt_softplus, *map(float, dt_limit)),
            norm_options,
        )

    def compute(
        zxbcdt, weight, bias, dt_bias, A, D, edge, states, seq_idx, norm, projection, shift
    ):
        z, xBC, dt = zxbcdt.split(sizes, dim=-1)
        xBC = xBC.transpose(1, 2)
        mixed = causal_conv1d(xBC, weight, bias, seq_idx, edge, activation=activation)
        x, B, C = scan_inputs(mixed.transpose(1, 2), sizes, ngroups)
        y, states = ssd_scan(
            *(x, dt, A, B, C, chunk_size),
            D=D,
            z=z.unflatten(2, (sizes[2], -1)) if norm is None else None,
            dt_bias=dt_bias,
            initial_states=states,
            seq_idx=seq_idx,
            dt_softplus=dt_softplus,
            dt_limit=dt_limit,
            return_final_states=True,
        )
        y = y.flatten(2)
        if norm is not None:
            y = rms_norm_gated(y, norm, None, z, *norm_options)
        if projection is not None:
            weights = (None if t is None else t.to(dtype) for t in (projection, shift))
            y = F.linear(y.to(dtype), *weights)
        return y, states

    def as_chosen(*tensors):
        with backend(name):  # backward may run in a thread that does not know of an override
            return compute(*tensors)

    return checkpoint(
        compute if torch.compiler.is_compiling() else as_chosen,
        *(zxbcdt, conv_weight, conv_bias, dt_bias, A, D, conv_states, initial_states, seq_idx),
        *(norm_weight, out_weight, out_bias),
        use_reentrant=False,
        preserve_rng_state=False,
    )


def scan_inputs(mixed: Tensor, sizes: list[int], ngroups: int) -> tuple[Tensor, ...]:
    """x [batch length heads P], B and C [batch length groups N] of the convolution's output."""
    d_inner, channels, heads = sizes
    n = (channels - d_inner) // 2
    x, B, C = mixed.split([d_inner, n, n], dim=-1)
    return x.unflatten(2, (heads, -1)), *(t.unflatten(2, (ngroups, -1)) for t in (B, C))
