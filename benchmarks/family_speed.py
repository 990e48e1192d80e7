"""How much faster the drop-in makes models of transformers: `python -m benchmarks.family_speed`.

Each model has a small vocabulary and a few layers of the original sizes. Where the kinds of layers
differ, they stand in about the same proportion as in the original. transformers chooses its
operators when a model is imported. So each way runs in a process of its own. The two processes take
turns. The processor time of a run is measured, since other programs affect it less.

The table has two ratios for each mode: of the whole time, and of the time outside the products of
linear layers, which no drop-in changes. A ratio above 1 means that the drop-in is faster.
"""

import argparse
import statistics
import subprocess
import sys
import time

import torch
from torch.profiler import ProfilerActivity, profile

WAYS = ("plain", "drop-in")
MODES = ("prefill", "step", "training")
LINEAR = ("aten::mm", "aten::addmm")  # what linear layers call, and few others
LENGTHS = {torch.float32: 256, torch.bfloat16: 64}  # many CPUs are slow in bfloat16
COMMON = {"num_hidden_layers": 2, "vocab_size": 512, "pad_token_id": 0, "bos_token_id": 0}
HEADS = {"num_attention_heads": 16, "num_key_value_heads": 4}
MAMBA_2 = {"mamba_d_state": 128, "mamba_d_head": 64, "mamba_n_groups": 1}
# model -> class of its configuration, and its sizes
MODELS = {
    "Mamba2-1.3B": ("Mamba2", {"hidden_size": 2048, "num_heads": 64, "n_groups": 1}),
    "Granite-4.0-h-1b": (
        "GraniteMoeHybrid",
        {
            **MAMBA_2,
            **HEADS,
            "hidden_size": 1536,
            "mamba_n_heads": 48,
            "shared_intermediate_size": 4096,
            "num_local_experts": 0,
            "num_hidden_layers": 10,
            "layer_types": [*["mamba"] * 9, "attention"],
        },
    ),
    "Falcon-H1-0.5B": (
        "FalconH1",
        {
            **MAMBA_2,
            "hidden_size": 1024,
            "intermediate_size": 2048,
            "mamba_d_ssm": 1536,
            "mamba_n_heads": 24,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
        },
    ),
    "Nemotron-H-4B": (
        "NemotronH",
        {
            **HEADS,
            "hidden_size": 3072,
            "intermediate_size": 12288,
            "layers_block_type": [*["mamba", "mlp"] * 2, "attention"],
            "mamba_num_heads": 112,
            "mamba_head_dim": 64,
            "ssm_state_size": 128,
            "n_groups": 8,
        },
    ),
    "LFM2-1.2B": (
        "Lfm2",
        {
            "hidden_size": 2048,
            "intermediate_size": 12288,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "num_hidden_layers": 5,
            "layer_types": ["conv", "conv", "full_attention", "conv", "full_attention"],
        },
    ),
    "Qwen3.5-2B": (
        "Qwen3_5Text",
        {
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "linear_num_key_heads": 16,
            "linear_num_value_heads": 16,
            "num_hidden_layers": 4,
            "layer_types": [*["linear_attention"] * 3, "full_attention"],
        },
    ),
    "Mamba-130m": ("Mamba", {"hidden_size": 768}),
    "FalconMamba-7B": ("FalconMamba", {"hidden_size": 4096, "intermediate_size": 8192}),
}


def build(name: str, dtype: torch.dtype) -> torch.nn.Module:
    """The model with random weights."""
    import transformers

    prefix, sizes = MODELS[name]
    config = getattr(transformers, f"{prefix}Config")(**COMMON | sizes)
    torch.manual_seed(0)
    kind = getattr(transformers, f"{prefix.removesuffix('Text')}ForCausalLM")
    return kind(config).to(dtype)


