"""Stage `check`: compare every case of every operator with float64, and check what needs a card.

Each dtype has a process of its own, and so have the model and the sequence of a million tokens.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
import ysnake_kernels as ours
from torch import Tensor

from benchmarks.gpu import cases, layers
from benchmarks.gpu.cases import TINY, Case, arguments, compare, finite
from benchmarks.gpu.common import Options, captured, reason
from benchmarks.traffic import Shape

LONG, MILLION, PIECE = 131072, 2**20, 65536  # tokens
LAYERS = (3, 2), (1, 1), (16, 1), (64, 1), (70, 2)  # batches and groups of `layers.compare`
FORMS = ("plain", "documents", "carried state", "documents, carried state", "recompute")
FORMS += ("autocast", "decoding")  # ways to run a model, which are all checked


def run(job: str, options: Options) -> None:
    checks = {"model": model, "million": million, "layers": one_token}.get(job) or partial(
        of_dtype, job
    )
    wrong = 0
    for name, check in checks(options):
        try:
            row = check()
        except Exception as error:  # whatever it is, the other checks go on
            row = {"case": name, "dtype": job, "right": False, "failed": reason(error)}
        options.write("check", **row)
        wrong += not row["right"]
    if wrong:
        raise SystemExit(1)


Checks = Iterator[tuple[str, Callable[[], dict]]]


def of_dtype(job: str, options: Options) -> Checks:
    """All cases, the usual shape, a long sequence, and whether results repeat bit by bit."""
    dtype, device, dry = getattr(torch, job), options.device, options.dry
    slack = 30 if dry else 1  # short sums cancel, and the interpreter truncates to bfloat16
    for name in cases.names(dry):

        def check(name: str = name) -> dict:
            return compare(cases.case(name, dtype, device, dry), dtype, "reference", slack)

        yield name, check
    large = TINY if dry else Shape()
    for op in ("scan",) if dry else ("scan", "mixer"):
        tensors = arguments(large, dtype, device)[op]
        c = Case(f"{op}, {large.batch} x {large.length}", op, tensors, cases.OPTIONS[op])
        yield c.name, partial(compare, c, dtype, "eager", 2 * slack)
    if job in ("bfloat16", "float32") and not dry:
        s = Shape(1, LONG, heads=8)
        c = Case(
            f"scan, 1 x {s.length}",
            "scan",
            arguments(s, dtype, device)["scan"],
            cases.OPTIONS["scan"],
        )
        yield c.name, partial(compare, c, dtype, "eager", 2 * slack)
    for op in ("scan",) if dry else ("scan", "convolution", "norm", "mixer"):
        for s in (TINY,) if dry else (Shape(), Shape(1, 32768)):
            yield f"{op}, same bits", partial(same_bits, op, s, dtype, device)


def one_token(options: Options) -> Checks:
    """A token through two layers, in every dtype."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        for batch, groups in LAYERS[:1] if options.dry else LAYERS:
            yield (
                f"layers' step, batch {batch}",
                partial(layers.compare, batch, groups, dtype, options),
            )


def same_bits(op: str, s: Shape, dtype: torch.dtype, device: str) -> dict:
    """Whether a second call, another stream and a CUDA graph give the same bits."""
    tensors = arguments(s, dtype, device)[op]
    call = partial(cases.operators("fused")[op], **cases.OPTIONS[op])
    found: dict[str, list[Tensor]] = {}
    with ours.backend("fused"):
        weight = torch.randn_like(call(**tensors))

        def work() -> list[Tensor]:
            """Use new leaves at each call. torch remembers the first stream of a leaf."""
            leaves = {k: t.detach().requires_grad_() for k, t in tensors.items()}
            y = call(**leaves)
            return [y.detach(), *torch.autograd.grad(y, list(leaves.values()), weight)]

        first = [t.clone() for t in work()]
        found["twice"] = work()
        if device == "cuda":
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                found["stream"] = work()
            torch.cuda.synchronize()
            kept: list[Tensor] = []
            graph = captured(lambda: kept.__setitem__(slice(None), work()))
            for t in kept:
                t.zero_()
            graph.replay()
            torch.cuda.synchronize()
            found["graph"] = kept
    same = {
        way: all(torch.equal(a, b) for a, b in zip(first, others, strict=True))
        for way, others in found.items()
    }
    row = {"case": f"{op}, same bits, {s.batch} x {s.length}", "dtype": str(dtype)[6:]}
    return row | {"same": same, "right": all(same.values())}


