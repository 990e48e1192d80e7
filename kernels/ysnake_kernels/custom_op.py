"""Operators that torch.compile leaves alone, and that cost the host little without it.

torch's own custom operators check and convert their arguments in Python at every call. For our
kernels that takes longer than the launches. So outside compilation an operator here calls its
function directly, through a plain autograd function where it is differentiable.
"""

from collections.abc import Callable
from typing import Any

import torch
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
