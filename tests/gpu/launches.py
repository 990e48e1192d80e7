"""Launches of the operators, of training and of decoding on the stand-in for a GPU.

Triton compiles each kernel to machine code for sm_90 and launches it as on a card; the launch does
nothing. Prints one line of JSON for each case: how many launches it took, or why it failed.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import stand_in_driver
import torch
import ysnake_kernels as ours
from torch import Tensor

from ysnake.inference.replay import ReplayedStep
from ysnake.model import Model
from ysnake.model.config import ModelConfig

BATCH, LENGTH, HEADS = 2, 96, 2
LONG = 1600  # a sequence that is cut into segments
BF16 = torch.bfloat16
Case = tuple[str, Callable[[], object]]


class Sizes(NamedTuple):
    """Of a head and its state: small ones compile in half the time."""

    P: int
    N: int

    @property
    def d_inner(self) -> int:
        return HEADS * self.P

    @property
    def channels(self) -> int:
        return self.d_inner + 2 * self.N


def floats(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype, requires_grad=True)


def per_head(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Parameters of the heads: in float64 if `dtype` is float64, else in float32."""
    new = partial(floats, HEADS, dtype=torch.promote_types(dtype, torch.float32))
    return {"A": new(), "D": new(), "dt_bias": new()}


def scan_inputs(
    sizes: Sizes, dtype: torch.dtype = BF16, batch: int = BATCH, length: int = LENGTH
) -> dict[str, Tensor]:
    """Slices of what the convolution gives, as in the mixer."""
    xBC = floats(batch, length, sizes.channels, dtype=dtype)
    x, B, C = xBC.split([sizes.d_inner, sizes.N, sizes.N], -1)
    x, B, C = x.unflatten(-1, (HEADS, -1)), B[:, :, None], C[:, :, None]
    dt = floats(batch, length, HEADS, dtype=dtype)
    return {"x": x, "dt": dt, "B": B, "C": C, **per_head(dtype)}


def differentiate(*outputs: Tensor) -> None:
    torch.autograd.backward(outputs, [torch.zeros_like(output) for output in outputs])


def scan(final_gradient: bool, **inputs: Tensor) -> None:
    y, states = ours.ssd_scan(**inputs, dt_softplus=True, return_final_states=True)
    differentiate(*([y, states] if final_gradient else [y]))


def documents() -> Tensor:
    return torch.arange(LENGTH).ge(50).int().expand(BATCH, -1).contiguous()


def packed() -> dict[str, Tensor]:
    return {"cu_seqlens": torch.tensor([0, LONG, 2 * LONG], dtype=torch.int32)}


def operator_cases(sizes: Sizes, thorough: bool) -> Iterator[Case]:
    given = partial(scan_inputs, sizes)
    gate = {"z": floats(BATCH, LENGTH, HEADS, sizes.P, dtype=BF16), "seq_idx": documents()}
    state = {"initial_states": floats(BATCH, HEADS, *sizes)}
    both = given() | gate | state
    yield "scan, gate, documents, both states", partial(scan, True, **both)
    long = given(batch=1, length=2 * LONG) | packed() | state
    yield "scan, packed, segments, initial states", partial(scan, False, **long)
    yield "scan, float64, final gradient", partial(scan, True, **given(torch.float64))
    operators = (convolution, norm, step)
    yield from ((operator.__name__, partial(operator, sizes, BF16)) for operator in operators)
    if thorough:
        yield "scan", partial(scan, False, **given())
        yield "scan, initial states", partial(scan, False, **given(), **state)
        yield "scan, final gradient", partial(scan, True, **given())
        yield "scan, segments", partial(scan, True, **given(batch=1, length=LONG))
        yield "scan, float64", partial(scan, False, **given(torch.float64))
        for dtype in (torch.float16, torch.float32):
            yield f"scan, {dtype}", partial(scan, True, **given(dtype))
            for operator in (*operators, mixer):
                yield f"{operator.__name__}, {dtype}", partial(operator, sizes, dtype)


def convolution(sizes: Sizes, dtype: torch.dtype) -> None:
    x = floats(BATCH, LENGTH, sizes.channels + 8, dtype=dtype)
    x = x[..., : sizes.channels].transpose(1, 2)
    taps = floats(sizes.channels, 4), floats(sizes.channels)
    y, final = ours.causal_conv1d(x, *taps, activation="silu", return_final_states=True)
    differentiate(y, final)


