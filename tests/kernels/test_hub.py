"""The folder for the `kernels` package: its layers fit transformers' functions and serve models."""

import inspect
import json
from importlib import import_module

import pytest
import torch
from ysnake_kernels.dropin import hub_layers

from benchmarks import families

pytest.importorskip("transformers", reason="pip install -e '.[test]' has it")


def kinds(function):
    parameters = inspect.signature(function).parameters.values()
    return [(p.name, p.kind, p.default) for p in parameters if p.name != "self"]


@pytest.mark.parametrize("family", families.FAMILIES)
def test_layers_have_the_arguments_of_the_functions_that_they_replace(family):
    model = import_module(f"transformers.models.{family}.modeling_{family}")
    theirs = {
        "causal_conv1d_fn": "causal_conv1d_fn",
        "causal_conv1d_update": "causal_conv1d_update",
        "mamba_chunk_scan_combined": "mamba2_chunk_scan",
        "selective_scan_fn": "mamba_selective_scan",
        "selective_state_update": "mamba2_selective_state_update",
    }
    assert set(theirs) == set(hub_layers.NAMES)
    for name, function in theirs.items():
        if hasattr(model, function):
            layer = getattr(hub_layers, name)
            replaced = getattr(model, function)
            replaced = getattr(type(replaced), "forward", replaced)  # the package makes it a module
            assert kinds(layer.forward) == kinds(replaced), name


@pytest.mark.parametrize("backend", ["cpu", "cuda"])
def test_a_variant_says_what_it_is_and_has_the_layers(backend):
    folder = hub_layers.FOLDER / "build" / f"torch-{backend}"
    metadata = json.loads((folder / "metadata.json").read_text("utf-8"))
    assert metadata["backend"] == {"type": backend}
    found: dict = {}
    exec((folder / "__init__.py").read_text("utf-8"), found)
    assert found["layers"] is hub_layers


@pytest.mark.parametrize("family", ["mamba2", "lfm2", "mamba"])
def test_models_use_them_and_compute_the_same(family):
    from transformers.utils import is_kernels_available

    if not is_kernels_available():
        pytest.skip("transformers finds no version of kernels that it takes")
    import kernels

    def results(use_kernels: bool) -> list[torch.Tensor]:
        model, ids = families.random_model(family), torch.arange(1, 30)[None]
        out = []
        for mode in (True, False):
            model.train(mode)
            if use_kernels:
                model.set_use_kernels(True)
                layers = [m for m in model.modules() if hasattr(m, "_kernel_funcs")]
                used = layers[0]._kernel_funcs["causal_conv1d_fn"].forward
                assert used.__func__ is hub_layers.causal_conv1d_fn.forward
            out.append(model(ids, use_cache=False).logits)
        with torch.no_grad():
            out.append(model.generate(ids[:, :9], max_new_tokens=6, do_sample=False))
        return out

    plain = results(False)
    kernels.register_kernel_mapping(hub_layers.mapping())
    for ours, expected in zip(results(True), plain, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def test_packed_documents_are_refused():
    layer = hub_layers.causal_conv1d_fn()
    with pytest.raises(ValueError, match="seq_idx: packed documents need"):
        layer(torch.ones(1, 2, 3), torch.ones(2, 4), seq_idx=torch.zeros(1, 3))
