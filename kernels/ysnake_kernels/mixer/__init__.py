"""The whole mixer from its input projection on: convolution, scan, gated norm, output projection.

Of what is computed on the way it keeps at most a number for each token; backward computes the rest
again. On a GPU it is `composed` of the other operators; on a CPU `eager` is one function, with
fewer passes.
"""

from functools import partial

import torch
from torch import Tensor

from ysnake_kernels.backend import choose
from ysnake_kernels.checks import FLOATS, check, check_rank, check_skip, check_whole
from ysnake_kernels.conv import check_conv
from ysnake_kernels.mixer import composed, eager_operator
from ysnake_kernels.mixer.composed import scan_inputs
from ysnake_kernels.ssd import check_scan
from ysnake_kernels.ssd.inputs import ScanInputs


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
    """A Mamba-2 mixer after its input projection, at the memory of that projection.

    Splits zxbcdt along its features into the gate z, the convolution's input, and dt; then
    `causal_conv1d`, `ssd_scan` with softplus on dt, `rms_norm_gated` if it has a weight (else z
    gates the scan), and a linear layer if it has a weight. Saves its arguments for backward, and at
    most a number for each token besides. Name and arguments are mamba_ssm's, but for the last one.
    Differentiable once in every floating-point argument; under autocast the linear layer runs in
    autocast's dtype.

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
        headdim: d_inner / heads, which follows from the shapes; checked if given.
        conv_initial_states: (batch, d_inner + 2 * ngroups * N, width - 1), what the convolution
            starts from, as in `causal_conv1d`; None means zeros.

    Returns:
        (batch, length, d_inner) or, with `outproj_weight`, (batch, length, d_model); with
        `return_final_states` also the states (batch, heads, d_inner / heads, N).

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype, device or values.

    Source: arXiv 2405.21060, section 7.1 and figure 6 (the parallel Mamba block).
    """
    sizes = check_sizes(zxbcdt, conv1d_weight, A, headdim, ngroups)
    d_inner, channels, heads = sizes
    if conv1d_bias is not None:
        check("conv1d_bias", conv1d_bias, (channels,), zxbcdt, match="conv1d_weight")
    check_skip(D, heads, d_inner // heads, zxbcdt)
    if rmsnorm_weight is not None:
        check("rmsnorm_weight", rmsnorm_weight, (d_inner,), zxbcdt, match="zxbcdt")
    if outproj_weight is not None:
        check_rank("outproj_weight", outproj_weight, "d_model, d_inner")
        autocast = torch.is_autocast_enabled(zxbcdt.device.type)
        dtypes = FLOATS if autocast else (zxbcdt.dtype,)
        shape = (outproj_weight.shape[0], d_inner)
        check("outproj_weight", outproj_weight, shape, zxbcdt, "zxbcdt", dtypes)
        if outproj_bias is not None:
            check("outproj_bias", outproj_bias, shape[:1], zxbcdt, "outproj_weight", dtypes)
    elif outproj_bias is not None:
        raise ValueError("outproj_bias: expected an outproj_weight with it, got None")
    xBC = zxbcdt[..., d_inner : -sizes[2]]  # of the shape that the convolution gives it back
    width = check_conv(xBC.transpose(1, 2), conv1d_weight, conv1d_bias, seq_idx, None, activation)
    if conv_initial_states is not None:
        shape = (len(zxbcdt), channels, width - 1)
        check("conv_initial_states", conv_initial_states, shape, zxbcdt, match="zxbcdt")
    x, B, C = scan_inputs(xBC, sizes, ngroups)
    dt = zxbcdt[..., -sizes[2] :]
    check_scan(
        ScanInputs(
            *(x, dt, A, B, C, D),
            dt_bias=dt_bias,
            initial_states=initial_states,
            seq_idx=seq_idx,
            chunk_size=chunk_size,
            dt_limit=dt_limit,
        )
    )
    device = zxbcdt.device.type
    autocast = torch.is_autocast_enabled(device)
    name = choose(zxbcdt)
    mixer = partial(composed.mixer, name)
    if name == "eager":
        mixer, activation = eager_operator.mixer, activation is not None
    with torch.autocast(device, enabled=False):
        y, states = mixer(
            *(zxbcdt, conv1d_weight, conv1d_bias, dt_bias, A, D),
            *(conv_initial_states, initial_states, seq_idx),
            *(rmsnorm_weight, outproj_weight, outproj_bias),
            sizes,
            ngroups,
            activation,
            (chunk_size, True, dt_limit),
            (rmsnorm_eps, d_inner // ngroups, norm_before_gate),
            return_final_states,
            torch.get_autocast_dtype(device) if autocast else zxbcdt.dtype,
        )
    return (y, states) if return_final_states else y


def check_sizes(
    zxbcdt: Tensor, conv1d_weight: Tensor, A: Tensor, headdim: int | None, ngroups: int
) -> list[int]:
    """The sizes of z, of the convolution's input and of dt, after the checks of what gives them."""
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
    return [d_inner, channels, heads]
