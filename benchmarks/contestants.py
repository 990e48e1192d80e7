"""The contestants of `benchmarks.compare`. Each runs in a process of its own.

A function here prepares a contestant and returns a repetition: a call that does the work once. The
call returns tensors to compare with the others', or None. `python -m benchmarks.contestants JOB`
times one repetition for each line that it reads. So a contestant is idle while others have a turn.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

Repetition = Callable[[], Any]
STATUS = Path("/proc/self/status")


# The scan, forward and backward. The inputs are those of a layer of the model.


def scan_ysnake(**shape: int) -> Repetition:
    from ysnake_kernels import ssd_scan
    from ysnake_kernels.allocator import keep_freed_memory

    keep_freed_memory()  # as ysnake.train and the drop-in do
    return _scan(ssd_scan, {}, **shape)


def scan_transformers(chunk_size: int = 256, **shape: int) -> Repetition:
    from transformers.models.mamba2 import modeling_mamba2

    return _scan(modeling_mamba2.mamba2_chunk_scan, {"chunk_size": chunk_size}, **shape)


def _scan(
    scan: Callable, options: dict, batch: int, length: int, heads: int, head_dim: int, d_state: int
) -> Repetition:
    import torch

    torch.manual_seed(0)
    x, dy = torch.randn(2, batch, length, heads, head_dim)
    B, C = torch.randn(2, batch, length, 1, d_state)
    leaves = [x, torch.randn(batch, length, heads), -torch.arange(1.0, heads + 1), B, C]
    leaves += [torch.ones(heads), torch.linspace(-7, -2, heads)]
    leaves = [t.requires_grad_() for t in leaves]

    def call(length: int | None) -> list["Tensor"]:
        x, dt, A, B, C, D, dt_bias = leaves
        tokens = [t[:, :length] for t in (x, dt, B, C)]
        y = scan(*tokens[:2], A, *tokens[2:], D=D, dt_bias=dt_bias, dt_softplus=True, **options)
        return [y, *torch.autograd.grad(y, leaves, dy[:, :length])]

    call(8)  # so that memory of the libraries does not count as memory of the scan
    return lambda: call(None)


def scan_limit(batch: int, length: int, **shape: int) -> Repetition:
    return _in_turn(_scan_products(batch * length, **shape))


def _scan_products(tokens: int, heads: int, head_dim: int, d_state: int) -> list[Repetition]:
    """The products C B^T, (C B^T) x, C S and B^T x of every chunk of 64 tokens."""
    q, inner = min(64, tokens), heads * head_dim
    chunks = tokens // q
    return [
        _products(chunks, q, d_state, q),
        _products(chunks * heads, q, q, head_dim),
        _products(chunks, q, d_state, inner),
        _products(chunks, d_state, q, inner),
    ]


def _products(batch: int, rows: int, inner: int, columns: int) -> Repetition:
    """A matrix product and the two products of its gradients. They reuse their outputs."""
    import torch

    x, w = torch.randn(batch, rows, inner), torch.randn(batch, inner, columns)
    y, dx, dw = torch.randn(batch, rows, columns), torch.empty_like(x), torch.empty_like(w)
    multiply = torch.bmm
    if batch == 1:
        x, w, y, dx, dw = (t[0] for t in (x, w, y, dx, dw))
        multiply = torch.mm
    xt, wt, dy = x.transpose(-1, -2), w.transpose(-1, -2), torch.randn_like(y)

    def repetition() -> None:
        multiply(x, w, out=y)
        multiply(dy, wt, out=dx)
        multiply(xt, dy, out=dw)

    return repetition


def _in_turn(calls: list[Repetition]) -> Repetition:
    def repetition() -> None:
        for call in calls:
            call()

    return repetition


# A training step: forward and backward of the mean loss of the next token.


def step_ysnake(folder: str, sizes: dict, batch: int, length: int) -> Repetition:
    from ysnake_kernels.allocator import keep_freed_memory

    from ysnake.checkpoints import checkpoint
    from ysnake.model.config import IGNORED

    keep_freed_memory()  # as ysnake.train does
    model = checkpoint.load(saved(folder, sizes)).train()
    ids = _ids(batch, length, sizes)
    targets = ids.roll(-1, 1)
    targets[:, -1] = IGNORED
    count = batch * (length - 1)
    return _step(model, lambda: model.loss(ids, targets) / count)


def step_transformers(
    folder: str, sizes: dict, batch: int, length: int, dropin: bool = False
) -> Repetition:
    if dropin:
        import ysnake_kernels.dropin

        ysnake_kernels.dropin.install(fused_training=True)
    from transformers import Mamba2ForCausalLM

    model = Mamba2ForCausalLM.from_pretrained(folder).train()
    ids = _ids(batch, length, sizes)
    return _step(model, lambda: model(ids, labels=ids, use_cache=False).loss)


def step_gpt2(sizes: dict, batch: int, length: int) -> Repetition:
    model = gpt2(sizes, length).train()
    ids = _ids(batch, length, sizes)
    repetition = _step(model, lambda: model(ids, labels=ids, use_cache=False).loss)
    return lambda: repetition() and None  # another model: there is nothing to compare


def gpt2(sizes: dict, length: int, **more: int) -> Any:
    """GPT-2 with the same number and width of layers. Dropout is off, since it costs time."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        **{"vocab_size": sizes["vocab_size"], "n_positions": length, "n_embd": sizes["d_model"]},
        **{"n_layer": sizes["n_layers"], "n_head": max(1, sizes["d_model"] // 64)},
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
        **dict.fromkeys(("bos_token_id", "eos_token_id"), 0),
        **more,
    )
    return GPT2LMHeadModel(config)


def step_limit(sizes: dict, batch: int, length: int, onednn: bool = False) -> Repetition:
    """The products of all linear layers, of the head and of all scans. Layers share operands."""
    from ysnake.model.config import ModelConfig

    c, tokens = ModelConfig(**sizes), batch * length
    linear = _linear_products if onednn else partial(_products, 1)
    layer = [
        linear(tokens, c.d_model, c.d_inner + c.d_conv + c.n_heads),
        *_scan_products(tokens, c.n_heads, c.head_dim, c.d_state),
        linear(tokens, c.d_inner, c.d_model),
    ]
    return _in_turn(c.n_layers * layer + [linear(tokens, c.d_model, c.vocab_size)])


def _linear_products(rows: int, inner: int, columns: int) -> Repetition:
    """The products of `_products`, computed as linear layers of ysnake do. Two have new outputs."""
    import torch
    from ysnake_kernels.allocator import keep_freed_memory
    from ysnake_kernels.linear import product

    keep_freed_memory()
    x, w, dy = (torch.randn(*s) for s in ((rows, inner), (columns, inner), (rows, columns)))
    dw = torch.empty_like(w)

    def repetition() -> None:
        product(x, w)
        product(dy, w.t())
        torch.mm(dy.t(), x, out=dw)

    return repetition


def _step(model: Any, loss_of: Callable[[], "Tensor"]) -> Repetition:
    def repetition() -> list["Tensor"]:
        model.zero_grad()
        loss = loss_of()
        loss.backward()
        return [loss.detach(), *(p.grad for p in model.parameters())]

    return repetition


# Prefill: read a prompt at once, up to the logits of its last token.


def prefill_ysnake(folder: str, sizes: dict, length: int) -> Repetition:
    decoder = _decoder(saved(folder, sizes))
    ids = _ids(1, length, sizes)
    return lambda: [decoder.step(ids, None, last_only=True)[0]]


def prefill_transformers(folder: str, sizes: dict, length: int) -> Repetition:
    import torch
    from transformers import Mamba2ForCausalLM

    model = Mamba2ForCausalLM.from_pretrained(folder).eval()
    ids = _ids(1, length, sizes)

    @torch.inference_mode()
    def repetition() -> list["Tensor"]:
        return [model(ids, use_cache=True, logits_to_keep=1).logits]

    return repetition


def prefill_llama(folder: str, sizes: dict, length: int, threads: int) -> Repetition:
    llm = _llama(folder, "f32", threads)
    ids = _ids(1, length, sizes)[0].tolist()

    def repetition() -> list["Tensor"]:
        import torch

        llm.reset()
        llm.eval(ids)
        return [torch.from_numpy(_llama_logits(llm).copy())]

    return repetition


# Decoding: read a context in parts, then write the likeliest token again and again.


def decode_ysnake(
    folder: str, sizes: dict, count: int, context: int, batch: int = 1, **more: Any
) -> Repetition:
    decoder = _decoder(saved(folder, sizes), **more)
    logits, state = decoder.step(_ids(batch, min(context, 1000), sizes), None, last_only=True)
    if context > 1000:
        reader = _read(decoder, sizes, context)
        logits, state = reader.logits[None], reader.state

    def repetition() -> None:
        nonlocal logits, state
        for _ in range(count):
            logits, state = decoder.step(logits.argmax(-1), state)

    return repetition


def decode_transformers(folder: str, sizes: dict, count: int, context: int) -> Repetition:
    import torch
    from transformers import Mamba2ForCausalLM

    model = Mamba2ForCausalLM.from_pretrained(folder).eval()
    ids = _ids(1, context, sizes)
    with torch.inference_mode():
        out = model(ids, use_cache=True, logits_to_keep=1)

    @torch.inference_mode()
    def repetition() -> None:
        nonlocal out
        for _ in range(count):
            token = out.logits[:, -1:].argmax(-1)
            out = model(token, cache_params=out.cache_params, use_cache=True)

    return repetition


def decode_llama(
    folder: str, sizes: dict, count: int, context: int, type: str, threads: int
) -> Repetition:
    llm = _llama(folder, type, threads)
    llm.eval([i % sizes["vocab_size"] for i in range(context)])

    def repetition() -> None:
        for _ in range(count):
            llm.eval([int(_llama_logits(llm).argmax())])

    return repetition


def read_ysnake(folder: str, sizes: dict, context: int, times: int) -> Repetition:
    """Read a long prompt in parts. A shorter one is read several times."""
    decoder = _decoder(saved(folder, sizes))

    def repetition() -> None:
        for _ in range(times):
            _read(decoder, sizes, context)

    return repetition


def _read(decoder: Any, sizes: dict, context: int) -> Any:
    from ysnake.inference.generate import Context

    reader = Context(decoder, sizes["vocab_size"])
    part = _ids(1, min(context, 1024), sizes)[0].tolist()
    for i in range(0, context, len(part)):
        reader.feed(part[: context - i])
    return reader


def _decoder(folder: Path, **more: Any) -> Any:
    """A checkpoint that reads and writes as in `ysnake.run`."""
    from ysnake.checkpoints import checkpoint
    from ysnake.inference.decoding import Decoder
    from ysnake.shared import cli

    cli.tune_memory()
    return Decoder(checkpoint.load(folder), **more)


def _llama(folder: str, type: str, threads: int) -> Any:
    """The checkpoint in llama.cpp. Another process exports it to GGUF."""
    file = Path(f"{folder}-{type}") / "model.gguf"
    if not file.exists():
        file.parent.mkdir(exist_ok=True)
        command = [sys.executable, "-m", "ysnake.export", folder, "--gguf", str(file)]
        subprocess.run([*command, "--type", type], check=True, stdout=subprocess.DEVNULL)
    from llama_cpp import Llama

    options = {"n_ctx": 4096, "n_batch": 512, "verbose": False}
    return Llama(str(file), n_threads=threads, n_threads_batch=threads, **options)


def _llama_logits(llm: Any) -> Any:
    """The logits of the last token, as a NumPy array."""
    import llama_cpp
    import numpy as np

    return np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(llm.ctx, -1), (llm.n_vocab(),))


