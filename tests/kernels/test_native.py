"""The compiled code for a CPU equals its definition in torch."""

import math
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from comparison import TOLERANCES, distance
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.functional import linear
from ysnake_kernels import ssd_step, step
from ysnake_kernels.dropin.functions import selective_state_update
from ysnake_kernels.native import __main__, build, state_step
from ysnake_kernels.native.matrix import FORMATS, GROUP, Matrix, PackedLinear
from ysnake_kernels.step import reference
from ysnake_kernels.step.inputs import StepInputs

ready = build.ready  # as it is outside these tests
try:
    build.library()
except build.NoCompiler as why:
    pytest.skip(str(why), allow_module_level=True)

# rows and columns that fill no block of four rows and no group of 32 columns
SHAPES = [(1, 1), (3, 5), (4, 32), (7, 33), (13, 100), (64, 96)]


def weight(rows, columns):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows * columns))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("batch", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("bias", [False, True])
def test_a_product_is_that_of_the_rounded_weight(format, shape, batch, bias):
    rows, columns = shape
    matrix = Matrix(weight(*shape), torch.randn(rows) if bias else None, format)
    x = torch.randn(batch, columns) * 10.0 ** torch.arange(batch)[:, None]
    exact = linear(x.double(), matrix.dense().double(), None).float()
    got = matrix.product(x) - (0 if matrix.bias is None else matrix.bias)
    # with integer weights, an input is off by at most 1 / 4,094 of the largest input
    sizes = matrix.dense().abs().sum(1) * x.abs().amax(1)[:, None]
    bound = {"int8": 1 / 4000, "int4": 1 / 4000}.get(format, 1e-6) * sizes + 2e-6
    assert (got - exact).abs().le(bound + 1e-6 * exact.abs()).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_each_format_rounds_as_it_says(shape):
    w = weight(*shape)
    assert torch.equal(Matrix(w, None, "float32").dense(), w)
    assert torch.equal(Matrix(w, None, "bfloat16").dense(), w.bfloat16().float())
    step = w.abs().amax(1, keepdim=True) / 127
    assert (Matrix(w, None, "int8").dense() - w).abs().le(step * 0.5001).all()
    dense = Matrix(w, None, "int4").dense()
    for start in range(0, shape[1], GROUP):
        part, own = w[:, start : start + GROUP], dense[:, start : start + GROUP]
        largest = part.abs().amax(1, keepdim=True)
        # 16 numbers from -8 to 7 times a scale; what lies beyond the last one is cut off
        assert (own - part).abs().le(largest * 3 / 8 + 1e-6).all()
        assert all(len(row.unique()) <= 16 for row in own)
        plain = torch.round(part / (largest / 7)) * largest / 7
        assert ((own - part).square().sum() <= (plain - part).square().sum() * 1.0001).all()


@pytest.mark.parametrize("format", FORMATS)
def test_what_is_zero_or_not_finite_stays_so(format):
    matrix = Matrix(torch.zeros(5, 40), None, format)
    assert not matrix.dense().any()
    assert not matrix.product(torch.randn(2, 40)).any()
    matrix = Matrix(weight(5, 40), None, format)
    assert not matrix.product(torch.zeros(1, 40)).any()
    for bad in (math.inf, math.nan):
        x = torch.randn(2, 40)
        x[1, 3] = bad
        y = matrix.product(x)
        assert y[0].isfinite().all()
        assert not y[1].isfinite().any()


def test_sums_of_many_integers_fit():
    w = torch.full((4, 40_000), 1.0)
    assert torch.allclose(Matrix(w, None, "int8").product(w[:1]), torch.tensor(40_000.0), rtol=1e-3)


@pytest.mark.parametrize("columns", [8192, 8193, 16384])
@pytest.mark.parametrize("format", ["int8", "int4"])
def test_torch_rounds_as_compiled_code_does(format, columns):
    matrix, x = Matrix(torch.eye(4, columns), None, format), torch.randn(3, columns)
    expected = linear(matrix.rounded(x), matrix.dense())
    torch.testing.assert_close(matrix.product(x), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rows", [1, 128, 129])
def test_a_packed_layer_keeps_the_shape(rows):
    matrix = Matrix(weight(12, 40), torch.randn(12), "bfloat16")
    x = torch.randn(rows, 1, 40)
    expected = linear(x, matrix.dense(), matrix.bias)
    assert torch.allclose(PackedLinear(matrix)(x), expected, atol=1e-5)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_a_product_takes_any_dtype_and_memory(format, dtype):
    matrix = Matrix(weight(12, 40).to(dtype), torch.randn(12).to(dtype), format)
    x = torch.randn(40, 3).to(dtype).t()
    y = matrix.product(x)
    assert y.dtype == torch.float32
    assert torch.equal(y, matrix.product(x.float().contiguous()))
    expected = linear(x.float(), matrix.dense(), matrix.bias)
    assert torch.allclose(y, expected, atol=0.1)


def test_a_product_whose_sizes_do_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"bias: expected shape \(12,\) to match weight, got"):
        Matrix(weight(12, 40), torch.randn(11), "float32")
    matrix = Matrix(weight(12, 40), None, "bfloat16")
    with pytest.raises(ValueError, match="x: expected 40 columns, got 39"):
        matrix.product(torch.randn(2, 39))


@pytest.mark.parametrize("format", FORMATS)
def test_packed_weights_do_not_depend_on_the_default_dtype(format):
    matrix = Matrix(weight(12, 40), None, format)
    expected, x = matrix.dense(), torch.randn(2, 40)
    try:
        torch.set_default_dtype(torch.float16)
        dense, y = matrix.dense(), matrix.product(x)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(dense, expected)
    assert y.dtype == torch.float32


def test_another_format_is_refused():
    with pytest.raises(ValueError, match=r"format: expected float32, .*, got 'int3'"):
        Matrix(weight(4, 32), None, "int3")


def test_threads_give_the_same_bits():
    matrix, x = Matrix(weight(101, 96), None, "int4"), torch.randn(3, 96)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(matrix.product(x))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.fixture(autouse=True)
def which_step(monkeypatch):
    """On a CPU `eager` is the compiled code."""
    monkeypatch.setattr(build, "ready", lambda: True)


def token(batch=2, heads=4, head_dim=5, groups=2, n=19, dtype=torch.float32, **options):
    """The inputs of a step. D, z and dt_bias are there if `options` says so."""
    gen = torch.Generator().manual_seed(batch + n)

    def randn(*shape, dtype=dtype):
        return torch.randn(*shape, generator=gen, dtype=torch.float64).to(dtype)

    D = {"head": randn(heads), "channel": randn(heads, head_dim), None: None}[options.get("D")]
    return StepInputs(
        state=randn(batch, heads, head_dim, n, dtype=torch.float32),
        x=randn(batch, heads, head_dim),
        dt=randn(batch, heads).abs() if options.get("softplus") is False else randn(batch, heads),
        A=-randn(heads).exp(),
        B=randn(batch, groups, n),
        C=randn(batch, groups, n),
        D=D,
        z=randn(batch, heads, head_dim) if options.get("z") else None,
        dt_bias=randn(heads) if options.get("dt_bias") else None,
        indices=None,
        dt_softplus=options.get("softplus", True),
        dt_limit=options.get("limit", (0.0, math.inf)),
    )


def advance(inputs):
    return ssd_step(*inputs[:9], inputs.dt_softplus, inputs.indices, inputs.dt_limit)


def run(inputs):
    """y and the state afterwards, by the compiled code."""
    inputs = inputs._replace(state=inputs.state.clone())
    assert state_step.fits(inputs)
    return advance(inputs), inputs.state


def exactly(inputs):
    """The same by the definition in float64."""
    doubled = [t.double() if isinstance(t, torch.Tensor) else t for t in inputs]
    exact = StepInputs(*doubled)._replace(state=inputs.state.to(torch.float64, copy=True))
    return reference.step(exact), exact.state


def assert_equals_reference(inputs):
    (y, state), (expected, expected_state) = run(inputs), exactly(inputs)
    assert y.dtype == inputs.x.dtype
    assert y.shape == inputs.x.shape
    assert distance(y, expected) <= TOLERANCES[y.dtype][0]
    assert distance(state, expected_state) <= TOLERANCES[torch.float32][0]


STEPS = {
    "plain": {},
    "everything": {"D": "head", "z": True, "dt_bias": True, "limit": (0.05, 0.9)},
    "D per channel, a gate": {"D": "channel", "z": True},
    "a bias": {"dt_bias": True, "D": "head"},
    "one group": {"groups": 1},
    "a group per head": {"groups": 4, "D": "channel"},
    "no softplus": {"softplus": False, "z": True},
    "no softplus, limits": {"softplus": False, "limit": (0.3, 0.7)},
    "a low limit": {"limit": (0.6, math.inf)},
    "usual sizes": {"heads": 2, "head_dim": 64, "n": 128, "D": "head", "dt_bias": True},
    "one element": {"heads": 1, "head_dim": 1, "groups": 1, "n": 1, "D": "head"},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("case", STEPS.values(), ids=STEPS)
def test_the_step_of_a_state_is_its_definition(case, batch, dtype):
    assert_equals_reference(token(batch=batch, dtype=dtype, **case))


def test_the_step_of_a_state_takes_strided_and_mixed_inputs():
    inputs = token(batch=3, **STEPS["everything"])
    x, B, C, dt = torch.randn(3, 100).split([20, 38, 38, 4], dim=-1)
    sliced = {"x": x.unflatten(1, (4, 5)), "B": B.unflatten(1, (2, 19)), "dt": dt}
    assert_equals_reference(inputs._replace(C=C.unflatten(1, (2, 19)), **sliced))
    turned = torch.randn(5, 4, 3).permute(2, 1, 0)
    repeated = {"A": -torch.ones(1).expand(4), "D": torch.rand(4, 1).expand(4, 5)}
    assert_equals_reference(inputs._replace(x=turned, z=turned.flip(2), **repeated))
    mixed = {"A": inputs.A.double(), "D": inputs.D.bfloat16(), "dt_bias": inputs.dt_bias.half()}
    assert_equals_reference(inputs._replace(x=inputs.x.bfloat16(), **mixed))


def test_the_step_of_a_state_writes_nothing_else():
    inputs, larger = token(), torch.randn(5, 4, 5, 19)
    expected = larger.clone()
    y, expected[1:3] = run(inputs._replace(state=larger[1:3]))
    assert torch.equal(advance(inputs._replace(state=larger[1:3])), y)
    assert torch.equal(larger, expected)
    empty = inputs._replace(**{k: getattr(inputs, k)[:0] for k in ("state", "x", "dt", "B", "C")})
    assert run(empty)[0].shape == (0, 4, 5)


@pytest.mark.parametrize("name", ["state", "x", "dt", "A", "B", "C", "D", "z", "dt_bias"])
def test_nan_in_the_step_of_a_state_stays_where_it_came(name):
    inputs = token(**STEPS["everything"])
    bad = getattr(inputs, name).clone()
    bad.select(0, 1).view(-1)[0] = math.nan
    got, exact = run(inputs._replace(**{name: bad})), exactly(inputs._replace(**{name: bad}))
    for ours, expected in zip(got, exact, strict=True):
        assert torch.equal(ours.isnan(), expected.isnan())
        assert not ours.isnan().all()
    assert got[0].isnan().any()


def test_the_step_of_a_state_forgets_at_a_rate_of_minus_infinity():
    inputs = token(softplus=False)._replace(A=torch.tensor([-math.inf, -1.0, -1.0, -math.inf]))
    dt = inputs.dt.clone()
    dt[0, 0] = 0
    _, state = run(inputs._replace(dt=dt))
    assert torch.equal(state[0, 0], inputs.state[0, 0])
    written = (dt[..., None] * inputs.x)[:, 3, :, None] * inputs.B[:, 1, None]
    assert torch.allclose(state[:, 3], written, atol=1e-6)


def test_threads_give_the_step_of_a_state_the_same_bits():
    inputs = token(batch=3, heads=24, head_dim=64, n=64)  # enough for four threads
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 4):
            torch.set_num_threads(threads)
            results.append(run(inputs))
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, *results))


