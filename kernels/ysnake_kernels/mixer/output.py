"""What follows the scan in the eager mixer: gate, norm and output projection, each way.

`finish` and `gradient` take one piece of the scan at a time. The products of the projection, in
`project` and in `begin_backward`, are computed for all tokens at once.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ysnake_kernels.linear import product
from ysnake_kernels.mixer.inputs import MixerInputs
from ysnake_kernels.norm import eager as norm
from ysnake_kernels.numerics import accumulator
from ysnake_kernels.ssd.eager_backward import gate_backward

ParameterGradients = tuple[Tensor | None, Tensor | None, Tensor | None]
"""The gradients of norm_weight, out_weight and out_bias."""


class Output:
    """Gate, norm and projection of some rows of the batch.

    Without a norm's weight z gates the scan. Without a projection's weight the gated or normed
    features are the output. Forward calls `begin_forward`, `finish` for every piece, and
    `project`. Backward calls `begin_backward`, `gradient` for every piece, and
    `parameter_gradients`.
    """

    out: Tensor
    normed: Tensor  # what goes into the projection, [batch length d_inner]
    dout: Tensor | None  # [(batch length) d_model], None without a projection or its gradient
    dz: Tensor
    dnormed: Tensor  # the gradient of `normed`
    dnorm_weight: Tensor | None

    def __init__(self, inputs: MixerInputs, z: Tensor):
        self.inputs, self.z, self.dtype = inputs, z, inputs.dtype
        weight = inputs.out_weight
        self.weight = None if weight is None else weight.to(inputs.dtype)

    def new(self) -> Tensor:
        """Memory for what goes into the projection."""
        return torch.empty(self.z.shape, dtype=self.dtype, device=self.z.device)

    def begin_forward(self, out: Tensor) -> None:
        """Prepare for `finish` and `project`, which write `out`."""
        self.out = out
        self.normed = out if self.weight is None else self.new()

    def finish(self, span: slice, y: Tensor) -> None:
        """Gate and norm of y [batch tokens heads p], a piece of the scan's output."""
        y, z = y.flatten(2), self.z[:, span]
        if self.inputs.norm_weight is None:
            self.normed[:, span] = y * F.silu(z.to(y.dtype))
        else:
            norm.forward(self.inputs.norm(y, z), self.normed[:, span])

    def project(self) -> None:
        """The projection of all tokens, written to out."""
        if self.weight is None:
            return
        rows = self.out.view(-1, self.out.shape[-1])
        rows.copy_(product(self.normed.flatten(0, 1), self.weight))
        if self.inputs.out_bias is not None:
            rows += self.inputs.out_bias.to(self.dtype)

    def begin_backward(self, dout: Tensor | None, dz: Tensor) -> None:
        """Prepare for `gradient`, which writes dz: compute the gradient of `normed`.

        dout is the gradient of `out`. None stands for zeros.
        """
        self.dz, self.dout = dz, None
        if dout is None:
            self.dnormed = torch.zeros_like(self.z)
        elif self.weight is None:
            self.dnormed = dout
        else:
            self.dout = dout.to(self.dtype).flatten(0, 1)
            dnormed = product(self.dout, self.weight.t())
            self.dnormed = dnormed.to(self.z.dtype).view(self.z.shape)
            self.normed = self.new()
        self.dnorm_weight = None
        norm_weight = self.inputs.norm_weight
        if norm_weight is not None:
            acc = accumulator(self.z, norm_weight)
            self.dnorm_weight = torch.zeros_like(norm_weight, dtype=acc)

    def gradient(self, span: slice, y: Callable[[], Tensor]) -> Tensor:
        """The gradient of a piece of the scan's output, which y() computes; writes that of z."""
        piece = y()
        flat, z, grad = piece.flatten(2), self.z[:, span], self.dnormed[:, span]
        dz: Tensor | None
        normed: Tensor | None
        if self.dnorm_weight is None:
            dy, dz, normed = gate_backward(flat, z, grad)
        else:
            inputs = self.inputs.norm(flat, z)
            dy, dz, normed = norm.backward(inputs, grad, self.dnorm_weight, None, want_y=True)
        assert dz is not None
        self.dz[:, span] = dz
        if self.dout is not None and normed is not None:
            self.normed[:, span] = normed
        return dy.view(piece.shape)

    def parameter_gradients(self) -> ParameterGradients:
        """The gradients of the parameters, after `gradient` of every piece."""
        if self.dout is None:
            return self.dnorm_weight, None, None
        dweight = self.dout.t() @ self.normed.flatten(0, 1)
        return self.dnorm_weight, dweight, self.dout.sum(0)


