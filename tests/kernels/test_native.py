"""The compiled code for a CPU equals its definition in torch."""

import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.functional import linear
from ysnake_kernels.native import build
from ysnake_kernels.native.matrix import FORMATS, GROUP, Matrix, Packed

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
    # integer weights round their inputs to 1 / 4,094 of the largest
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


@pytest.mark.parametrize("rows", [1, 64, 65])
def test_a_packed_layer_keeps_the_shape(rows):
    matrix = Matrix(weight(12, 40), torch.randn(12), "bfloat16")
    x = torch.randn(rows, 1, 40)
    assert torch.allclose(Packed(matrix)(x), linear(x, matrix.dense(), matrix.bias), atol=1e-5)


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


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    build.library.cache_clear()
    yield tmp_path
    build.library.cache_clear()


def test_it_compiles_once_beside_others(empty_cache):
    program = "from ysnake_kernels.native.build import library; library().ysnake_step"
    paths = os.pathsep.join(sys.path)
    both = [
        subprocess.Popen([sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": paths})
        for _ in range(2)
    ]
    assert [process.wait() for process in both] == [0, 0]
    assert not build.would_compile()
    assert [path.suffix for path in Path(empty_cache, "ysnake", "native").iterdir()] == [".so"]


@pytest.mark.parametrize("mode", [0o777, 0o700], ids=["others may write it", "it is damaged"])
def test_a_file_that_is_not_ours_or_damaged_is_replaced(empty_cache, mode):
    planted = build._path()
    planted.parent.mkdir(parents=True)
    planted.parent.chmod(mode)
    planted.write_bytes(b"not a library")
    planted.chmod(mode)
    assert build.would_compile() is (mode == 0o777)
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
    which = "product or rounds or zero or many or packed or own or rows or near"
    environment = {
        **os.environ,
        **{"LD_PRELOAD": " ".join(preload), "ASAN_OPTIONS": "detect_leaks=0"},
        **{"XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)},
    }
    command = [sys.executable, "-c", SANITIZED, *map(str, files), "-k", which]
    assert subprocess.run(command, env=environment).returncode == 0
