"""Programs that people run give the same with the drop-in: Trainer, PEFT, TRL, lm_eval, joblib.

Each is skipped where its package is missing; `pip install -e '.[peers]'` brings them all.
"""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from benchmarks.families import random_model
from benchmarks.family_runs import difference

ROOT = Path(__file__).parents[2]
PATHS = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
if find_spec("mamba_ssm") or find_spec("causal_conv1d"):
    pytest.skip("the real mamba_ssm or causal_conv1d is installed", allow_module_level=True)


def needs(*packages: str) -> None:
    for package in packages:
        pytest.importorskip(package, reason="pip install -e '.[peers]' has it")


def environment(**variables: str) -> dict[str, str]:
    """Without the network, and with no program reporting to anybody."""
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "WANDB_DISABLED": "true"}
    return {k: v for k, v in os.environ.items() if k != "YSNAKE_DROPIN"} | offline | variables


def both_ways(program: str, family: str, folder: Path) -> list[dict[str, torch.Tensor]]:
    """What a program of `peer_programs` gives without and with the drop-in, run side by side."""
    ways = ("plain", "drop-in")
    variables = environment(PYTHONPATH=PATHS, HF_HOME=str(folder))
    command = [sys.executable, Path(__file__).with_name("peer_programs.py"), program, family]
    running = [
        subprocess.Popen(
            [*command, way, folder / way], env=variables, stderr=subprocess.PIPE, text=True
        )
        for way in ways
    ]
    for process in running:
        _, errors = process.communicate()
        assert process.returncode == 0, errors
    return [torch.load(folder / way) for way in ways]


@pytest.mark.parametrize("family", ["mamba2", pytest.param("bamba", marks=pytest.mark.slow)])
def test_trainer_has_the_same_losses(family, tmp_path):
    needs("transformers", "accelerate")
    plain, ours = both_ways("trainer", family, tmp_path)
    assert len(plain["losses"]) == 4
    assert plain["losses"][-1] != plain["losses"][0]
    assert difference(plain, ours) is None


@pytest.mark.parametrize(
    ("family", "layers"),
    [
        pytest.param("mamba2", ["in_proj"], marks=pytest.mark.slow),
        ("bamba", ["in_proj", "out_proj", "q_proj"]),
    ],
)
def test_every_adapter_of_peft_learns_the_same(family, layers, tmp_path):
    needs("transformers", "peft")
    plain, ours = both_ways("lora", family, tmp_path)
    for layer in layers:
        of_layer = [g for name, g in ours.items() if layer in name]
        assert len(of_layer) >= 2, f"no adapter on {layer}"
        assert all(gradient.any() for gradient in of_layer)
    assert difference(plain, ours) is None


@pytest.mark.slow
def test_twenty_steps_of_trl_have_the_same_losses(tmp_path):
    needs("transformers", "trl", "datasets")
    plain, ours = both_ways("sft", "mamba2", tmp_path)
    assert len(plain["losses"]) == 20
    assert plain["losses"][-1] < plain["losses"][0]
    assert difference(plain, ours) is None


TASK = """
task: snakes
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
LM_EVAL = """
import runpy, site, sys
site.addsitedir({site_packages!r})
sys.argv[:] = ["lm_eval", *{arguments!r}]
try:
    runpy.run_module("lm_eval", run_name="__main__", alter_sys=True)
finally:
    from transformers.models.{family} import modeling_{family} as modeling
    found = [c.cell_contents for c in modeling.causal_conv1d_fn.__closure__]
    print("operators:", sorted({{str(getattr(f, "__module__", "")) for f in found}}))
"""


def lm_eval(folder: Path, packages: Path, family: str, **variables: str) -> list:
    """What lm_eval, unedited, logs of every question of a local task about a tiny checkpoint."""
    arguments = ["--model", "hf", "--model_args", f"pretrained={folder / 'model'},dtype=float32"]
    arguments += ["--tasks", "snakes", "--include_path", str(folder), "--device", "cpu"]
    arguments += ["--batch_size", "4", "--output_path", str(folder / "out"), "--log_samples"]
    code = LM_EVAL.format(site_packages=str(packages), arguments=arguments, family=family)
    variables |= {"HF_HOME": str(folder)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, env=environment(**variables), cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert ("ysnake_kernels" in done.stdout.splitlines()[-1]) == ("YSNAKE_DROPIN" in variables)
    (log,) = (folder / "out").rglob("samples_snakes_*.jsonl")
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    log.unlink()
    return [[float(resp[0][0]) for resp in line["resps"]] for line in lines]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mamba2", "bamba"])
def test_lm_eval_measures_the_same_by_the_environment_variable(tmp_path, site_packages, family):
    needs("transformers", "lm_eval", "datasets")
    from small import saved

    folder = saved(tmp_path)
    if family != "mamba2":  # a hybrid with the same tokenizer
        hybrid = random_model(family)
        hybrid.resize_token_embeddings(
            json.loads((folder / "config.json").read_text())["vocab_size"]
        )
        hybrid.save_pretrained(folder)
    questions = [
        {"question": f"The boa number {i}", "choices": [" sleeps", " wakes long"], "answer": i % 2}
        for i in range(6)
    ]
    data = tmp_path / "snakes.jsonl"
    data.write_text("\n".join(map(json.dumps, questions)), encoding="utf-8")
    (tmp_path / "snakes.yaml").write_text(TASK.format(data=data), encoding="utf-8")
    plain = lm_eval(tmp_path, site_packages, family)
    ours = lm_eval(tmp_path, site_packages, family, YSNAKE_DROPIN="1")
    assert len(plain) == 6
    assert plain[0][0] != plain[0][1]
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(plain), rtol=1e-4, atol=1e-4)


def test_joblib_and_pickle_work_beside_an_installed_drop_in():
    """Both look through all modules to find out where a function comes from."""
    needs("joblib", "scipy")
    code = """
import pickle
import joblib, scipy.special
expected = joblib.hash(scipy.special.expit)
import ysnake_kernels.dropin
ysnake_kernels.dropin.install()
import mamba_ssm, causal_conv1d
assert joblib.hash(scipy.special.expit) == expected
assert pickle.loads(pickle.dumps(scipy.special.expit)) is scipy.special.expit
assert joblib.hash(mamba_ssm.selective_state_update)
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, env=environment(PYTHONPATH=PATHS), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
