"""`pytest benchmarks --benchmark-only`: the speed of each operator, and of the model.

The shapes are small, with the proportions of real ones. `--benchmark-json FILE` keeps the figures.
`--benchmark-compare` compares them with earlier ones.
"""

import pytest
import torch
import ysnake_kernels as ours
from ysnake_kernels.linear import Linear

from ysnake.inference.decoding import Decoder
from ysnake.model import Model
from ysnake.model.config import ModelConfig

BATCH, LENGTH, HEADS, P, N, WIDTH = 2, 256, 8, 64, 64, 4
INNER = HEADS * P
SIZES = {"vocab_size": 4096, "d_model": INNER // 2, "n_layers": 4, "d_state": N, "head_dim": P}


def operators() -> dict:
    """Each operator with its arguments."""
    torch.manual_seed(0)
    x, z = torch.randn(2, BATCH, LENGTH, HEADS, P)
    B, C = torch.randn(2, BATCH, LENGTH, 1, N)
    dt, dt_bias = torch.randn(BATCH, LENGTH, HEADS), torch.linspace(-7, -2, HEADS)
    A, D = -torch.arange(1.0, HEADS + 1), torch.ones(HEADS)
    channels = INNER + 2 * N
    taps, bias, weight = torch.randn(channels, WIDTH), torch.randn(channels), torch.ones(INNER)
    projected = torch.randn(BATCH, LENGTH, INNER + channels + HEADS)

    def scan(x, dt, A, B, C, D, dt_bias):
        return ours.ssd_scan(x, dt, A, B, C, D=D, dt_bias=dt_bias, dt_softplus=True)

    def conv(x, taps, bias):
        return ours.causal_conv1d(x.transpose(1, 2), taps, bias, activation="silu")

    def norm(x, weight, z):
        return ours.rms_norm_gated(x, weight, z=z, norm_before_gate=False)

    def mixer(projected, taps, bias, dt_bias, A, D, weight):
        return ours.mamba_split_conv1d_scan_combined(
            *(projected, taps, bias, dt_bias, A, D, None),
            rmsnorm_weight=weight,
            norm_before_gate=False,
        )

    return {
        "scan": (scan, [x, dt, A, B, C, D, dt_bias]),
        "conv": (conv, [torch.randn(BATCH, LENGTH, channels), taps, bias]),
        "norm": (norm, [x.flatten(2), weight, z.flatten(2)]),
        "mixer": (mixer, [projected, taps, bias, dt_bias, A, D, weight]),
    }


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward and backward"])
@pytest.mark.parametrize("name", ["scan", "conv", "norm", "mixer"])
def test_operator(benchmark, name, backward):
    operator, arguments = operators()[name]
    leaves = [t.requires_grad_(backward) for t in arguments]
    dy = torch.randn_like(operator(*leaves))

    def call():
        y = operator(*leaves)
        if backward:
            torch.autograd.grad(y, leaves, dy)

    benchmark.extra_info["tokens"] = BATCH * LENGTH
    benchmark(call)


@pytest.mark.parametrize("rows", [1, 16, LENGTH])
@pytest.mark.parametrize("layer", [Linear, torch.nn.Linear], ids=["ours", "torch's"])
def test_linear(benchmark, layer, rows):
    torch.manual_seed(0)
    x, layers = torch.randn(rows, 2 * INNER), [layer(2 * INNER, 4 * INNER) for _ in range(16)]

    def call():  # one layer after another, so weights come from memory as in a model
        for each in layers:
            each(x)

    with torch.no_grad():
        benchmark(call)


def test_step_of_the_state(benchmark):
    x, dt, B, C = (torch.randn(BATCH, *shape) for shape in ((HEADS, P), (HEADS,), (1, N), (1, N)))
    state, A = torch.zeros(BATCH, HEADS, P, N), -torch.arange(1.0, HEADS + 1)
    benchmark(ours.ssd_step, state, x, dt, A, B, C, dt_softplus=True)


def test_step_of_the_convolution(benchmark):
    channels = INNER + 2 * N
    state, taps = torch.zeros(BATCH, channels, WIDTH - 1), torch.randn(channels, WIDTH)
    benchmark(ours.causal_conv1d_step, torch.randn(BATCH, channels), state, taps, None, "silu")


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Model(ModelConfig(**SIZES))


def test_training_step(benchmark, model):
    ids = torch.randint(SIZES["vocab_size"], (BATCH, LENGTH))

    def step():
        model.zero_grad()
        model.loss(ids, ids).backward()

    benchmark.extra_info["tokens"] = ids.numel()
    benchmark(step)


def test_prefill(benchmark, model):
    ids = torch.randint(SIZES["vocab_size"], (1, 512))
    benchmark.extra_info["tokens"] = ids.numel()
    benchmark(Decoder(model).step, ids, None, last_only=True)


@pytest.mark.parametrize("batch", [1, 16], ids=["one sequence", "16 sequences"])
@pytest.mark.parametrize("weights", ["float32", "int8"])
def test_decode(benchmark, model, weights, batch):
    decoder = Decoder(model, weights)
    ids = torch.randint(SIZES["vocab_size"], (batch,))
    _, state = decoder.step(ids)
    benchmark.extra_info["tokens"] = batch
    benchmark(decoder.step, ids, state)
