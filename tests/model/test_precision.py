"""`--precision bfloat16` on a CPU: products with rounded factors, and torch's setting restored."""

import json

import pytest
import torch
from small import TINY, corpus
from test_train import metrics

from ysnake import train
from ysnake.shared.processor import bfloat16_products
from ysnake.training import precision, step


@pytest.fixture
def options(tmp_path):
    steps = ["--max-steps", "3", "--eval-every", "2", "--vocab-size", "300", "--threads", "1"]
    return [*TINY, *steps, "--data", str(corpus(tmp_path))]


def test_products_are_rounded_while_training_only(tmp_path, options, monkeypatch, capsys):
    real, during = step.batch_loss, []

    def noting(*arguments):
        during.append(torch.get_float32_matmul_precision())
        return real(*arguments)

    monkeypatch.setattr(step, "batch_loss", noting)
    runs = {}
    for name in ("float32", "bfloat16"):
        run = runs[name] = tmp_path / name
        assert train.main([*options, "--precision", name, "--run", str(run)]) == 0
        assert set(during) == {"highest" if name == "float32" else "medium"}
        assert torch.get_float32_matmul_precision() == "highest"
        during.clear()
    warned = "this CPU has no products in 16 bits" in " ".join(capsys.readouterr().out.split())
    assert warned is not bool(bfloat16_products())
    exact, rounded = ([line["train_loss"] for line in metrics(run)] for run in runs.values())
    assert rounded == pytest.approx(exact, rel=0.01)


def test_an_error_restores_the_setting(tmp_path, options, monkeypatch):
    def fail(*_):
        raise KeyError("a fault")

    monkeypatch.setattr(step, "batch_loss", fail)
    with pytest.raises(KeyError):
        train.main([*options, "--precision", "bfloat16", "--run", str(tmp_path / "run")])
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize(
    ("products", "gain", "stored"),
    [(["amx_bf16"], 2.0, "bfloat16"), (["amx_bf16"], 1.1, "auto"), ([], 2.0, "auto")],
)
def test_auto_takes_16_bits_where_they_are_faster(
    tmp_path, options, monkeypatch, capsys, products, gain, stored
):
    monkeypatch.setattr(precision, "bfloat16_products", lambda: products)
    monkeypatch.setattr(precision, "gain_of_16_bits", lambda: gain)
    run = tmp_path / "run"
    assert train.main([*options, "--run", str(run)]) == 0
    assert json.loads((run / "settings.json").read_text())["precision"] == stored
    said = " ".join(capsys.readouterr().out.split())
    assert ("2.0 times as fast here" in said) is (stored == "bfloat16")
    if stored == "auto":
        return
    # the run keeps it, also where another CPU would choose otherwise
    monkeypatch.setattr(precision, "bfloat16_products", list)
    assert train.main(["--resume", "--run", str(run), "--max-steps", "4"]) == 0
    assert json.loads((run / "settings.json").read_text())["precision"] == stored
    assert "no products in 16 bits" in " ".join(capsys.readouterr().out.split())


def test_the_measurement_restores_the_setting():
    assert precision.gain_of_16_bits() > 0
    assert torch.get_float32_matmul_precision() == "highest"
