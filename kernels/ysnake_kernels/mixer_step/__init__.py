"""The mixer for one token, between its projections: checks, and the choice of implementation."""

import torch
from torch import Tensor

from ysnake_kernels.backend import choose
from ysnake_kernels.checks import check, check_decay, check_limit, check_rank
from ysnake_kernels.mixer_step import composed, eager
from ysnake_kernels.mixer_step.weights import MixerWeights


@torch.no_grad()
def mixer_step(
    zxbcdt: Tensor, conv_state: Tensor, ssm_state: Tensor, weights: MixerWeights
) -> Tensor:
    """One token through convolution, recurrence and gated norm; both states change in place.

    The one-token form of `mamba_split_conv1d_scan_combined` with SiLU and with the gate before the
    norm, without its output projection. For inference: it has no gradient.

    Args:
        zxbcdt: (batch, 2 * d_inner + 2 * groups * N + heads), the new token after the input
            projection.
        conv_state: (batch, channels, width - 1), the tokens before it, oldest first. Memory that
            has all channels of a token side by side is the fast case.
        ssm_state: (batch, heads, P, N), contiguous, in float32 (float64 if zxbcdt is).
        weights: conv_weight (channels, width), conv_bias (channels,) or None, dt_bias, A and D
            (heads,), norm_weight (d_inner,), in which channels = d_inner + 2 * groups * N; the
            sizes; dt_limit and eps as in `mamba_split_conv1d_scan_combined`.

    Returns:
        (batch, d_inner) in zxbcdt's dtype, the input of the output projection.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype, device or values.

    Source: arXiv 2405.21060, equation 2 and figure 6.
    """
    check_mixer_step(zxbcdt, conv_state, ssm_state, weights)
    name = choose(zxbcdt)
    with torch.autocast(zxbcdt.device.type, enabled=False):
        if name == "eager":
            dtype = ssm_state.dtype
            exact = conv_state.to(dtype)  # the same memory where it has this dtype
            prepared = eager.prepare(weights, dtype)
            y = eager.step(zxbcdt.to(dtype), exact, ssm_state, prepared)
            if exact is not conv_state:
                conv_state.copy_(exact)
            return y.to(zxbcdt.dtype)
        return composed.run(name, zxbcdt, conv_state, ssm_state, weights)


def check_mixer_step(
    zxbcdt: Tensor, conv_state: Tensor, ssm_state: Tensor, weights: MixerWeights
) -> None:
    """Raise ValueError or TypeError where an argument of `mixer_step` is wrong."""
    sizes = weights.sizes
    check_rank("zxbcdt", zxbcdt, "batch, features")
    batch = len(zxbcdt)
    check("zxbcdt", zxbcdt, (batch, sum(sizes.projection)), zxbcdt, match="the sizes")
    check_rank("conv_weight", weights.conv_weight, "channels, width")
    width = weights.conv_weight.shape[1]
    if width < 2:
        raise ValueError(f"conv_weight: expected a width of at least 2, got {width}")
    channels, heads = (sizes.channels,), (sizes.heads,)
    check("conv_weight", weights.conv_weight, (*channels, width), zxbcdt, match="the sizes")
    if weights.conv_bias is not None:
        check("conv_bias", weights.conv_bias, channels, zxbcdt, match="the sizes")
    for name, tensor in (("dt_bias", weights.dt_bias), ("A", weights.A), ("D", weights.D)):
        check(name, tensor, heads, zxbcdt, match="the sizes")
    check("norm_weight", weights.norm_weight, (sizes.d_inner,), zxbcdt, match="the sizes")
    check("conv_state", conv_state, (batch, *channels, width - 1), zxbcdt, match="zxbcdt")
    shape = (batch, sizes.heads, sizes.head_dim, sizes.state)
    exact = torch.float64 if zxbcdt.dtype == torch.float64 else torch.float32
    check("ssm_state", ssm_state, shape, zxbcdt, "zxbcdt", (exact,))
    if not ssm_state.is_contiguous():
        raise ValueError("ssm_state: expected a contiguous tensor, got a strided one")
    check_decay(weights.A)
    check_limit(weights.dt_limit)
