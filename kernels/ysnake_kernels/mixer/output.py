"""What follows the scan in the eager mixer: gate, norm and output projection, each way.

They are taken a piece of the scan at a time, `finish` and `gradient`; only the products of the
projection, `project` and those of backward, are taken for all tokens at once.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ysnake_kernels.linear import product
from ysnake_kernels.norm import eager as norm
from ysnake_kernels.numerics import accumulator
from ysnake_kernels.ssd.eager import gate_backward


class Output:
    """Of some rows of the batch; the parameters are the norm's weight, the projection's and bias.

    Without a norm's weight z gates the scan; without a projection's that is the output.
    """

    def __init__(self, z, parameters, norm_options, dtype):
        self.z, self.norm_options, self.dtype = z, norm_options, dtype
        self.norm_weight, self.weight, self.bias = parameters
        self.projects = self.weight is not None
        self.normed = None  # what goes into the projection
        if self.projects:
            self.weight = self.weight.to(dtype)

    def forward(self, out: Tensor) -> None:
        """To be called before `finish` and `project`, which write out."""
        self.out = out
        self.normed = self.new() if self.projects else out

    def new(self) -> Tensor:
        return torch.empty(self.z.shape, dtype=self.dtype, device=self.z.device)

    def finish(self, span: slice, y: Tensor) -> None:
        y, z = y.flatten(2), self.z[:, span]
        if self.norm_weight is None:
            self.normed[:, span] = y * F.silu(z.to(y.dtype))
        else:
            inputs = (y, self.norm_weight, None, z)
            norm.forward(*inputs, self.normed[:, span], *self.norm_options)

    def project(self) -> None:
        if self.projects:
            rows = self.out.view(-1, self.out.shape[-1])
            rows.copy_(product(self.normed.flatten(0, 1), self.weight))
            if self.bias is not None:
                rows += self.bias.to(self.dtype)

    def backward(self, dout: Tensor | None, dz: Tensor) -> None:
        """To be called before `gradient`, which writes dz, and `parameter_gradients`."""
        self.dz, self.dnorm_weight = dz, None
        if dout is None:
            self.projects, dout = False, torch.zeros_like(self.z)
        elif self.projects:
            self.dout = dout.to(self.dtype).flatten(0, 1)
            dout = product(self.dout, self.weight.t()).to(self.z.dtype).view(self.z.shape)
            self.normed = self.new()
        self.dnormed = dout
        if self.norm_weight is not None:
            acc = accumulator(self.z, self.norm_weight)
            self.dnorm_weight = torch.zeros_like(self.norm_weight, dtype=acc)

    def gradient(self, span: slice, y: Callable[[], Tensor]) -> Tensor:
        """Of a piece's y, [batch tokens heads p]."""
        y = y()
        yc, z, grad = y.flatten(2), self.z[:, span], self.dnormed[:, span]
        if self.norm_weight is None:
            dy, self.dz[:, span], normed = gate_backward(yc, z, grad)
        else:
            inputs = (yc, self.norm_weight, None, z, grad)
            totals = (self.dnorm_weight, None)
            found = norm.backward(*inputs, *totals, *self.norm_options, want_y=True)
            dy, self.dz[:, span], normed = found
        if self.normed is not None:
            self.normed[:, span] = normed
        return dy.view(y.shape)

    def parameter_gradients(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        if not self.projects:
            return self.dnorm_weight, None, None
        return self.dnorm_weight, self.dout.t() @ self.normed.flatten(0, 1), self.dout.sum(0)


class MergedOutput(Output):
    """The norm is merged into the projection: of v = y silu(z) only the length is taken.

    (v / rms(v) w) W^T = (v (w W)^T) / rms(v), so that scaling goes over the outputs, which are
    fewer, and over the weights; and their gradients follow from that of w W, which is one product.
    1 / rms(v) is kept for backward in `rstd` [batch length 1].
    """

    @staticmethod
    def suits(z, norm_weight, weight, norm_options, dtype) -> bool:
        """One norm over all features after the gate, and nothing is rounded to 16 bits."""
        _, group_size, norm_before_gate = norm_options
        return (
            norm_weight is not None
            and weight is not None
            and group_size == z.shape[-1]
            and not norm_before_gate
            and z.dtype == dtype == accumulator(z)
        )

    def __init__(self, *arguments, rstd):
        super().__init__(*arguments)
        self.rstd = rstd
        self.merged = self.weight * self.norm_weight.to(self.dtype)

    def finish(self, span: slice, y: Tensor) -> None:
        y = y.flatten(2)
        v = torch.mul(y, F.silu(self.z[:, span]), out=self.normed[:, span])
        norm.rstd(v, self.norm_options[0], self.rstd[:, span])

    def project(self) -> None:
        rows = product(self.normed.flatten(0, 1), self.merged).view(self.out.shape)
        torch.mul(rows, self.rstd, out=self.out)
        if self.bias is not None:
            self.out += self.bias.to(self.dtype)

    def backward(self, dout: Tensor | None, dz: Tensor) -> None:
        self.dz = dz
        if dout is None:
            dout = self.z.new_zeros(*self.z.shape[:2], len(self.weight))
        self.dout = dout.flatten(0, 1)
        self.scaled = (dout * self.rstd).flatten(0, 1)
        self.dnormed = product(self.scaled, self.merged.t()).view(self.z.shape)
        self.normed = self.new()

    def gradient(self, span: slice, y: Callable[[], Tensor]) -> Tensor:
        y = y()
        yc, z, dv = y.flatten(2), self.z[:, span], self.dnormed[:, span]
        gate = F.silu(z)
        v = torch.mul(yc, gate, out=self.normed[:, span])
        # through v / rms(v): remove the part of the gradient along v
        along = torch.linalg.vecdot(dv, v)[..., None].mul_(self.rstd[:, span].square())
        dv.addcmul_(v, along, value=-1 / v.shape[-1])
        dy = gate.mul_(dv)
        torch.ops.aten.silu_backward.grad_input(dv.mul_(yc), z, grad_input=self.dz[:, span])
        return dy.view(y.shape)

    def parameter_gradients(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        merged = self.scaled.t() @ self.normed.flatten(0, 1)
        dnorm_weight = (merged * self.weight).sum(0)
        return dnorm_weight, merged.mul_(self.norm_weight), self.dout.sum(0)


def output_of(z, parameters, norm_options, dtype, rstd: Tensor | None) -> Output:
    """The one with room for 1 / rms(v), if there is, and else the general one."""
    if rstd is None:
        return Output(z, parameters, norm_options, dtype)
    return MergedOutput(z, parameters, norm_options, dtype, rstd=rstd)
