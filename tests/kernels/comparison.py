"""How an implementation is compared with `reference` run in float64."""

from collections.abc import Callable

import torch
from torch import Tensor
from ysnake_kernels import backend

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # where `fused` is tested
DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
# largest ||out - ref|| / ||ref|| of outputs and states, and of gradients
TOLERANCES = {
    torch.float64: (1e-10, 1e-10),
    torch.float32: (2e-5, 1e-4),
    torch.bfloat16: (1e-2, 2e-2),
    torch.float16: (3e-3, 6e-3),
}


def on_device(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors where `fused` is tested."""
    return {name: t.to(DEVICE) for name, t in tensors.items()}


def distance(out: Tensor, expected: Tensor) -> float:
    """||out - expected|| / ||expected||, infinite where out has a NaN."""
    out, expected = out.double(), expected.to(out.device).double()
    if not out.isfinite().all():
        return float("inf")
    scale = expected.norm().item()
    return (out - expected).norm().item() / (scale if scale > 0 else 1.0)


def outputs_and_gradients(
    operator: Callable, inputs: dict[str, Tensor], options: dict, weights: list[Tensor] | None
) -> tuple[list[Tensor], dict[str, Tensor], list[Tensor]]:
    """Run `operator(**inputs, **options)`; gradients of the weighted sum of all its outputs."""
    leaves = {k: t.detach().requires_grad_(t.is_floating_point()) for k, t in inputs.items()}
    outputs = operator(**leaves, **options)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    if weights is None:
        weights = [torch.randn(o.shape, dtype=torch.float64).to(o) for o in outputs]
    total = sum(
        (o * w.to(o)).sum(dtype=torch.float64) for o, w in zip(outputs, weights, strict=True)
    )
    floating = {name: t for name, t in leaves.items() if t.is_floating_point()}
    gradients = torch.autograd.grad(total, list(floating.values()))
    for name, gradient in zip(floating, gradients, strict=True):
        assert gradient.dtype == inputs[name].dtype, f"gradient of {name}: {gradient.dtype}"
        assert gradient.shape == inputs[name].shape, f"gradient of {name}: {gradient.shape}"
    return [o.detach() for o in outputs], dict(zip(floating, gradients, strict=True)), weights


def assert_equals_reference(
    operator: Callable, inputs: dict[str, Tensor], options: dict, name: str = "eager"
) -> None:
    """The implementation `name` agrees with the reference in float64, gradients included.

    The reference sees the very values that the implementation sees, rounded to its dtype.
    """
    dtype = next(t.dtype for t in inputs.values() if t.is_floating_point())
    forward, backward = TOLERANCES[dtype]
    exact = {k: t.double() if t.is_floating_point() else t for k, t in inputs.items()}
    with backend(name):
        outputs, gradients, weights = outputs_and_gradients(operator, inputs, options, None)
    with backend("reference"):
        expected, expected_gradients, _ = outputs_and_gradients(operator, exact, options, weights)
    for i, (out, ref) in enumerate(zip(outputs, expected, strict=True)):
        assert out.shape == ref.shape
        assert distance(out, ref) <= forward, f"output {i}: {distance(out, ref):.2e}"
    for key, ref in expected_gradients.items():
        far = distance(gradients[key], ref)
        assert far <= backward, f"gradient of {key}: {far:.2e}"
