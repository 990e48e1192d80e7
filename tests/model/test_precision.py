"""`--precision bfloat16` on a CPU: products with rounded factors, and torch's setting restored."""

import pytest
import torch
from small import TINY, corpus
from test_train import metrics

from ysnake import train
from ysnake.shared.processor import bfloat16_products
from ysnake.training import step


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
    for precision in ("float32", "bfloat16"):
        run = runs[precision] = tmp_path / precision
        assert train.main([*options, "--precision", precision, "--run", str(run)]) == 0
        assert set(during) == {"highest" if precision == "float32" else "medium"}
        assert torch.get_float32_matmul_precision() == "highest"
        during.clear()
    warned = "this CPU has no products in 16 bits" in " ".join(capsys.readouterr().out.split())
    assert warned is not bool(bfloat16_products())
    exact, rounded = ([line["train_loss"] for line in metrics(run)] for run in runs.values())
    assert rounded == pytest.approx(exact, rel=0.01 if bfloat16_products() else 0)


def test_an_error_restores_the_setting(tmp_path, options, monkeypatch):
    def fail(*_):
        raise KeyError("a fault")

    monkeypatch.setattr(step, "batch_loss", fail)
    with pytest.raises(KeyError):
        train.main([*options, "--precision", "bfloat16", "--run", str(tmp_path / "run")])
    assert torch.get_float32_matmul_precision() == "highest"
