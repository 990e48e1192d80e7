"""Operators that torch.compile leaves alone, and that cost the host little without it.

torch's own custom operators check and convert their arguments in Python at every call. For our
kernels that takes longer than the launches. So outside compilation an operator here calls its
function directly, through a plain autograd function where it is differentiable.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class Differentiable:
    """An operator with a gradient.

    Args:
        operator: the custom operator.
        function: what it calls.
        save: setup_context of torch.autograd.Function.
        differentiate: (ctx, backward, *gradients of the outputs) -> gradients of the inputs.
        backward_operator, backward: as `operator` and `function`, for `differentiate` to call.
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
                "backward": staticmethod(once_differentiable(plain)),
            },
        )

    def __call__(self, *arguments):
        if torch.compiler.is_compiling():
            return self.operator(*arguments)
        return self.direct.apply(*arguments)


class InPlace:
    """An operator without a gradient, whose argument number `written` is updated in place."""

    def __init__(self, operator: Any, function: Callable, written: int):
        self.operator, self.function, self.written = operator, function, written

    def __call__(self, *arguments):
        if torch.compiler.is_compiling():
            return self.operator(*arguments)
        result = self.function(*arguments)
        torch.autograd.graph.increment_version(arguments[self.written])
        return result


def without_none(tensors: Sequence[Tensor | None]) -> list[Tensor]:
    """The tensors, and one of no elements for each None, which an operator cannot return.

    The first is not None.
    """
    return [tensors[0].new_empty(0) if t is None else t for t in tensors]


def with_none(tensors: Sequence[Tensor], given: Sequence[Tensor | None]) -> list[Tensor | None]:
    """What an operator's `without_none` stands for: None where the argument was not given."""
    return [None if g is None else t for t, g in zip(tensors, given, strict=True)]


def empty_gradients(*given: Tensor | None) -> list[Tensor]:
    """Contiguous tensors of the shapes of the arguments; of no elements for one not given."""
    some = next(t for t in given if t is not None)
    return [
        some.new_empty(0) if t is None else torch.empty(t.shape, dtype=t.dtype, device=t.device)
        for t in given
    ]