# What the contestants share.


def saved(folder: str, sizes: dict) -> Path:
    """A checkpoint folder with random weights. It is written if it does not exist."""
    path = Path(folder)
    if not path.exists():
        import torch

        from ysnake.checkpoints import checkpoint
        from ysnake.model import Model
        from ysnake.model.config import ModelConfig
        from ysnake.text import tokenizer

        torch.manual_seed(0)
        text = ["a model of random weights has nothing to say"] * 2  # llama.cpp needs merges
        learnt = tokenizer.train("bpe", text, 300)
        missing = sizes["vocab_size"] - learnt.get_vocab_size()
        learnt.add_tokens([f"filler {i}" for i in range(missing)])  # a token for each row
        checkpoint.save(path, Model(ModelConfig(**sizes)), learnt)
    return path


def _ids(batch: int, length: int, sizes: dict) -> "Tensor":
    import torch

    generator = torch.Generator().manual_seed(1)
    return torch.randint(sizes["vocab_size"], (batch, length), generator=generator)


def norms(tensors: list["Tensor"] | None) -> list[float] | None:
    """The norms of the result and of all gradients together. Equal models have equal ones."""
    if tensors is None:
        return None
    first, *gradients = (t.detach().double().norm().item() for t in tensors)
    return [first, sum(n * n for n in gradients) ** 0.5]


