"""Counts of the bytes and operations of every kernel, and the least time that they take on a card.

A kernel counts each byte that it reads or writes once. The heads of a group and neighbouring
programs share some bytes. The count assumes that these come from the cache after the first time.
"""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Shape:
    """One layer's scan. The defaults are Mamba-2 130M's."""

    batch: int = 8
    length: int = 4096
    heads: int = 24
    groups: int = 1
    head_dim: int = 64
    state: int = 128
    item: int = 2
    """Bytes of an element of x, B, C, z and y."""
    dt_item: int = 4
    """Bytes of an element of dt."""
    z: bool = False
    """Whether the scan is gated."""
    tile: int = 32
    """Tokens of a tile of the single pass."""
    chunk: int = 64
    """Tokens between the states that the backward stores."""
    row_tile: int = 64
    """Tokens of a tile of rows in the backward, on an H100."""
    state_item: int = 2
    """Bytes of an element of those states."""
    chain_chunk: int = 256
    """Tokens of a chunk of the five-kernel chain."""
    segments: int = 1
    """Segments of each sequence in the forward."""
    back_segments: int = 1
    """Segments of each sequence in the backward."""
    splits: int = 1
    """Programs that share the heads of a group in the backward, each with its own dB and dC."""

    @property
    def token_heads(self) -> int:
        return self.batch * self.length * self.heads


@dataclass(frozen=True)
class Card:
    """A GPU as its data sheet describes it."""

    name: str = "H100 SXM"
    bandwidth: float = 3.35e12
    """Bytes per second."""
    operations: float = 989e12
    """Dense bfloat16 operations per second."""


@dataclass(frozen=True)
class Kernel:
    """A launch: the bytes that it reads and writes of each tensor, and operations of products."""

    name: str
    reads: dict[str, float]
    writes: dict[str, float]
    operations: float = 0

    @property
    def bytes(self) -> float:
        return sum(self.reads.values()) + sum(self.writes.values())


def tensors(s: Shape) -> dict[str, int]:
    """Bytes of each tensor of a call: arguments and results. Gradients have the same sizes."""
    tokens = s.batch * s.length
    x = tokens * s.heads * s.head_dim * s.item
    return {
        "x": x,
        "dt": tokens * s.heads * s.dt_item,
        "A": s.heads * 4,
        "B": tokens * s.groups * s.state * s.item,
        "C": tokens * s.groups * s.state * s.item,
        **({"z": x} if s.z else {}),
        "y": x,
        "final states": s.batch * s.heads * s.head_dim * s.state * 4,
    }


def decays(s: Shape, rows: int) -> Kernel:
    """The kernel that turns dt into `rows` numbers of four bytes for each token and head."""
    size = tensors(s)
    reads = {"dt": size["dt"], "A": size["A"]}
    return Kernel("decays", reads, {"decays": rows * s.token_heads * 4})


def forward(s: Shape) -> list[Kernel]:
    """The kernel for the decays, then the single pass over every argument and result.

    With segments, a kernel between them computes the state and the decay of each segment.
    """
    size = tensors(s)
    writes = {name: size.pop(name) for name in ("y", "final states")}
    NP, Q = s.state * s.head_dim, s.tile
    products = 2 * (2 * NP + Q * (s.state + s.head_dim))  # C S, B x; C B^T, (C B^T) x
    first = decays(s, 2)
    reads = {name: size[name] for name in ("x", "B", "C", "z") if name in size} | first.writes
    if s.segments == 1:
        return [first, Kernel("single pass", reads, writes, products * s.token_heads)]
    ends = ends_of_segments(s, s.segments)
    before = {name: reads[name] for name in ("x", "B", "decays")}
    entering = {name: v * (s.segments - 1) / s.segments for name, v in ends.items()}
    return [
        first,
        Kernel("ends of segments", before, ends, 2 * NP * s.token_heads),
        Kernel("pass per segment", reads | entering, writes, products * s.token_heads),
    ]


def ends_of_segments(s: Shape, segments: int) -> dict[str, float]:
    """States and decays at the ends of segments. Nothing reads those of a sequence's last one."""
    count = segments * s.batch * s.heads
    return {"ends": count * s.head_dim * s.state * 4, "whole decays": count * 4}


