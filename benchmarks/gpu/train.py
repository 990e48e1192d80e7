"""Stage `train`: whole training steps of each contestant: forward, backward and AdamW.

transformers looks for mamba_ssm when it is imported. So each contestant runs in a process of its
own. They start together and use the card one after another.
"""

import statistics
import time
from collections.abc import Callable

import torch

from benchmarks.gpu.common import PEAK, Options, captured, card_alone, reason

SIZES = {
    "130m": {"vocab_size": 50288, "d_model": 768, "n_layers": 24, "d_state": 128},
    "ys-24m": {"vocab_size": 13184, "d_model": 512, "n_layers": 10, "d_state": 128},
    "dry": {"vocab_size": 64, "d_model": 32, "n_layers": 2, "d_state": 16, "head_dim": 16},
}
BATCHES = {"130m": [(8, 4096)], "ys-24m": [(16, 256), (128, 256)], "dry": [(2, 16)]}


def run(job: str, options: Options) -> None:
    size, _, name = job.partition(": ")
    shown = size
    if options.dry:
        size = "dry"
    model, loss_of = contestant(name, SIZES[size], options)
    with card_alone():
        model = model.to(options.device)
        for batch, length in BATCHES[size]:
            row = {"model": shown, "by": name, "batch": batch, "length": length}
            try:
                row |= measure(model, loss_of, batch, length, name.endswith("graph"), options)
            except Exception as error:
                options.write("train", **row, failed=reason(error))
                raise
            row["tokens per second"] = batch * length / row["seconds"]
            row["flops"] = flops_of_a_token(SIZES[size]) * row["tokens per second"]
            options.write("train", **row, utilisation=row["flops"] / PEAK)


def contestant(name: str, sizes: dict, options: Options) -> tuple[torch.nn.Module, Callable]:
    """A model on the CPU, in training mode, and its loss as a function of model, ids, targets.

    A process can have one contestant only, since this may install the drop-in.
    """
    if name == "transformers, mamba_ssm":
        from benchmarks.gpu import peers

        peers.make_importable(options)
        import causal_conv1d  # noqa: F401  (transformers uses mamba_ssm only together with it)
        import mamba_ssm  # noqa: F401
    elif name == "transformers, drop-in":
        from ysnake_kernels import dropin

        dropin.install(force=True, fused_training=True)
    torch.manual_seed(0)
    build = transformers if name.startswith("transformers") else ours
    model, loss_of = build(sizes)
    return model.train(), loss_of


def ours(sizes: dict) -> tuple[torch.nn.Module, Callable]:
    from ysnake.model import Model
    from ysnake.model.config import ModelConfig

    model = Model(ModelConfig(**sizes))
    return model, lambda model, ids, targets: model.loss(ids, targets) / targets.numel()


def transformers(sizes: dict) -> tuple[torch.nn.Module, Callable]:
    from transformers import Mamba2Config, Mamba2ForCausalLM

    head = sizes.get("head_dim", 64)
    config = Mamba2Config(
        vocab_size=sizes["vocab_size"],
        hidden_size=sizes["d_model"],
        num_hidden_layers=sizes["n_layers"],
        state_size=sizes["d_state"],
        head_dim=head,
        num_heads=2 * sizes["d_model"] // head,
        expand=2,
        n_groups=1,
        tie_word_embeddings=True,
    )
    model = Mamba2ForCausalLM(config)
    return model, lambda model, ids, targets: model(ids, labels=ids, use_cache=False).loss


def step_of(
    model: torch.nn.Module,
    loss_of: Callable,
    batch: int,
    length: int,
    capturable: bool,
    options: Options,
) -> tuple[Callable[[], None], list[torch.Tensor]]:
    """A training step, and a list that then holds its loss. Moves the model to the device."""
    device = options.device
    model.to(device)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True,
        capturable=capturable,
    )  # fmt: skip
    vocabulary = model.get_input_embeddings if hasattr(model, "get_input_embeddings") else None
    rows = (vocabulary() if vocabulary else model.backbone.embeddings).weight.shape[0]
    ids = torch.randint(rows, (batch, length + 1), device=device)
    ids, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    found: list[torch.Tensor] = []

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, torch.bfloat16):
            loss = loss_of(model, ids, targets)
        loss.backward()
        optimizer.step()
        found[:] = [loss.detach()]

    return step, found


def measure(
    model: torch.nn.Module,
    loss_of: Callable,
    batch: int,
    length: int,
    graph: bool,
    options: Options,
) -> dict:
    """Seconds of a step, the first and the last loss, and the peak memory."""
    step, found = step_of(model, loss_of, batch, length, graph, options)
    step()
    first = found[0].item()
    if options.dry:
        start = time.perf_counter()
        step()
        return {"seconds": time.perf_counter() - start, "first loss": first}
    if graph:
        step = captured(step, warm_up=3).replay
    else:
        step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    times = []
    began = time.monotonic()
    while len(times) < 5 or (len(times) < 50 and time.monotonic() - began < 1.5):
        start = time.perf_counter()
        step()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    row = {"seconds": statistics.median(times), "steps": len(times), "first loss": first}
    return row | {"loss": found[0].item(), "peak": torch.cuda.max_memory_allocated()}


def flops_of_a_token(sizes: dict) -> float:
    """Operations per token of a training step: 6 for each matrix weight, and 3 recurrences."""
    d, layers, n = sizes["d_model"], sizes["n_layers"], sizes["d_state"]
    heads = 2 * d // sizes.get("head_dim", 64)
    weights = layers * (d * (4 * d + 2 * n + heads) + 2 * d * d) + d * sizes["vocab_size"]
    return 6 * weights + 3 * layers * 4 * 2 * d * n
