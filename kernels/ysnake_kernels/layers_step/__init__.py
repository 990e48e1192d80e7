"""One token through all layers of a model: checks, and the choice of implementation."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ysnake_kernels.backend import choose
from ysnake_kernels.checks import check, check_rank
from ysnake_kernels.layers_step import composed
from ysnake_kernels.layers_step.inputs import LayersInputs, LayerWeights


@torch.no_grad()
def layers_step(
    h: Tensor,
    states: Sequence[tuple[Tensor, Tensor]],
    layers: Sequence[LayerWeights],
    norm_weight: Tensor,
    eps: float,
) -> Tensor:
    """The last norm's output for one token of each row. All states are updated in place.

    A layer adds mixer(norm(h)) to the residual stream h. With one group, and not in float16, the
    fused implementation takes two kernels for a layer besides its projections: sum and norm;
    convolution, recurrence and gate. For inference: it has no gradient.

    Args:
        h: (batch, d_model), contiguous, in float32 or the projections' dtype. Do not use it after
            the call, which may overwrite it.
        states: conv_state and ssm_state of each layer, as in `mixer_step`. conv_state has the dtype
            of the projections.
        layers: the weights of each layer. norm_weight (d_model,) and eps are those of the norm
            before the mixer. in_weight (features, d_model) and in_bias (features,) or None are the
            input projection, where features = 2 * d_inner + 2 * groups * N + heads. `mixer_step`
            documents the mixer's. out_weight (d_model, d_inner) and out_bias (d_model,) or None
            are the output projection.
        norm_weight: (d_model,), of the norm after the last layer.
        eps: of that norm.

    Returns:
        (batch, d_model) in norm_weight's dtype.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype, device or values.

    Source: arXiv 2405.21060, equation 2 and figure 6.
    """
    if len(states) != len(layers):
        raise ValueError(f"states: expected those of {len(layers)} layers, got {len(states)}")
    check_rank("h", h, "batch, d_model")
    if not h.is_contiguous():
        raise ValueError("h: expected a contiguous tensor, got a strided one")
    check("norm_weight", norm_weight, (h.shape[1],), h, "h")
    for weights in layers:
        check_projections(h, weights)
    name = choose(h)
    inputs = LayersInputs(h, states, layers, norm_weight, eps)
    with torch.autocast(h.device.type, enabled=False):
        if name == "fused" and not torch.compiler.is_compiling():
            from ysnake_kernels.layers_step import fused  # here, since it needs triton

            if fused.fits(inputs):
                return fused.step(inputs)
        return composed.step(inputs)


def check_projections(h: Tensor, weights: LayerWeights) -> None:
    """Raise ValueError or TypeError where a layer's norm or projection does not fit h."""
    w, sizes = weights, weights.mixer.sizes
    dtype, features, d_model = w.in_weight.dtype, sum(sizes.projection), h.shape[1]
    if h.dtype not in (dtype, torch.float32):
        raise TypeError(f"h: expected float32 or in_weight's {dtype}, got {h.dtype}")
    check("norm_weight", w.norm_weight, (d_model,), h, "h")
    check("in_weight", w.in_weight, (features, d_model), h, "h and the sizes")
    check("out_weight", w.out_weight, (d_model, sizes.d_inner), h, "h and the sizes", (dtype,))
    if w.in_bias is not None:
        check("in_bias", w.in_bias, (features,), h, "in_weight", (dtype,))
    if w.out_bias is not None:
        check("out_bias", w.out_bias, (d_model,), h, "h", (dtype,))
