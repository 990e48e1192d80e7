"""Models of transformers are the same with the drop-in: every family that looks for the operators.

`benchmarks.family_runs` runs them, `benchmarks.families` has their sizes.
"""

from importlib.util import find_spec

import pytest
import torch

from benchmarks import family_runs
from benchmarks.families import FAMILIES, VARIANTS, families_that_ask

pytest.importorskip("transformers", reason="pip install -e '.[test]' has it")
if find_spec("mamba_ssm") or find_spec("causal_conv1d"):
    pytest.skip("the real mamba_ssm or causal_conv1d is installed", allow_module_level=True)

NAMES = [*(name for name in FAMILIES if name in families_that_ask()), *VARIANTS]
MODES = ["logits", "tokens", "training", "padded", "packed", "adapted"]
MAMBA_2 = ["mamba2", "bamba", "falcon_h1", "granitemoehybrid", "nemotron_h", "zamba2"]
MAMBA_1 = ["mamba", "falcon_mamba", "jamba", "zamba"]
FALLING_BACK = "is falling back to its reference PyTorch implementation"


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:  # its processes find no compiled code
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        return family_runs.run(["plain", "drop-in"], NAMES, MODES)


def test_every_family_that_asks_has_a_model():
    assert set(families_that_ask()) <= set(FAMILIES)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", NAMES)
def test_a_model_is_the_same_with_the_drop_in(results, name, mode):
    right, word = family_runs.verdict(name, mode, *results)
    assert right, word
    if name in MAMBA_2 and mode == "packed":
        assert word == "only with it"
    elif mode != "packed":
        assert word == "same"


@pytest.mark.parametrize("name", NAMES)
def test_models_give_something_to_compare(results, name):
    plain = results[0]
    assert len(plain[name, "tokens"]["tokens"][:, 11:].unique()) > 3
    assert len(plain[name, "training"]) > 10
    up = [g for n, g in plain[name, "adapted"].items() if "out_proj.up" in n]
    assert all(gradient.any() for gradient in up)


@pytest.mark.parametrize("name", [*MAMBA_1, *MAMBA_2])
def test_mamba_gets_all_its_operators(results, name):
    plain, ours = results
    assert sum(FALLING_BACK in line for line in plain[name, None]) >= 4
    assert not [line for line in ours[name, None] if FALLING_BACK in line]


def test_what_our_convolution_cannot_do_is_said_once(results):
    ours = results[1]
    said = [line for key, lines in ours.items() if key[1] is None for line in lines]
    said = [line for line in said if line.startswith("ysnake_kernels.dropin")]
    assert len(said) == 1
    assert "width 1" in said[0]


def test_packed_documents_are_refused_where_the_scan_would_mix_them(results):
    for name in ("zamba", "kimi_linear", "qwen3_next"):
        line = results[1][name, "packed"]
        assert line.startswith("refused: seq_idx: the scan of transformers.models."), line


@pytest.fixture(scope="module")
def fused(results):
    names = [*MAMBA_2, "mamba2, gelu", "mamba2, width 1"]
    return results[0], *family_runs.run(["fused"], names, ["training", "packed"])


@pytest.mark.parametrize("name", MAMBA_2)
def test_the_fused_mixer_trains_the_same_where_it_may_be_used(fused, name):
    for mode in ("training", "packed"):
        right, word = family_runs.verdict(name, mode, *fused)
        assert right, word


@pytest.mark.parametrize("name", ["mamba2, gelu", "mamba2, width 1"])
def test_the_fused_mixer_stands_back_where_it_cannot(fused, name):
    right, word = family_runs.verdict(name, "training", *fused)
    assert right, word
    assert any(line.startswith("ysnake_kernels.dropin") for line in fused[1][name, None])


@pytest.mark.slow
def test_a_compiled_model_is_the_same():
    results = family_runs.run(["plain", "drop-in"], ["mamba2"], ["compiled"])
    assert family_runs.verdict("mamba2", "compiled", *results) == (True, "same")


@pytest.mark.slow
def test_every_family_compiled():
    plain, ours = family_runs.run(["plain", "drop-in"], NAMES, ["compiled"])
    good, text = family_runs.table(NAMES, ["compiled"], plain, ours)
    assert good, text


def test_a_difference_is_found():
    a = {"logits": torch.ones(3), "tokens": torch.arange(3)}
    assert family_runs.difference(a, dict(a)) is None
    assert "off by" in family_runs.difference(a, {**a, "logits": torch.tensor([1, 1, 1.01])})
    assert "off by nan" in family_runs.difference(a, {**a, "logits": torch.full((3,), torch.nan)})
    assert "other values" in family_runs.difference(a, {**a, "tokens": torch.tensor([0, 1, 1])})
    assert "other results" in family_runs.difference(a, {"logits": a["logits"]})
    assert "with: fails" in family_runs.difference(a, "fails: it")