def chain(s: Shape) -> list[Kernel]:
    """The forward as five kernels. They store chunk states in float32, then in x's dtype."""
    size, Q, NP = tensors(s), s.chain_chunk, s.state * s.head_dim
    row = s.token_heads * 4  # a float32 for every token and head
    states = s.token_heads / Q * NP
    CB = s.batch * s.length * s.groups * Q * 4
    n = s.token_heads
    gate = {"z": size["z"]} if s.z else {}
    per_group = n / (s.heads / s.groups)
    return [
        Kernel("cumulative sums", {"dt": size["dt"]}, {"dt": row, "decay": row}),
        Kernel(
            "states of chunks",
            {"x": size["x"], "B": size["B"], "dt": row, "decay": row},
            {"states": states * 4},
            2 * NP * n,
        ),
        Kernel("passing of states", {"states": states * 4}, {"states": states * s.item}),
        Kernel("C B^T", {"B": size["B"], "C": size["C"]}, {"CB": CB}, 2 * Q * s.state * per_group),
        Kernel(
            "outputs",
            {
                "x": size["x"],
                "C": size["C"],
                "dt": row,
                "decay": row,
                "states": states * s.item,
                "CB": CB / 2,  # the causal half
                **gate,
            },
            {"y": size["y"]},
            (2 * NP + Q * s.head_dim) * n,
        ),
    ]


