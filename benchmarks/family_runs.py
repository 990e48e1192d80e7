"""Run transformers' families with and without the drop-in, and compare the results.

transformers chooses its operators when a model is imported. So each way runs in a process of its
own. `python -m benchmarks.family_runs` runs all families and prints a table of what is the same. It
exits with 1 if anything differs. `--families` and `--modes` choose some.
"""

import argparse
import logging
import multiprocessing
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.families import FAMILIES, VARIANTS, VOCABULARY, random_model

LENGTHS = (13, 6, 10)  # tokens of each document of a packed sequence
PADDING = 7  # tokens of padding on the left of one of two rows
TOLERANCE = 3e-4  # of ||a - b|| / ||a||
WAYS = {"plain": None, "drop-in": {}, "fused": {"fused_training": True}}  # options of `install`
Results = dict[str, Tensor] | str  # or the reason why there are no tensors


def random_ids(rows: int = 2) -> Tensor:
    return torch.randint(
        1, VOCABULARY, (rows, sum(LENGTHS)), generator=torch.Generator().manual_seed(1)
    )


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def logits(name: str) -> Results:
    """The logits of a whole sequence."""
    with torch.no_grad():
        return {"logits": random_model(name).eval()(random_ids()).logits}


def tokens(name: str) -> Results:
    """Tokens that are chosen greedily with a cache, and their logits."""
    options = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    out = random_model(name).eval().generate(random_ids()[:, :11], max_new_tokens=8, **options)
    return {"tokens": out.sequences, "logits": torch.stack(out.logits)}


def training(name: str, adapters: bool = False) -> Results:
    """The loss of a training step and all gradients."""
    model, ids = random_model(name, adapters).train(), random_ids()
    loss = model(ids, labels=ids, use_cache=False).loss
    loss.backward()
    return {"loss": loss.detach(), **gradients(model)}


def adapted(name: str) -> Results:
    """A training step with an adapter on every output projection."""
    return training(name, adapters=True)


def padded(name: str) -> Results:
    """Logits, loss and gradients of a batch with one row that is padded on the left."""
    model, ids = random_model(name), random_ids()
    mask = torch.ones_like(ids)
    mask[0, :PADDING] = 0
    labels = ids.masked_fill(mask == 0, -100)
    out = {}
    for mode in ("eval", "train"):
        found = getattr(model, mode)()(ids, attention_mask=mask, labels=labels, use_cache=False)
        found.loss.backward()
        out |= {f"{mode} logits": found.logits[mask == 1].detach(), f"{mode} loss": found.loss}
        out |= {f"{mode} {n}": g for n, g in gradients(model).items()}
    return {n: t.detach() for n, t in out.items()}


def packed(name: str) -> Results:
    """Hidden states and gradients of documents in one sequence, or the error message."""
    numbers = torch.cat([torch.full((1, n), i) for i, n in enumerate(LENGTHS)], 1)
    options = {
        "position_ids": torch.cat([torch.arange(n)[None] for n in LENGTHS], 1),
        "seq_idx": numbers.int(),
    }
    if name == "granitemoehybrid":  # its attention does not find documents by their positions
        sees = numbers[:, :, None] == numbers[:, None]
        mask = torch.zeros(sees.shape).masked_fill(~sees.tril(), -torch.inf)[:, None]
        options["attention_mask"] = {"full_attention": mask, "linear_attention": None}
    try:
        return _documents(name, [random_ids(1)], options)
    except ValueError as error:
        return f"refused: {error}"


def alone(name: str) -> Results:
    """The results of `packed`, with each document in a call of its own."""
    return _documents(name, list(random_ids(1).split(LENGTHS, dim=1)), {})


def _documents(name: str, inputs: list[Tensor], options: dict) -> Results:
    model, out = random_model(name).base_model, {}  # not all models pass options on to their base
    for mode in ("eval", "train"):  # the two run different operators
        getattr(model, mode)()
        hidden = [model(i, use_cache=False, **options).last_hidden_state for i in inputs]
        hidden = torch.cat(hidden, 1)
        weights = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(2))
        (hidden * weights).sum().backward()
        out[f"{mode} hidden states"] = hidden.detach()
        out |= {f"{mode} {n}": g for n, g in gradients(model).items()}
    return out


def compiled(name: str, backend: str = "aot_eager") -> Results:
    """A prefill, a token with the cache, and a training step, each compiled as one graph."""
    out: dict[str, Tensor] = {}
    ids = random_ids()
    for part in ("prefill", "step", "train"):
        torch.compiler.reset()
        model = random_model(name).train(part == "train")
        call = torch.compile(model, fullgraph=True, backend=backend)
        with torch.set_grad_enabled(part == "train"):
            if part == "prefill":
                out["logits"] = call(ids, use_cache=False).logits
            elif part == "step":
                out["step"] = call(ids[:, 11:12], **_cache(model, ids[:, :11])).logits
            else:
                call(ids, use_cache=False).logits.square().mean().backward()
                out |= gradients(model)
    return out


def uncompiled(name: str) -> Results:
    """The results of `compiled`, without the compiler."""
    model, ids = random_model(name).eval(), random_ids()
    with torch.no_grad():
        step = model(ids[:, 11:12], **_cache(model, ids[:, :11])).logits
        out = {"logits": model(ids, use_cache=False).logits, "step": step}
    model.train()(ids, use_cache=False).logits.square().mean().backward()
    return {**out, **gradients(model)}