def test_the_update_of_a_drop_in_is_the_step_of_a_state(monkeypatch):
    inputs = token(D="channel", z=True, dt_bias=True)
    wide = {
        "dt": inputs.dt[..., None].expand(2, 4, 5),
        "A": inputs.A[:, None, None].expand(4, 5, 19),
        "dt_bias": inputs.dt_bias[:, None].expand(4, 5),
    }
    calls, own = [], state_step.step
    monkeypatch.setattr(state_step, "step", lambda i: calls.append(i) or own(i))
    for state in (inputs.state.clone(), inputs.state.mT.contiguous().mT):
        y = selective_state_update(*inputs._replace(state=state, **wide)[:9], dt_softplus=True)
        assert all(map(torch.equal, (y, state), run(inputs)))
    assert len(calls) == 4


def test_what_is_traced_or_transformed_is_not_for_compiled_code():
    inputs = token(**STEPS["everything"])

    def call(state, x, advance=advance):
        state = state.clone()
        return advance(inputs._replace(state=state, x=x)), state

    def unchecked(state, x):  # make_fx cannot look at the values of A
        return call(state, x, lambda inputs: step.run("eager", inputs))

    new = inputs.state + 1, inputs.x + 1
    expected = call(*new)
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    many = [torch.stack([a, b]) for a, b in zip(new, inputs[:2], strict=True)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that trace is deprecated, and that vmap is slow
        traced = torch.jit.trace(unchecked, inputs[:2])
        mapped = [t[0] for t in torch.func.vmap(call)(*many)]
    made = compiled(*new), make_fx(unchecked)(*inputs[:2])(*new), traced(*new), mapped
    for results in made:
        for ours, result in zip(results, expected, strict=True):
            assert torch.allclose(ours, result, atol=1e-6)


def test_some_inputs_are_not_for_compiled_code(monkeypatch):
    inputs = token()

    class Other(torch.Tensor):
        pass

    unfit = [
        {"state": inputs.state.double()},
        {"state": inputs.state.bfloat16()},
        {"x": inputs.x.double()},
        {"B": inputs.B.as_subclass(Other)},
        {"indices": torch.tensor([1, 0])},
        {"x": inputs.x.to("meta")},
    ]
    assert state_step.fits(inputs._replace(A=torch.nn.Parameter(inputs.A)))
    for changed in unfit:
        assert not state_step.fits(inputs._replace(**changed))
    monkeypatch.setattr(build, "ready", lambda: False)
    assert not state_step.fits(inputs)


def test_autograd_autocast_and_defaults_know_of_the_step_of_a_state():
    inputs = token()
    y, state = run(inputs)
    leaf = torch.ones(()).requires_grad_()
    used = leaf * inputs.state
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.device("meta"):
        assert torch.equal(advance(inputs), y)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        used.sum().backward()
    assert torch.equal(inputs.state, state)
    with torch.inference_mode():
        assert torch.equal(run(token())[0], y)


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for cached in (build.library, ready):
        cached.cache_clear()
    yield tmp_path
    for cached in (build.library, ready):
        cached.cache_clear()


@pytest.fixture
def quick_compiler(tmp_path_factory, monkeypatch):
    """A compiler that gives what the real one gave before."""
    real = build.library()._name
    script = tmp_path_factory.mktemp("compiler") / "quick"
    script.write_text(f"#!/bin/sh\nfor last; do :; done\ncp {real} $last\n")
    script.chmod(0o700)
    monkeypatch.setenv("CXX", str(script))


def test_it_compiles_once_beside_others(quick_compiler, empty_cache):
    assert not ready()  # and does not compile
    assert not list(empty_cache.iterdir())
    command = [sys.executable, "-m", "ysnake_kernels.native"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    both = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for process in both:
        out, _ = process.communicate()
        assert (process.returncode, out.split()[-1]) == (0, str(build.location()))
    assert not build.would_compile()
    assert [path.suffix for path in Path(empty_cache, "ysnake", "native").iterdir()] == [".so"]
    assert not ready()  # the answer holds for a process
    ready.cache_clear()
    assert ready()


def test_why_it_cannot_compile_is_one_line(empty_cache, monkeypatch, capsys):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert __main__.main() == 1
    monkeypatch.delenv("CXX")
    Path(empty_cache, "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(empty_cache / "file"))
    assert __main__.main() == 1
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(": ")[0] for line in lines] == [
        "cannot compile the code for this processor"
    ] * 2
    assert "CXX names no-such-compiler, which is not installed" in lines[0]
    assert "compiled code cannot be kept in " in lines[1]


@pytest.mark.parametrize("mode", [0o777, 0o700], ids=["others may write it", "it is damaged"])
def test_a_file_that_is_not_ours_or_damaged_is_replaced(quick_compiler, empty_cache, mode):
    planted = build.location()
    planted.parent.mkdir(parents=True)
    planted.parent.chmod(mode)
    planted.write_bytes(b"not a library")
    planted.chmod(mode)
    assert not ready()
    assert build.would_compile()
    build.library()
    assert planted.read_bytes() != b"not a library"
    assert not build.would_compile()


def test_a_cache_that_cannot_be_is_named(empty_cache, monkeypatch):
    (empty_cache / "ysnake").write_text("in the way")
    with pytest.raises(build.BuildError, match=r"cannot be kept in .*XDG_CACHE_HOME names another"):
        build.library()


def test_a_compiler_that_CXX_names_is_there_and_gets_its_options(empty_cache, monkeypatch):
    monkeypatch.setenv("CXX", "g++ -fno-such-option")
    if shutil.which("g++"):
        with pytest.raises(build.BuildError, match=r"g[+][+] failed: .*-fno-such-option"):
            build.library()
    monkeypatch.setenv("CXX", str(empty_cache / "none"))
    with pytest.raises(build.BuildError, match=r"CXX names .*none, which is not installed"):
        build.library()


SANITIZED = """
import sys, pytest
from ysnake_kernels.native import build
build.FLAGS[:] = ["-O1", "-fsanitize=address,undefined", *build.FLAGS[1:]]
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", *sys.argv[1:]]))
"""


@pytest.mark.slow
def test_no_memory_outside_of_tensors_is_touched(tmp_path):
    compiler = build._compiler()
    preload = []
    for name in ("libasan.so", "libubsan.so"):
        command = [*compiler, f"-print-file-name={name}"]
        path = Path(subprocess.check_output(command, text=True).strip())
        if not path.is_absolute():
            pytest.skip(f"{compiler} has no {name}")
        preload.append(str(path))
    tests = Path(__file__).parents[1]
    files = [Path(__file__), tests / "model/test_decoding.py"]
    which = "product or rounds or zero or many or packed or own or rows or near or state"
    environment = {
        **os.environ,
        **{"LD_PRELOAD": " ".join(preload), "ASAN_OPTIONS": "detect_leaks=0"},
        **{"XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)},
    }
    command = [sys.executable, "-c", SANITIZED, *map(str, files), "-k", which]
    assert subprocess.run(command, env=environment).returncode == 0
