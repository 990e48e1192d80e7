"""One token through a whole layer: checks, and the choice of implementation."""

import torch
from torch import Tensor

from ysnake_kernels.backend import choose
from ysnake_kernels.checks import check, check_rank
from ysnake_kernels.layer_step import composed
from ysnake_kernels.layer_step.weights import LayerWeights
from ysnake_kernels.mixer_step import check_mixer_step


@torch.no_grad()
def layer_step(h: Tensor, conv_state: Tensor, ssm_state: Tensor, weights: LayerWeights) -> None:
    """h + mixer(norm(h)) for one token of each row. h and both states are updated in place.

    The fused implementation has three kernels: norm and input projection; convolution, recurrence
    and gate; gated norm, output projection and sum. For inference: it has no gradient.

    Args:
        h: (batch, d_model), contiguous, the residual stream, in float32 or the weights' dtype.
        conv_state, ssm_state: as in `mixer_step`, conv_state in in_weight's dtype.
        weights: norm_weight (d_model,) and eps, of the norm before the mixer; in_weight
            (features, d_model) and in_bias (features,) or None, the input projection, where
            features = 2 * d_inner + 2 * groups * N + heads; the mixer's weights as in
            `mixer_step`; out_weight (d_model, d_inner) and out_bias (d_model,) or None, the
            output projection. Both projections have one dtype, in which they are multiplied.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype, device or values.

    Source: arXiv 2405.21060, equation 2 and figure 6.
    """
    check_projections(h, weights)
    name = choose(h)
    with torch.autocast(h.device.type, enabled=False):
        if name == "fused" and not torch.compiler.is_compiling():
            from ysnake_kernels.layer_step import fused  # here, since it needs triton

            if fused.fits(weights):
                projected = torch.empty(
                    (len(h), len(weights.in_weight)), dtype=weights.in_weight.dtype, device=h.device
                )
                check_mixer_step(projected, conv_state, ssm_state, weights.mixer)
                fused.step(h, projected, conv_state, ssm_state, weights)
                return
        composed.step(h, conv_state, ssm_state, weights)


def check_projections(h: Tensor, weights: LayerWeights) -> None:
    """Raise ValueError or TypeError where h, the norm or a projection is wrong."""
    w, sizes = weights, weights.mixer.sizes
    dtype, features = w.in_weight.dtype, sum(sizes.projection)
    check_rank("h", h, "batch, d_model")
    batch, d_model = h.shape
    check("h", h, (batch, d_model), w.in_weight, "in_weight", (dtype, torch.float32))
    if not h.is_contiguous():
        raise ValueError("h: expected a contiguous tensor, got a strided one")
    check("norm_weight", w.norm_weight, (d_model,), h, "h")
    check("in_weight", w.in_weight, (features, d_model), h, "h and the sizes")
    check("out_weight", w.out_weight, (d_model, sizes.d_inner), h, "h and the sizes", (dtype,))
    if w.in_bias is not None:
        check("in_bias", w.in_bias, (features,), h, "in_weight", (dtype,))
    if w.out_bias is not None:
        check("out_bias", w.out_bias, (d_model,), h, "h", (dtype,))