class MergedOutput(Output):
    """The norm merged into the projection.

    With v = y silu(z), (v / rms(v) w) W^T = (v (w W)^T) / rms(v). So v itself goes into the
    projection, and the outputs and the weights are scaled, which are smaller than v. The gradients
    of w and W follow from the gradient of w W, which is one product. 1 / rms(v) is kept for
    backward in `rstd` [batch length 1].
    """

    weight: Tensor
    dout: Tensor

    @staticmethod
    def suits(inputs: MixerInputs) -> bool:
        """Whether one norm over all features follows the gate, all in at least 32 bits."""
        x = inputs.zxbcdt
        return (
            inputs.norm_weight is not None
            and inputs.out_weight is not None
            and inputs.sizes.groups == 1
            and not inputs.norm_before_gate
            and x.dtype == inputs.dtype == accumulator(x)
        )

    def __init__(self, inputs: MixerInputs, z: Tensor, rstd: Tensor):
        super().__init__(inputs, z)
        assert inputs.norm_weight is not None
        self.rstd, self.norm_weight = rstd, inputs.norm_weight
        self.merged = self.weight * self.norm_weight.to(self.dtype)

    def finish(self, span: slice, y: Tensor) -> None:
        v = torch.mul(y.flatten(2), F.silu(self.z[:, span]), out=self.normed[:, span])
        norm.rstd(v, self.inputs.eps, self.rstd[:, span])

    def project(self) -> None:
        rows = product(self.normed.flatten(0, 1), self.merged).view(self.out.shape)
        torch.mul(rows, self.rstd, out=self.out)
        if self.inputs.out_bias is not None:
            self.out += self.inputs.out_bias.to(self.dtype)

    def begin_backward(self, dout: Tensor | None, dz: Tensor) -> None:
        self.dz = dz
        if dout is None:
            dout = self.z.new_zeros(*self.z.shape[:2], len(self.weight))
        self.dout = dout.flatten(0, 1)
        self.scaled = (dout * self.rstd).flatten(0, 1)
        self.dnormed = product(self.scaled, self.merged.t()).view(self.z.shape)
        self.normed = self.new()

    def gradient(self, span: slice, y: Callable[[], Tensor]) -> Tensor:
        piece = y()
        flat, z, dv = piece.flatten(2), self.z[:, span], self.dnormed[:, span]
        gate = F.silu(z)
        v = torch.mul(flat, gate, out=self.normed[:, span])
        # through v / rms(v): remove the part of the gradient along v
        along = torch.linalg.vecdot(dv, v)[..., None].mul_(self.rstd[:, span].square())
        dv.addcmul_(v, along, value=-1 / v.shape[-1])
        dy = gate.mul_(dv)
        torch.ops.aten.silu_backward.grad_input(dv.mul_(flat), z, grad_input=self.dz[:, span])
        return dy.view(piece.shape)

    def parameter_gradients(self) -> ParameterGradients:
        merged = self.scaled.t() @ self.normed.flatten(0, 1)
        dnorm_weight = (merged * self.weight).sum(0)
        return dnorm_weight, merged.mul_(self.norm_weight), self.dout.sum(0)


def output_of(inputs: MixerInputs, z: Tensor, rstd: Tensor | None) -> Output:
    """`MergedOutput` if the caller passes `rstd`, memory for 1 / rms(v); else `Output`."""
    return Output(inputs, z) if rstd is None else MergedOutput(inputs, z, rstd)