def norm(sizes: Sizes, dtype: torch.dtype) -> None:
    y = floats(BATCH, LENGTH, sizes.d_inner, dtype=dtype)
    z = floats(BATCH, LENGTH, 2 * sizes.d_inner, dtype=dtype)[..., : sizes.d_inner]
    differentiate(ours.rms_norm_gated(y, floats(sizes.d_inner), z=z, norm_before_gate=False))


@torch.no_grad()
def step(sizes: Sizes, dtype: torch.dtype) -> None:
    taps = floats(sizes.channels, 4), floats(sizes.channels)
    x, rows = torch.zeros(BATCH, sizes.channels, dtype=dtype), torch.arange(BATCH)
    for size in (3, 5):
        states = torch.zeros(BATCH, sizes.channels, size, dtype=dtype)
        ours.causal_conv1d_step(x, states, *taps, "silu", rows)
    given = scan_inputs(sizes, dtype)
    token = {k: t[:, 0] if k in ("x", "dt", "B", "C") else t for k, t in given.items()}
    ours.ssd_step(torch.zeros(BATCH, HEADS, *sizes), **token, dt_softplus=True)


def mixer(sizes: Sizes, dtype: torch.dtype) -> None:
    features = sizes.d_inner + sizes.channels + HEADS
    out = ours.mamba_split_conv1d_scan_combined(
        floats(BATCH, LENGTH, features, dtype=dtype),
        *(floats(sizes.channels, 4), floats(sizes.channels)),
        **per_head(),
        rmsnorm_weight=floats(sizes.d_inner),
        outproj_weight=floats(32, sizes.d_inner, dtype=dtype),
        norm_before_gate=False,
    )
    differentiate(out)


def train(
    model: Model, with_documents: bool = False, carry: bool = False, recompute: bool = False
) -> None:
    """Loss and gradients in bfloat16, as `ysnake.train` has them on a GPU."""
    ids = torch.ones(BATCH, LENGTH, dtype=torch.int64)
    model.backbone.recompute = recompute
    model.zero_grad()
    state = model.empty_state(BATCH) if carry else None
    with torch.autocast("cpu", BF16):
        loss = model.loss(ids, ids, documents() if with_documents else None, state)
    loss.backward()
    without = [name for name, p in model.named_parameters() if p.grad is None]
    if without:
        raise AssertionError(f"no gradient of {', '.join(without)}")


def decode(model: Model, dtype: torch.dtype) -> None:
    """Read a prompt, then write two tokens, as on a GPU."""
    model = model.to(dtype)
    _, state = model.step(torch.ones(BATCH, LENGTH, dtype=torch.int64), last_only=True)
    write = torch.no_grad()(ReplayedStep(model).write)
    for _ in range(2):
        write(torch.ones(BATCH, dtype=torch.int64), state)


def model_cases(sizes: Sizes, thorough: bool) -> Iterator[Case]:
    torch.manual_seed(0)
    d_model, (P, N) = sizes.d_inner // 2, sizes
    model = Model(ModelConfig(vocab_size=64, d_model=d_model, n_layers=2, head_dim=P, d_state=N))
    yield "mixer", partial(mixer, sizes, BF16)
    yield "training", partial(train, model)
    yield "training, recomputed", partial(train, model, recompute=True)
    both = {"with_documents": True, "carry": True}
    yield "training, documents, carried state", partial(train, model, **both)
    other = {"bias": True, "conv_bias": False, "residual_in_fp32": False, "conv_width": 3}
    other_model = Model(replace(model.config, **other))
    yield "decoding, other forms", partial(decode, other_model, BF16)
    if thorough:
        yield "training, documents", partial(train, model, with_documents=True)
        yield "training, carried state", partial(train, model, carry=True)
        yield "decoding, float32", partial(decode, model, torch.float32)
        yield "decoding, float64", partial(decode, model, torch.float64)
    yield "decoding", partial(decode, model, BF16)


CASES = {"operators": operator_cases, "model": model_cases}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", choices=CASES)
    parser.add_argument("--thorough", action="store_true", help="more cases, at usual sizes")
    args = parser.parse_args()
    sizes = Sizes(64, 128) if args.thorough else Sizes(16, 16)
    with stand_in_driver.gpu() as launches:
        for name, case in CASES[args.cases](sizes, args.thorough):
            start, before, row = time.perf_counter(), launches(), {"case": name}
            try:
                case()
            except Exception as error:  # one that fails hides none of the others
                row["error"] = f"{type(error).__name__}: {error}"[-2000:]
            row |= {"launches": launches() - before, "seconds": time.perf_counter() - start}
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