def million(options: Options) -> Checks:
    """The forward of a million tokens, compared with float64 in parts."""
    s = replace(TINY, length=20) if options.dry else Shape(1, MILLION)
    piece = 16 if options.dry else PIECE

    def check() -> dict:
        from comparison import TOLERANCES, distance

        given = slices(s, options.device)
        more = cases.OPTIONS["scan"] | {"return_final_states": True}
        with torch.no_grad():
            with ours.backend("fused"):
                y, states = ours.ssd_scan(**given, **more)
            out, carried = 0.0, None
            for start in range(0, s.length, piece):
                part = {
                    k: (t[:, start : start + piece] if t.ndim > 1 else t).double()
                    for k, t in given.items()
                }
                with ours.backend("eager"):
                    expected, carried = ours.ssd_scan(**part, initial_states=carried, **more)
                out = max(out, distance(y[:, start : start + piece], expected))
        out = max(out, distance(states, carried))
        right = out <= TOLERANCES[torch.bfloat16][0] * (2 if options.dry else 1)
        row = {"case": f"scan, 1 x {s.length}, forward", "dtype": "bfloat16"}
        return row | {"against": "eager", "output": finite(out), "right": right}

    yield "a million tokens", check


def slices(s: Shape, device: str) -> dict[str, Tensor]:
    """The arguments of a scan: slices of one projection with more than 2^31 elements."""
    torch.manual_seed(0)
    d_inner, n = s.heads * s.head_dim, s.groups * s.state
    sizes = [d_inner, d_inner, n, n, s.heads]
    made = {"dtype": torch.bfloat16, "device": device}
    projection = torch.randn(s.batch, s.length, sum(sizes), **made)
    _, x, B, C, dt = projection.split(sizes, -1)
    B, C = (t.unflatten(-1, (s.groups, -1)) for t in (B, C))
    heads = {"A": -torch.rand(s.heads, device=device) - 0.5}
    heads |= {"D": torch.randn(s.heads, device=device)}
    heads |= {"dt_bias": torch.randn(s.heads, device=device) - 3}
    return {"x": x.unflatten(-1, (s.heads, -1)), "dt": dt, "B": B, "C": C, **heads}


def model(options: Options) -> Checks:
    """A training step in every form, and decoding. Compares fused with eager in float32."""
    from comparison import distance

    from ysnake.inference.decoding import Decoder
    from ysnake.model import Model
    from ysnake.model.config import ModelConfig

    sizes = {"vocab_size": 64, "d_model": 32, "n_layers": 2, "d_state": 16, "head_dim": 16}
    if not options.dry:
        sizes = {"vocab_size": 512, "d_model": 256, "n_layers": 3, "d_state": 64}
    torch.manual_seed(0)
    net = Model(ModelConfig(**sizes)).to(options.device)
    batch, length = (2, 12) if options.dry else (4, 256)
    ids = torch.randint(sizes["vocab_size"], (batch, length + 1), device=options.device)
    ids, targets = ids[:, :-1], ids[:, 1:]
    second = (torch.arange(length, device=options.device) >= length // 3).int()
    documents = second.expand(batch, -1).contiguous()

    def step(backend: str, seq_idx: Tensor | None, carry: bool, autocast: bool) -> list[Tensor]:
        net.zero_grad()
        state = net.empty_state(batch) if carry else None
        with ours.backend(backend):
            for _ in range(1 + carry):
                with torch.autocast(options.device, torch.bfloat16, enabled=autocast):
                    loss = net.loss(ids, targets, seq_idx, state) / targets.numel()
                loss.backward()
        return [loss.detach(), *(p.grad.clone() for p in net.parameters())]

    def check(name: str, recompute: bool, autocast: bool, *how: object) -> dict:
        net.backbone.recompute = recompute
        found, expected = step("fused", *how, autocast), step("eager", *how, False)
        far = max(map(distance, found, expected))
        limit = 0.2 if autocast else 2e-3
        row = {"case": f"model, {name}", "dtype": "bfloat16 autocast" if autocast else "float32"}
        return row | {"against": "eager", "output": finite(far), "right": far <= limit}

    for form in FORMS[3:4] if options.dry else FORMS[:-1]:
        seq_idx = documents if "documents" in form else None
        how = (form == "recompute", form == "autocast", seq_idx, "carried" in form)
        yield form, partial(check, form, *how)

    def decode() -> dict:
        with torch.no_grad(), ours.backend("eager"):
            expected = net(ids)
        far, decoder = 0.0, Decoder(net)
        with ours.backend("fused"):
            states = [
                decoder.step(ids[:, : length // 2], None, last_only=True)[1] for _ in range(2)
            ]
            for i in range(length // 2, length // 2 + 5):  # each context has its graph
                for state in states:
                    logits, _ = decoder.step(ids[:, i], state)
                    far = max(far, distance(logits, expected[:, i]))
        row = {"case": "model, decoding", "dtype": "float32", "against": "eager"}
        return row | {"output": finite(far), "right": far <= 1e-3}

    yield FORMS[-1], decode