def memory(key: str) -> int:
    """Bytes of memory of this process: VmRSS, resident now, or VmHWM, the peak so far.

    Without Linux's /proc it is always the peak. On Linux `ru_maxrss` would be wrong, since a
    process inherits the value of the process that started it.
    """
    if STATUS.exists():
        line = next(x for x in STATUS.read_text().splitlines() if x.startswith(key))
        return int(line.split()[1]) * 1024
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def main() -> None:
    """Prepare the contestant of the job, then answer each line with a repetition's seconds."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # output of libraries must not look like an answer
    job = json.loads(sys.argv[1])
    if job["precision"] != "highest":
        import torch  # not for llama.cpp, whose memory is measured

        torch.set_float32_matmul_precision(job["precision"])
    repetition = globals()[job["function"]](**job["arguments"])
    loaded, before = memory("VmHWM"), memory("VmRSS")
    if STATUS.exists():
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    found = norms(repetition())
    answers.write(json.dumps({"norms": found}) + "\n")
    for _ in sys.stdin:
        repetition()  # not measured: it warms up caches and the processor's clock
        start = time.perf_counter()
        repetition()
        answer = {"seconds": time.perf_counter() - start}
        most = memory("VmHWM")
        answer |= {"peak": max(loaded, most), "extra": most - before}
        answers.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
