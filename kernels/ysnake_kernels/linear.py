"""Linear layers that use the fastest library that torch has for their products.

On a CPU, torch multiplies float32 matrices with the BLAS it was built with, and uses oneDNN for
convolutions only. On AMD's CPUs with AVX-512 oneDNN takes a tenth to a third less time than MKL,
and half the time for few rows with weights that are not in the cache. With AVX2 it takes up to a
tenth less. On Intel's CPUs MKL is faster. For all other devices, dtypes and kinds of tensors a
layer here is torch's own.
"""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from ysnake_kernels.backend import as_chosen_here, choose
from ysnake_kernels.memory import as_base
from ysnake_kernels.norm import add_and_norm, rms_norm_gated
from ysnake_kernels.norm import eager as norm
from ysnake_kernels.norm.inputs import plain_norm

PLAIN = (Tensor, nn.Parameter)  # and not, for example, tensors that are spread over devices


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weight^T + bias, as `torch.nn.functional.linear`; differentiable once.

    Args:
        x: (..., features), floating point.
        weight: (outputs, features), in x's dtype unless under autocast.
        bias: (outputs,), in weight's dtype, or None.

    Returns:
        (..., outputs), in x's dtype unless under autocast.
    """
    if _by_onednn(x, weight):
        return _Linear.apply(x, weight, bias)
    return F.linear(x, weight, bias)


def normed_linear(
    x: Tensor,
    added: Tensor | None,
    norm_weight: Tensor,
    eps: float,
    weight: Tensor,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The sum x + added, and `linear` of its RMS norm.

    For backward it stores the sum. It computes the norm again. Under autocast the linear layer runs
    in autocast's dtype.

    Args:
        x: (..., features).
        added: shape of x, in x's dtype or one with fewer bits; None means zero.
        norm_weight: (features,).
        eps: added to the mean square of the features.
        weight, bias: as in `linear`.

    Returns:
        The sum, in x's dtype; (..., outputs) in the linear layer's dtype.
    """
    tensors = (x, norm_weight, weight)
    if choose(x) == "fused" and _are_plain(*tensors) and not torch.compiler.is_compiling():
        dtype = products_dtype(weight)
        weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
        with torch.autocast(x.device.type, enabled=False):
            return _AddedNormedLinear.apply(x, added, norm_weight, weight, bias, eps)
    if added is not None:
        x = x + added
    if _on_cpu(*tensors) and choose(x) == "eager":
        return x, _NormedLinear.apply(x, norm_weight, weight, bias, eps)

    def compute(x: Tensor, norm_weight: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(rms_norm_gated(x, norm_weight, eps=eps).to(weight.dtype), weight, bias)

    y = checkpoint(
        *(as_chosen_here(compute), x, norm_weight, weight, bias),
        use_reentrant=False,
        preserve_rng_state=False,
    )
    return x, y


def products_dtype(weight: Tensor) -> torch.dtype:
    """The dtype in which a linear layer with this weight multiplies: autocast's or the weight's."""
    device = weight.device.type
    if torch.is_autocast_enabled(device) and weight.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return weight.dtype


class Linear(nn.Linear):
    """`torch.nn.Linear` that computes its products with `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return _shifted(product(x.reshape(-1, x.shape[-1]), weight), bias, x)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        rows, needs = dy.reshape(-1, len(weight)), ctx.needs_input_grad
        dx = product(rows, weight.t()).view(x.shape) if needs[0] else None
        dweight = rows.t() @ x.reshape(-1, x.shape[-1]) if needs[1] else None
        return dx, dweight, rows.sum(0) if needs[2] else None


class _NormedLinear(torch.autograd.Function):
    """A linear layer after a norm. It scales the layer's weight by the norm's, not the tokens.

    x / rms(x) is `normalised`. With W' = W w, the gradients of W and w both follow from that of W'.
    """

    @staticmethod
    def forward(ctx, x, norm_weight, weight, bias, eps):
        ctx.save_for_backward(x, norm_weight, weight)
        ctx.eps = eps
        normalised, _ = norm.normalise(x.reshape(-1, x.shape[-1]), eps)
        return _shifted(product(normalised, weight * norm_weight), bias, x)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, norm_weight, weight = ctx.saved_tensors
        rows = dy.reshape(-1, len(weight))
        normalised, rstd = norm.normalise(x.reshape(-1, x.shape[-1]), ctx.eps)
        dmerged = rows.t() @ normalised
        dnorm_weight = (dmerged * weight).sum(0)
        dnormalised = product(rows, (weight * norm_weight).t())
        dx = norm.normalise_backward(dnormalised, normalised, rstd).view(x.shape)
        dbias = rows.sum(0) if ctx.needs_input_grad[3] else None
        return dx, dnorm_weight, dmerged.mul_(norm_weight), dbias, None


class _AddedNormedLinear(torch.autograd.Function):
    """A sum, its norm and a linear layer, with the fused norm, which also computes the sum."""

    @staticmethod
    def forward(ctx, x, added, norm_weight, weight, bias, eps):
        total, normed = add_and_norm(x, added, norm_weight, eps, weight.dtype)
        ctx.save_for_backward(total, norm_weight, weight)
        ctx.eps, ctx.added = eps, None if added is None else added.dtype
        ctx.set_materialize_grads(False)
        return total, as_base(F.linear(normed, weight, bias))

    @staticmethod
    @once_differentiable
    def backward(ctx, dtotal, dy):
        from ysnake_kernels.norm import fused

        total, norm_weight, weight = ctx.saved_tensors
        if dy is None:
            dadded = None if ctx.added is None or dtotal is None else dtotal.to(ctx.added)
            return dtotal, dadded, None, None, None, None
        needs, inputs = ctx.needs_input_grad, plain_norm(total, norm_weight, ctx.eps)
        rows = dy.reshape(-1, len(weight))
        dweight = None
        if needs[3]:
            normed = fused.add_and_norm(inputs, None, weight.dtype)[1]
            dweight = rows.t() @ normed.view(-1, weight.shape[1])
        dnormed = (rows @ weight).view(total.shape)
        dx, dadded, dnorm_weight, *_ = fused.gradients(inputs, dnormed, dtotal, ctx.added)
        return dx, dadded, dnorm_weight, dweight, rows.sum(0) if needs[4] else None, None


def _shifted(rows: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    """rows + bias, in the memory of `rows`; all dimensions but the last are those of x."""
    if bias is not None:
        rows += bias
    return as_base(rows.view(*x.shape[:-1], rows.shape[-1]))


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x weight^T of x (rows, features) and weight (outputs, features); not differentiable."""
    if not _by_onednn(x, weight):
        return x @ weight.t()
    rows = len(x)
    spare = _rounded(rows) - rows
    if spare:
        x = F.pad(x, (0, 0, 0, spare))  # zero rows at the end
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")[:rows]


def products_are_rounded(x: Tensor) -> bool:
    """Whether the caller lets torch round the factors of x's products to bfloat16 on a CPU.

    `torch.set_float32_matmul_precision("medium")` and torch.backends.mkldnn say so. CPUs without
    such products do not round.
    """
    allowed = torch.backends.mkldnn.matmul.fp32_precision == "bf16"  # type: ignore[attr-defined]
    return allowed and x.dtype == torch.float32 and x.device.type == "cpu"


def _rounded(rows: int) -> int:
    """`rows` rounded up. Only four numbers between two powers of two can result.

    oneDNN generates code for each number of rows it sees, up to a megabyte for each size of weight,
    and keeps it in memory.
    """
    step = 1 << max(0, (rows - 1).bit_length() - 3)
    return -(-rows // step) * step


def _are_plain(*tensors: Tensor) -> bool:
    return all(type(t) in PLAIN for t in tensors)


def _on_cpu(*tensors: Tensor) -> bool:
    """Whether these are plain float32 or float64 tensors on a CPU, all of one dtype."""
    return (
        {t.dtype for t in tensors} in ({torch.float32}, {torch.float64})
        and all(t.device.type == "cpu" for t in tensors)
        and _are_plain(*tensors)
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


def _by_onednn(x: Tensor, weight: Tensor) -> bool:
    return x.dtype == torch.float32 and _on_cpu(x, weight) and _onednn_is_faster()


@cache
def _onednn_is_faster() -> bool:
    if not torch.backends.mkldnn.is_available():
        return False
    intel = "Intel" in torch.cpu.get_capabilities().get("cpu_name", "")
    at_home = torch.backends.mkl.is_available() and intel
    return torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512") and not at_home
