"""torch.compile and torch.export pass through the operators whole, on a CPU too."""

import pytest
import torch
from test_in_place import (
    channel_last_convolution,
    convolution,
    convolution_and_states,
    mixer,
    mixer_with_all,
    norm,
    product,
    product_of_normed,
    scan,
    scan_of_mamba_1,
    tensors,
)
from torch._subclasses.fake_tensor import FakeTensorMode
from ysnake_kernels import causal_conv1d_step, ssd_scan, ssd_step
from ysnake_kernels.dropin import functions

BOUNDS = torch.tensor([0, 3, 3, 8], dtype=torch.int32)


def packed_convolution(t):
    documents = torch.tensor([[0, 0, 1, 1, 1, 2, 2, 2]] * 2)
    return convolution(t, seq_idx=documents, initial_states=t["z"][:, :, :3])


def scan_inputs(t):
    x, dt = t["x"][:1].unflatten(2, (2, 4)), t["z"][:1, :, :2]
    B, C = t["x"][1:, :, None, :3], t["z"][1:, :, None, :3]
    return x, dt, -t["bias"][:2].exp(), B, C


def packed_scan(t):
    states = t["z"][:, :6, :4].reshape(-1)[:36].view(3, 2, 2, 3).repeat(1, 1, 2, 1)
    options = {"dt_softplus": True, "return_final_states": True, "initial_states": states}
    gate = t["z"][1:].unflatten(2, (2, 4))
    return ssd_scan(*scan_inputs(t), cu_seqlens=BOUNDS, z=gate, D=t["bias"][:2], **options)


def offered_scan(t):
    x, dt, A, B, C = scan_inputs(t)
    options = {"dt_softplus": True, "return_final_states": True}
    return functions.mamba_chunk_scan_combined(
        x, dt, A, B, C, 256, dt_bias=t["bias"][:2], **options
    )


def tokens_one_by_one(t):
    """A token by each operator that updates a state in place; the states too."""
    width, columns = t["z"][:, :, :3].clone(), t["z"][:, :, :4].clone()
    state = t["z"].view(2, 2, 4, 8)[..., :3].clone()
    x, dt, A, B, C = t["x"][:, 0].view(2, 2, 4), t["z"][:, 0, :2], *scan_inputs(t)[2:]
    y = causal_conv1d_step(t["x"][:, 0], width, t["weight"], t["bias"], "silu")
    other = functions.causal_conv1d_update(t["x"][..., :1], columns, t["weight"], None, "silu")
    B, C = (b[0, :2] for b in (B, C))
    return y, other, ssd_step(state, x, dt, A, B, C, dt_softplus=True), width, columns, state


WITH_GRADIENTS = [
    *(convolution, channel_last_convolution, convolution_and_states, packed_convolution),
    scan_of_mamba_1,
    *(norm, scan, packed_scan, offered_scan, mixer, mixer_with_all, product, product_of_normed),
]


def outputs_and_gradients(call, t):
    leaves = {k: v.clone().requires_grad_() for k, v in t.items()}
    outputs = call(leaves)
    outputs = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
    total = sum(out.sin().sum() for out in outputs)
    grads = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    return [t for t in (*outputs, *grads) if t is not None]


def assert_equal(ours, expected):
    assert len(ours) == len(expected)
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("operator", WITH_GRADIENTS, ids=lambda o: o.__name__)
def test_one_graph_with_the_same_outputs_and_gradients(operator):
    torch.compiler.reset()
    call = torch.compile(operator, fullgraph=True, backend="aot_eager")
    assert_equal(outputs_and_gradients(call, tensors()), outputs_and_gradients(operator, tensors()))


def test_one_graph_of_a_token():
    torch.compiler.reset()
    call = torch.compile(tokens_one_by_one, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert_equal(call(tensors()), tokens_one_by_one(tensors()))


@pytest.mark.parametrize("operator", WITH_GRADIENTS, ids=lambda o: o.__name__)
def test_an_exported_program_gives_the_same(operator):
    class Module(torch.nn.Module):
        def forward(self, t):
            return operator(t)

    with torch.no_grad():
        program = torch.export.export(Module(), (tensors(),))
        expected = operator(tensors())
        ours = program.module()(tensors())
    expected, ours = ([t] if isinstance(t, torch.Tensor) else t for t in (expected, ours))
    assert_equal(ours, expected)
    if operator not in (product, product_of_normed):
        graphs = [m.graph for m in program.graph_module.modules()]
        assert any("ysnake" in str(graph) for graph in graphs)


@pytest.mark.slow
def test_the_compiler_that_writes_code():
    """It checks strides, which the others do not."""
    torch.compiler.reset()

    def all_of_them(t):
        outputs = [operator(t) for operator in (channel_last_convolution, norm, scan, mixer)]
        return [t for out in outputs for t in ([out] if isinstance(out, torch.Tensor) else out)]

    call = torch.compile(all_of_them, fullgraph=True)
    ours = outputs_and_gradients(call, tensors())
    assert_equal(ours, outputs_and_gradients(all_of_them, tensors()))


def test_fake_tensors_have_shapes_and_no_values():
    """As for tools that plan the memory of a model before they load it."""
    with FakeTensorMode():
        x, dt = torch.ones(1, 70, 2, 4, requires_grad=True), torch.ones(1, 70, 2)
        B = torch.ones(1, 70, 1, 3)
        y, state = ssd_scan(x, dt, -torch.ones(2), B, B, return_final_states=True)
        (gradient,) = torch.autograd.grad(y.sum() + state.sum(), x)
    assert (y.shape, state.shape, gradient.shape) == (x.shape, (1, 2, 4, 3), x.shape)
