"""`--precision bfloat16` on a CPU: products with rounded factors, and torch's setting restored."""

import json
import threading

import pytest
import torch
from small import TINY, corpus, model
from test_train import metrics

from ysnake import train
from ysnake.inference import decoding
from ysnake.inference.decoding import Decoder
from ysnake.model.config import ModelConfig
from ysnake.shared import processor
from ysnake.shared.processor import bfloat16_products
from ysnake.training import precision, speed, step
from ysnake.training.options import Settings


def setting():
    return torch.backends.mkldnn.matmul.fp32_precision


@pytest.fixture
def options(tmp_path):
    steps = ["--max-steps", "3", "--eval-every", "2", "--vocab-size", "300", "--threads", "1"]
    return [*TINY, *steps, "--data", str(corpus(tmp_path))]


def test_products_are_rounded_while_training_only(tmp_path, options, monkeypatch, capsys):
    real, during, before = step.batch_loss, [], setting()

    def noting(*arguments):
        during.append(setting())
        return real(*arguments)

    monkeypatch.setattr(step, "batch_loss", noting)
    runs = {}
    for name in ("float32", "bfloat16"):
        run = runs[name] = tmp_path / name
        assert train.main([*options, "--precision", name, "--run", str(run)]) == 0
        assert set(during) == {before if name == "float32" else "bf16"}
        assert setting() == before
        during.clear()
    warned = "this CPU has no products in 16 bits" in " ".join(capsys.readouterr().out.split())
    assert warned is not bool(bfloat16_products())
    exact, rounded = ([line["train_loss"] for line in metrics(run)] for run in runs.values())
    assert rounded == pytest.approx(exact, rel=0.01)


def test_an_error_restores_the_setting(tmp_path, options, monkeypatch):
    def fail(*_):
        raise KeyError("a fault")

    monkeypatch.setattr(step, "batch_loss", fail)
    before = setting()
    with pytest.raises(KeyError):
        train.main([*options, "--precision", "bfloat16", "--run", str(tmp_path / "run")])
    assert setting() == before


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


@pytest.mark.parametrize(("gain", "expected"), [(2.0, "bf16"), (1.1, None)])
def test_the_speed_is_measured_as_the_run_will_train(monkeypatch, gain, expected):
    """Otherwise --plan and --size auto expect too little where 16-bit products are fast."""
    monkeypatch.setattr(precision, "bfloat16_products", lambda: ["amx_bf16"])
    monkeypatch.setattr(precision, "gain_of_16_bits", lambda: gain)
    monkeypatch.setattr(speed, "MEASURED_SECONDS", 0.0)
    real, during = step.batch_loss, []

    def noting(*arguments):
        during.append(setting())
        return real(*arguments)

    monkeypatch.setattr(step, "batch_loss", noting)
    config = ModelConfig(vocab_size=64, d_model=16, n_layers=1, d_state=8, head_dim=8)
    assert speed.measure(Settings(seq_len=8, batch_size=2, max_steps=9), config) > 0
    assert set(during) == {expected or setting()}


def test_the_measurement_restores_the_setting():
    before = setting()
    assert processor.gain_of_16_bits() > 0
    assert setting() == before


def test_the_last_of_several_threads_restores_the_setting():
    before = setting()
    inside, leave = threading.Event(), threading.Event()

    def stay():
        with processor.rounded_products():
            inside.set()
            leave.wait(60)

    thread = threading.Thread(target=stay)
    with processor.rounded_products():
        thread.start()
        assert inside.wait(60)
    assert setting() == "bf16"
    leave.set()
    thread.join()
    assert setting() == before


@pytest.mark.parametrize(
    ("weights", "faster", "rounded"),
    [("float32", True, False), ("int8", True, True), ("int8", False, False)],
)
def test_reading_rounds_where_weights_are_rounded(monkeypatch, weights, faster, rounded):
    monkeypatch.setattr(decoding, "rounding_is_faster", lambda: faster)
    ids = torch.randint(0, 99, (1, 20), generator=torch.Generator().manual_seed(0))
    expected, _ = model().step(ids)
    decoder, during, before = Decoder(model(), weights), [], setting()
    decoder.model.backbone.register_forward_pre_hook(lambda *_: during.append(setting()))
    logits, _ = decoder.step(ids)
    assert during == ["bf16" if rounded else before]
    assert setting() == before
    assert torch.allclose(logits, expected, atol=0.05)
