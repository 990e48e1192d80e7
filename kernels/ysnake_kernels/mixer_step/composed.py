"""The mixer for one token, made of the other operators by the implementation that was chosen."""

from torch import Tensor

from ysnake_kernels import conv, norm, step
from ysnake_kernels.mixer_step.weights import MixerWeights
from ysnake_kernels.norm.inputs import NormInputs
from ysnake_kernels.step.inputs import StepInputs


def run(
    name: str, zxbcdt: Tensor, conv_state: Tensor, ssm_state: Tensor, weights: MixerWeights
) -> Tensor:
    """`mixer_step` of checked arguments, by the implementation `name`."""
    sizes, w = weights.sizes, weights
    z, xBC, dt = sizes.split(zxbcdt)
    convolved = conv.run_step(name, xBC, conv_state, w.conv_weight, w.conv_bias, True, None)
    x, B, C = sizes.split_channels(convolved)
    tensors = (ssm_state, x, dt, w.A, B, C, w.D, None, w.dt_bias, None)
    y = step.run(name, StepInputs(*tensors, True, w.dt_limit)).flatten(1)
    group_size = sizes.d_inner // sizes.groups
    inputs = NormInputs(y, w.norm_weight, None, z, w.eps, group_size, False)
    return norm.run(name, inputs, y.dtype)
