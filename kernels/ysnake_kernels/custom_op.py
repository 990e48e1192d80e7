"""Operators that torch.compile calls without looking inside, and that are quick to call without it.

torch's custom operators check and convert their arguments in Python at every call. For our kernels
that takes longer than the launches. So outside compilation an operator here calls its function
directly; a differentiable one goes through a plain autograd function.
"""

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def outside_autocast(backward: Callable) -> Callable:
    """Switch autocast off in the `backward` of an autograd function.

    Forward has chosen the dtypes. Autocast would change the dtypes of the products in backward.
    """

    @wraps(backward)
    def run(ctx: Any, *grads: Tensor | None) -> Any:
        device = next((g.device.type for g in grads if g is not None), "cpu")
        if not torch.is_autocast_enabled(device):
            return backward(ctx, *grads)
        with torch.autocast(device, enabled=False):
            return backward(ctx, *grads)

    return run


class Differentiable:
    """An operator with a gradient.

    Args:
        operator: the custom operator.
        function: the function that the custom operator calls.
        save: (ctx, inputs, output), as setup_context of torch.autograd.Function.
        differentiate: (ctx, backward, *gradients of the outputs) -> gradients of the inputs.
        backward_operator, backward: the same pair for the gradient. `differentiate` gets the
            operator under torch.compile, and else the function.
    """

    def __init__(
        self,
        operator: Any,
        function: Callable,
        save: Callable,
        differentiate: Callable,
        backward_operator: Any,
        backward: Callable,
    ):
        self.operator = operator

        def compiled(ctx, *grads):
            return differentiate(ctx, backward_operator, *grads)

        def forward(ctx, *arguments):
            output = function(*arguments)
            save(ctx, arguments, output)
            return output

        def plain(ctx, *grads):
            return differentiate(ctx, backward, *grads)

        operator.register_autograd(compiled, setup_context=save)
        self.direct = type(
            function.__name__,
            (torch.autograd.Function,),
            {
                "forward": staticmethod(forward),
                "backward": staticmethod(outside_autocast(once_differentiable(plain))),
            },
        )

    def __call__(self, *arguments):
        if torch.compiler.is_compiling():
            return self.operator(*arguments)
        return self.direct.apply(*arguments)


class InPlace:
    """An operator without a gradient that updates its argument number `written` in place."""

    def __init__(self, operator: Any, function: Callable, written: int):
        self.operator, self.function, self.written = operator, function, written

    def __call__(self, *arguments):
        if torch.compiler.is_compiling():
            return self.operator(*arguments)
        result = self.function(*arguments)
        torch.autograd.graph.increment_version(arguments[self.written])
        return result


def without_none(tensors: Sequence[Tensor | None]) -> list[Tensor]:
    """The tensors, with an empty one in place of each None, which an operator cannot return.

    The first must not be None.
    """
    first = tensors[0]
    assert first is not None
    return [first.new_empty(0) if t is None else t for t in tensors]


def with_none(tensors: Sequence[Tensor], given: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Undo `without_none` for gradients: None where the argument was not given."""
    return [None if g is None else t for t, g in zip(tensors, given, strict=True)]


def empty_gradients(*given: Tensor | None) -> list[Tensor]:
    """Contiguous tensors of the shapes of the arguments. One without elements stands for None."""
    present = next(t for t in given if t is not None)
    return [
        present.new_empty(0) if t is None else torch.empty(t.shape, dtype=t.dtype, device=t.device)
        for t in given
    ]
