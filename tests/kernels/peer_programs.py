"""Short training runs by Trainer, PEFT and TRL, with the drop-in or without.

transformers chooses its operators when a model is imported, so each way has a process of its own:
`python peer_programs.py PROGRAM FAMILY plain|drop-in FILE` writes the losses and gradients to FILE.
"""

import sys
import tempfile

import torch

from benchmarks.families import VOCABULARY, random_model
from benchmarks.family_runs import gradients, random_ids

STEPS = {"trainer": 4, "sft": 20}


def arguments(program: str, folder: str) -> dict[str, object]:
    """Options of Trainer and SFTTrainer: a short run on a CPU that logs the loss of every step."""
    return {
        "output_dir": folder,
        "max_steps": STEPS[program],
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
    }


def losses(trainer) -> dict[str, torch.Tensor]:
    trainer.train()
    logged = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    return {"losses": torch.tensor(logged)}


def trainer(family: str, folder: str) -> dict[str, torch.Tensor]:
    """The losses of a run by transformers' Trainer."""
    from transformers import Trainer, TrainingArguments

    rows = [{"input_ids": row, "labels": row} for row in random_ids(8)]
    options = TrainingArguments(**arguments("trainer", folder))
    return losses(Trainer(random_model(family), options, train_dataset=rows))


def sft(family: str, folder: str) -> dict[str, torch.Tensor]:
    """The losses of a run by TRL's SFTTrainer, on texts of different lengths."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    words = Tokenizer(models.WordLevel({str(i): i for i in range(VOCABULARY)}, unk_token="0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="1", pad_token="0")
    texts = [" ".join(map(str, row[i:].tolist())) for i, row in enumerate(random_ids(8))]
    options = SFTConfig(**arguments("sft", folder), max_length=24, bf16=False)
    data = Dataset.from_dict({"text": texts})
    model = random_model(family)
    return losses(SFTTrainer(model, options, train_dataset=data, processing_class=tokenizer))


def lora(family: str, folder: str) -> dict[str, torch.Tensor]:
    """Loss and gradients of a step with PEFT's LoRA on every linear layer that it allows."""
    from peft import LoraConfig, get_peft_model

    refused = ["out_proj"] if family == "mamba2" else []  # by PEFT, for Mamba2 alone
    options = {"target_modules": "all-linear", "exclude_modules": refused}
    config = LoraConfig(r=2, init_lora_weights=False, **options)
    model, ids = random_model(family), random_ids()
    torch.manual_seed(1)
    model = get_peft_model(model, config).train()
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    found = gradients(model)
    adapters = {name for name, p in model.named_parameters() if p.requires_grad}
    assert adapters == set(found), f"no gradient: {adapters - set(found)}"
    return {"loss": loss.detach(), **found}


def main(program: str, family: str, way: str, file: str) -> None:
    torch.set_num_threads(1)
    if way == "drop-in":
        import ysnake_kernels.dropin

        ysnake_kernels.dropin.install()
    with tempfile.TemporaryDirectory() as folder:
        torch.save({"trainer": trainer, "sft": sft, "lora": lora}[program](family, folder), file)


if __name__ == "__main__":
    main(*sys.argv[1:])