def _cache(model: torch.nn.Module, ids: Tensor) -> dict[str, object]:
    """The cache of a prompt, by the name that the model gives it."""
    out = model(ids, use_cache=True)
    return {k: out[k] for k in ("cache_params", "past_key_values") if getattr(out, k, None)}


MODES: dict[str, Callable[[str], Results]] = {
    f.__name__: f for f in (logits, tokens, training, padded, packed, adapted, compiled)
}
# mode -> what runs without the drop-in, to compare with
BESIDE = {"packed": alone, "compiled": uncompiled}


class Messages(logging.Handler):
    """Keeps log messages and warnings."""

    def __init__(self):
        super().__init__()
        self.kept: list[str] = []
        warnings.simplefilter("always")
        warnings.showwarning = lambda message, *place: self.kept.append(str(message))

    def emit(self, record: logging.LogRecord) -> None:
        self.kept.append(record.getMessage())


def worker(names: list[str], modes: list[str], way: str, file: str) -> None:
    """Write the results by model and mode. The messages of a model have None as their mode."""
    torch.set_num_threads(1)
    if WAYS[way] is not None:
        import ysnake_kernels.dropin

        ysnake_kernels.dropin.install(**WAYS[way])
    import transformers

    messages = Messages()
    logger = transformers.logging.get_logger("transformers")
    logger.handlers[:] = [messages]
    results: dict[tuple[str, str | None], Results | list[str]] = {}
    for name in names:
        messages.kept.clear()
        transformers.utils.logging.warning_once.cache_clear()
        for mode in modes:
            results[name, mode] = _result(MODES[mode], name)
            if way == "plain" and mode in BESIDE:
                results[name, BESIDE[mode].__name__] = _result(BESIDE[mode], name)
        results[name, None] = list(messages.kept)
    torch.save(results, file)


def _result(run: Callable[[str], Results], name: str) -> Results:
    """The results of a run, or why it failed. A failure does not end the other runs."""
    try:
        return run(name)
    except Exception as error:
        line = next(iter(str(error).strip().splitlines()), "")
        return f"fails: {type(error).__name__}: {line}"


def run(ways: list[str], names: list[str], modes: list[str]) -> list[dict]:
    """The results of `worker` for each of the ways. All ways run at the same time."""
    forked = "forkserver" in multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if forked else "spawn")
    if forked:  # the process to fork imports what transformers imports of torch
        context.set_forkserver_preload(["torch._dynamo", "torch.distributed.tensor"])
    with tempfile.TemporaryDirectory() as folder:
        running = {
            way: context.Process(target=worker, args=(names, modes, way, str(Path(folder, way))))
            for way in ways
        }
        for process in running.values():
            process.start()
        for way, process in running.items():
            process.join()
            if process.exitcode != 0:
                raise RuntimeError(f"family_runs: {way} ended with exit code {process.exitcode}")
        return [torch.load(Path(folder, way)) for way in ways]


def difference(plain: Results, ours: Results) -> str | None:
    """One line that says what differs between two results, or None."""
    if isinstance(plain, str) or isinstance(ours, str):
        return None if plain == ours else f"without: {_short(plain)}; with: {_short(ours)}"
    if plain.keys() != ours.keys():
        return f"other results: {', '.join(sorted(plain.keys() ^ ours.keys()))}"
    for name, expected in plain.items():
        found = ours[name]
        if not expected.is_floating_point():
            if not torch.equal(found, expected):
                return f"{name}: other values"
        else:
            scale = expected.double().norm() + 1e-6  # some gradients are zero apart from rounding
            off = ((found.double() - expected.double()).norm() / scale).item()
            if not off <= TOLERANCE:
                return f"{name}: off by {off:.1e}"
    return None


def _short(results: Results) -> str:
    return results if isinstance(results, str) else "results"


def verdict(name: str, mode: str, plain: dict, ours: dict) -> tuple[bool, str]:
    """Whether a mode is right with the drop-in, and what the table says about it."""
    without, with_ = plain[name, mode], ours[name, mode]
    if isinstance(with_, str):
        kind = with_.partition(":")[0]
        right = isinstance(without, str) and without.partition(":")[0] == kind
        return right, f"{kind} either way" if right else with_
    if mode not in BESIDE:
        found = difference(without, with_)
        return found is None, found or "same"
    found = difference(plain[name, BESIDE[mode].__name__], with_)
    if isinstance(without, str):
        return found is None, found or "only with it"
    if found is not None and difference(without, with_) is None:
        return True, "ignored either way"
    return found is None, found or "same"


def table(names: list[str], modes: list[str], plain: dict, ours: dict) -> tuple[bool, str]:
    """Whether all is right, and a Markdown table of all verdicts."""
    rows = [["family", *modes], ["---"] * (1 + len(modes))]
    good = True
    for name in names:
        row = [verdict(name, mode, plain, ours) for mode in modes]
        good = good and all(right for right, _ in row)
        rows.append([name, *(word if right else f"WRONG: {word}" for right, word in row)])
    return good, "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--families", nargs="*", default=[*FAMILIES, *VARIANTS])
    parser.add_argument("--modes", nargs="*", default=list(MODES), choices=list(MODES))
    options = parser.parse_args()
    unknown = set(options.families) - {*FAMILIES, *VARIANTS}
    if unknown:
        parser.error(f"--families: unknown {', '.join(sorted(unknown))}")
    plain, ours = run(["plain", "drop-in"], options.families, options.modes)
    good, text = table(options.families, options.modes, plain, ours)
    print(text)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