class Runs:
    """The runs of one model that are timed."""

    def __init__(self, name: str, dtype: torch.dtype, length: int):
        self.model = build(name, dtype)
        self.ids = torch.randint(1, 512, (1, length), generator=torch.Generator().manual_seed(1))
        self.cache: dict[str, object] = {}
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.0)

    def time(self, mode: str) -> float:
        """The processor time of a run, in seconds."""
        start = time.process_time()
        getattr(self, mode)()
        return time.process_time() - start

    def outside(self, mode: str) -> float:
        """The time of a run outside its linear layers, in seconds, as torch's profiler counts."""
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            getattr(self, mode)()
        events = profiled.key_averages()
        return sum(e.self_cpu_time_total for e in events if e.key not in LINEAR) / 1e6

    @torch.no_grad()
    def prefill(self) -> None:
        out = self.model.eval()(self.ids, use_cache=True, logits_to_keep=1)
        self.cache = {k: out[k] for k in ("cache_params", "past_key_values") if k in out}

    @torch.no_grad()
    def step(self, tokens: int = 8) -> None:
        if not self.cache:
            self.prefill()
        for _ in range(tokens):
            self.model.eval()(self.ids[:, :1], use_cache=True, **self.cache)

    def training(self) -> None:
        self.model.train()(self.ids, labels=self.ids, use_cache=False).loss.backward()
        self.optimizer.step()  # the drop-in sets the allocator after a first step
        self.optimizer.zero_grad()


def worker(way: str) -> None:
    """Read lines `model dtype length`, `mode` and `outside mode`. Answer each with a time."""
    if way == "drop-in":
        import ysnake_kernels.dropin

        ysnake_kernels.dropin.install()
    import transformers

    transformers.logging.set_verbosity_error()
    runs = None
    for line in sys.stdin:
        answer = 0.0
        match line.split():
            case [name, dtype, length]:
                runs = None  # free its memory before the next model is built
                runs = Runs(name, getattr(torch, dtype), int(length))
            case ["outside", mode]:
                answer = runs.outside(mode)
            case [mode]:
                answer = runs.time(mode)
        print(answer, flush=True)


class Worker:
    """A process that runs `worker`."""

    def __init__(self, way: str):
        command = [sys.executable, "-m", "benchmarks.family_speed", "--worker", way]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, **pipes)

    def ask(self, line: str) -> float:
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"family_speed: a worker ended at {line!r}")
        return float(answer)

    def end(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def compared(workers: list[Worker], mode: str, repeat: int) -> str:
    """Two ratios, without / with the drop-in: of the time of a mode, and outside linear layers."""
    found = []
    for question in (mode, f"outside {mode}"):
        times = [[worker.ask(question) for worker in workers] for _ in range(repeat + 1)][1:]
        plain, ours = (statistics.median(way) for way in zip(*times, strict=True))
        found.append(plain / ours)
    return "{:.2f}, {:.1f}".format(*found)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--modes", nargs="*", default=list(MODES), choices=list(MODES))
    dtypes = {str(d).removeprefix("torch."): length for d, length in LENGTHS.items()}
    parser.add_argument("--dtypes", nargs="*", default=list(dtypes), choices=list(dtypes))
    parser.add_argument("--length", type=int, help="tokens of the prompt and of a training step")
    parser.add_argument("--repeat", type=int, default=5, help="runs whose median counts")
    parser.add_argument("--worker", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options.worker)
        return 0
    workers = [Worker(way) for way in WAYS]
    print(f"| model | dtype | tokens | {' | '.join(options.modes)} |")
    print("| --- " * (3 + len(options.modes)) + "|")
    for name in options.models:
        for dtype in options.dtypes:
            length = options.length or dtypes[dtype]
            for each in workers:
                each.ask(f"{name} {dtype} {length}")
            cells = [compared(workers, mode, options.repeat) for mode in options.modes]
            print(f"| {name} | {dtype} | {length} | {' | '.join(cells)} |", flush=True)
    for each in workers:
        each.end()
    return 0


if __name__ == "__main__":
    sys.exit(main())
