"""The mixer after its input projection: convolution, scan, gated norm, output projection.

For backward it stores its arguments and at most one number for each token. Backward computes the
rest again. On a GPU the mixer is `composed` of the other operators. On a CPU `eager` computes it in
one function, with fewer passes over memory.
"""

import torch
from torch import Tensor

from ysnake_kernels.backend import choose
from ysnake_kernels.checks import FLOATS, check, check_rank, check_skip, check_whole
from ysnake_kernels.conv import check_conv, uses_silu
from ysnake_kernels.linear import products_dtype
from ysnake_kernels.mixer import composed, eager_operator
from ysnake_kernels.mixer.inputs import MixerInputs
from ysnake_kernels.mixer.sizes import MixerSizes
from ysnake_kernels.ssd import check_scan


def mamba_split_conv1d_scan_combined(
    zxbcdt: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    dt_bias: Tensor | None,
    A: Tensor,
    D: Tensor | None,
    chunk_size: int | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    activation: str | None = "silu",
    rmsnorm_weight: Tensor | None = None,
    rmsnorm_eps: float = 1e-6,
    outproj_weight: Tensor | None = None,
    outproj_bias: Tensor | None = None,
    headdim: int | None = None,
    ngroups: int = 1,
    norm_before_gate: bool = True,
    conv_initial_states: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """A Mamba-2 mixer after its input projection.

    Splits zxbcdt along its features into the gate z, the convolution's input and dt. Then come
    `causal_conv1d`, `ssd_scan` with softplus on dt, `rms_norm_gated` if it has a weight (else z
    gates the scan), and a linear layer if it has a weight. For backward it stores its arguments and
    at most one number for each token. Name and arguments are those of mamba_ssm; the last one is
    ours. Differentiable once in every floating-point argument. Under autocast the linear layer runs
    in autocast's dtype. Where torch's settings let a CPU round the factors of float32 products to
    bfloat16, zxbcdt is stored in bfloat16 for backward, all but dt.

    Args:
        zxbcdt: (batch, length, 2 * d_inner + 2 * ngroups * N + heads).
        conv1d_weight: (d_inner + 2 * ngroups * N, width).
        conv1d_bias: (d_inner + 2 * ngroups * N,).
        dt_bias, A: (heads,).
        D: (heads,) or (heads, d_inner / heads).
        chunk_size, initial_states, seq_idx, dt_limit: as in `ssd_scan`.
        return_final_states: also return the scan's states after the last token.
        activation: of the convolution, as in `causal_conv1d`.
        rmsnorm_weight: (d_inner,); the norm runs over ngroups groups of features.
        rmsnorm_eps, norm_before_gate: as in `rms_norm_gated`.
        outproj_weight: (d_model, d_inner), in zxbcdt's dtype unless under autocast.
        outproj_bias: (d_model,).
        headdim: d_inner / heads; checked if given, since it follows from the shapes.
        conv_initial_states: (batch, d_inner + 2 * ngroups * N, width - 1), the tokens before the
            first one, as in `causal_conv1d`. None means zeros.

    Returns:
        (batch, length, d_inner) or, with `outproj_weight`, (batch, length, d_model); with
        `return_final_states` also the states (batch, heads, d_inner / heads, N).

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype, device or values.

    Source: arXiv 2405.21060, section 7.1 and figure 6 (the parallel Mamba block).
    """
    sizes = check_sizes(zxbcdt, conv1d_weight, A, headdim, ngroups)
    tensors = (
        *(zxbcdt, conv_initial_states, initial_states, seq_idx),
        *(conv1d_weight, conv1d_bias, dt_bias, A, D),
        *(rmsnorm_weight, outproj_weight, outproj_bias),
    )
    options = (sizes, uses_silu(activation), chunk_size, dt_limit, rmsnorm_eps, norm_before_gate)
    given = (*tensors, *options, return_final_states, zxbcdt.dtype)
    y, states = check_and_run(MixerInputs(*given))
    return y if states is None else (y, states)


def check_and_run(inputs: MixerInputs) -> tuple[Tensor, Tensor | None]:
    """The output, and the final states if they are wanted, after the checks of all arguments.

    The output projection runs in autocast's dtype, or else in zxbcdt's; `inputs.dtype` does not
    count.
    """
    check_mixer(inputs)
    zxbcdt, (low, high) = inputs.zxbcdt, inputs.dt_limit
    device, dtype = zxbcdt.device.type, products_dtype(zxbcdt)
    limits = (float(low), float(high))
    eps = 0.0 if inputs.norm_weight is None else float(inputs.eps)  # transformers may pass None
    inputs = inputs._replace(dt_limit=limits, eps=eps, dtype=dtype)
    name = choose(zxbcdt)
    with torch.autocast(device, enabled=False):
        y, states = (
            eager_operator.mixer(inputs) if name == "eager" else composed.mixer(name, inputs)
        )
    return y, states if inputs.want_states else None


def check_mixer(inputs: MixerInputs) -> None:
    """Raise ValueError or TypeError where an argument does not match the sizes."""
    zxbcdt, sizes = inputs.zxbcdt, inputs.sizes
    channels, d_inner = sizes.channels, sizes.d_inner
    if inputs.conv_bias is not None:
        check("conv1d_bias", inputs.conv_bias, (channels,), zxbcdt, match="conv1d_weight")
    check_skip(inputs.D, sizes.heads, sizes.head_dim, zxbcdt)
    if inputs.norm_weight is not None:
        check("rmsnorm_weight", inputs.norm_weight, (d_inner,), zxbcdt, match="zxbcdt")
    _check_projection(inputs)
    features = sum(sizes.projection)
    check("zxbcdt", zxbcdt, (*zxbcdt.shape[:2], features), zxbcdt, match="the sizes")
    _, xBC, dt = sizes.split(zxbcdt)  # the convolution's output has the shape of xBC
    convolution = inputs.convolution(xBC)
    check_conv(convolution._replace(initial_states=None))
    if inputs.conv_initial_states is not None:
        shape = (len(zxbcdt), channels, convolution.width - 1)
        check("conv_initial_states", inputs.conv_initial_states, shape, zxbcdt, match="zxbcdt")
    check_scan(inputs.scan(xBC, dt))


def _check_projection(inputs: MixerInputs) -> None:
    zxbcdt, weight, bias = inputs.zxbcdt, inputs.out_weight, inputs.out_bias
    if weight is not None:
        check_rank("outproj_weight", weight, "d_model, d_inner")
        autocast = torch.is_autocast_enabled(zxbcdt.device.type)
        dtypes = FLOATS if autocast else (zxbcdt.dtype,)
        shape = (weight.shape[0], inputs.sizes.d_inner)
        check("outproj_weight", weight, shape, zxbcdt, "zxbcdt", dtypes)
        if bias is not None:
            check("outproj_bias", bias, shape[:1], zxbcdt, "outproj_weight", dtypes)
    elif bias is not None:
        raise ValueError("outproj_bias: expected an outproj_weight with it, got None")


def check_sizes(
    zxbcdt: Tensor, conv1d_weight: Tensor, A: Tensor, headdim: int | None, ngroups: int
) -> MixerSizes:
    """The sizes of a mixer with these arguments. Raises ValueError where they do not fit."""
    check_rank("zxbcdt", zxbcdt, "batch, length, features")
    check_rank("conv1d_weight", conv1d_weight, "channels, width")
    check_rank("A", A, "heads,")
    features, channels, heads = zxbcdt.shape[2], conv1d_weight.shape[0], A.shape[0]
    if heads < 1:
        raise ValueError("A: expected at least 1 head, got 0")
    check_whole("ngroups", ngroups)
    d_inner = features - channels - heads
    if d_inner < 1 or d_inner % heads:
        raise ValueError(
            "zxbcdt: expected channels of conv1d_weight + heads + a multiple of heads = "
            f"{channels} + {heads} + k * {heads} features, got {features}"
        )
    if headdim is not None and headdim * heads != d_inner:
        raise ValueError(f"headdim: expected {d_inner // heads} to match zxbcdt, got {headdim}")
    if ngroups < 1 or heads % ngroups:
        raise ValueError(f"ngroups: expected a divisor of {heads} heads, got {ngroups}")
    if channels <= d_inner or (channels - d_inner) % (2 * ngroups):
        raise ValueError(
            f"conv1d_weight: expected d_inner + 2 * ngroups * N = {d_inner} + {2 * ngroups} * N "
            f"channels to match zxbcdt, got {channels}"
        )
    return MixerSizes(d_inner, heads, ngroups, (channels - d_inner) // (2 * ngroups))