def backward(s: Shape) -> list[Kernel]:
    """The split form: states between chunks in both directions, then the rows and columns of the
    quadratic form, then the gradient of dt. The operations of torch for a gate are not counted."""
    size, n, NP, K = tensors(s), s.token_heads, s.state * s.head_dim, s.chunk
    row = n * 4
    chunks = s.batch * -(-s.length // K) * s.heads
    S, dS = ({name: chunks * NP * s.state_item} for name in ("S", "dS"))
    inputs = {name: size[name] for name in ("x", "B", "C")} | {"dy": size["y"]}
    summed = {"dB": size["B"], "dC": size["C"]}
    partial = {name: v * s.splits * 4 / s.item for name, v in summed.items()}  # in float32
    written = summed if s.splits == 1 else partial
    shared = 2 * K * s.state * s.splits * s.groups / s.heads  # B C^T, each head's share of it
    # each tile of rows stores what it adds to its chunk's dB
    rest = s.length % K
    parts = s.length // K * K * -(-K // s.row_tile) + rest * -(-rest // s.row_tile)
    within = {"dB within chunks": s.batch * parts * s.splits * s.groups * s.state * 4}
    through, sums = {"flow through chunks": chunks * 4}, {"shares of dA": chunks * 8}
    kernels, entering = [decays(s, 3)], {}
    if s.back_segments > 1:
        ends = ends_of_segments(s, s.back_segments)
        inside = (s.back_segments - 1) / s.back_segments
        entering = {"ends": 2 * inside * ends["ends"], "whole decays": ends["whole decays"]}
        ends["ends"] *= 2
        kernels.append(Kernel("ends of segments", inputs | {"decays": 2 * row}, ends, 4 * NP * n))
    gated = {"y": size["y"]} if s.z else {}
    kernels += [
        Kernel(
            "states between chunks", inputs | {"decays": 2 * row} | entering, S | dS, 4 * NP * n
        ),
        Kernel(
            "rows",
            inputs | S | {"decays": 2 * row},
            {"dC": written["dC"], "flows": row, **within, **gated},
            (4 * NP + (4 if s.z else 2) * K * s.head_dim + 3 * shared) * n,
        ),
        Kernel(
            "columns",
            inputs | S | dS | {"decays, steps": 3 * row} | within,
            {"dx": size["x"], "dB": written["dB"], "flows": 3 * row, **through},
            (4 * NP + 4 * K * s.head_dim + shared) * n,
        ),
        Kernel(
            "steps",  # it reads one of the flows without the last token of a chunk
            {"dt": size["dt"], "A": size["A"], "flows": 4 * row - 4 * chunks, **through},
            {"ddt": size["dt"], **sums},
        ),
    ]
    if s.splits > 1:
        kernels.append(Kernel("sums of dB and dC", partial, summed))
    return kernels


def others(s: Shape, width: int = 4) -> dict[str, list[Kernel]]:
    """The small operators of the same layer. The step takes one token of every sequence."""
    tokens, d_inner = s.batch * s.length, s.heads * s.head_dim
    channels = d_inner + 2 * s.groups * s.state
    xBC, y = tokens * channels * s.item, tokens * d_inner * s.item
    taps = {"weight": width * channels * 4, "bias": channels * 4}
    blocks = s.batch * -(-s.length // 128)  # tokens of a program of the convolution's backward
    shares = {"shares of dweight": blocks * (width + 1) * channels * 4}
    final = {"final states": s.batch * channels * (width - 1) * s.item}
    gain = {"weight": d_inner * 4}
    rows = max(1, 2048 // (1 << (d_inner - 1).bit_length()))  # of a program of the norm
    gains = {"shares of dweight": min(-(-tokens // rows), 512) * d_inner * 4}
    state = s.batch * d_inner * s.state * 4
    one = {k: size / s.length for k, size in tensors(s).items() if k in {"x", "dt", "B", "C", "z"}}
    return {
        "convolution": [
            Kernel(
                "forward", {"x": xBC, **taps}, {"y": xBC, **final}, 2 * width * tokens * channels
            )
        ],
        "convolution, backward": [
            Kernel(
                "gradients",
                {"x": xBC, "dy": xBC, **taps},
                {"dx": xBC, **shares},
                6 * width * tokens * channels,
            ),
            Kernel("sums of dweight", shares, taps),
        ],
        "gated norm": [Kernel("forward", {"x": y, "z": y, **gain}, {"y": y})],
        "gated norm, backward": [
            Kernel("gradients", {"x": y, "z": y, "dy": y, **gain}, {"dx": y, "dz": y, **gains}),
            Kernel("sums of dweight", gains, gain),
        ],
        "step": [
            Kernel(
                "one token",
                {"state": state, "A": s.heads * 4, **one},
                {"state": state, "y": y / s.length},
                4 * s.batch * d_inner * s.state,
            )
        ],
    }


def table(title: str, kernels: list[Kernel], unit: float, per: str, card: Card) -> str:
    """A table of bytes and operations per unit, and of the least time of a call on the card."""
    lines = [
        f"{title}, per {per}",
        f"{'':26s}{'bytes':>9s}{'operations':>12s}{'memory us':>11s}{'products us':>13s}",
    ]
    rows = [(k.name, k.bytes, k.operations) for k in kernels]
    times = [(b / card.bandwidth, f / card.operations) for _, b, f in rows]
    if len(kernels) > 1:
        rows.append(("together", sum(r[1] for r in rows), sum(r[2] for r in rows)))
        times.append((sum(t[0] for t in times), sum(t[1] for t in times)))
    for (name, size, operations), (memory, products) in zip(rows, times, strict=True):
        lines.append(
            f"{name:26s}{size / unit:9.1f}{operations / unit:12.0f}"
            f"{memory * 1e6:11.1f}{products * 1e6:13.1f}"
        )
    least = sum(max(pair) for pair in times[: len(kernels)])
    lines.append(f"at least {least * 1e6:.1f} us a call on {card.name}")
    return "\n".join(lines)


def main(shape: Shape, card: Card) -> None:
    """Print the counts for a shape, and the least times on a card."""
    n = shape.token_heads
    print(f"{shape}\n{card}\n")
    per = "token and head"
    print(table("Forward, single pass", forward(shape), n, per, card), "\n")
    if shape.segments == 1:
        long = replace(shape, batch=1, length=shape.batch * shape.length, segments=8)
        print(table("Forward, one sequence in 8 segments", forward(long), n, per, card), "\n")
    print(table("Forward, five-kernel chain", chain(shape), n, per, card), "\n")
    print(table("Backward, split form", backward(shape), n, per, card), "\n")
    tokens = shape.batch * shape.length
    small = others(shape)
    step = small.pop("step")
    for name, kernels in small.items():
        print(table(name.capitalize(), kernels, tokens, "token", card), "\n")
    print(table("Step", step, shape.batch * shape.heads, "sequence and head", card))


if __name__ == "__main__":
    import tyro  # imported here, since benchmarks.gpu does not need it

    tyro.cli(main, config=(tyro.conf.OmitArgPrefixes,))
