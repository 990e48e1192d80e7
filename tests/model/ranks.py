"""What each rank of the tests of many processes does.

torchrun starts it with a list of tasks in JSON. Without torchrun it is given a list of groups, each
a number of ranks and their tasks. It forks the ranks of one group after the other, so only one
process imports torch. Each task leaves a file of JSON per rank, or a run folder.
"""

import copy
import json
import os
import shutil
import signal
import socket
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from small import model as tiny_model
from torch.profiler import profile

from ysnake import train
from ysnake.model.config import IGNORED
from ysnake.text.data import Batch
from ysnake.training import evaluation, step
from ysnake.training.parallel import Ranks

RESTARTS = "TORCHELASTIC_RESTART_COUNT"


def trained(rank, size, argv, stop_after=None, poisoned=None, killed_after=None):
    """Train. The arguments say in which forward pass the last rank is disturbed, and how.

    In pass `stop_after` it gets SIGTERM, in pass `poisoned` its loss is NaN, and in pass
    `killed_after` it is killed, unless torchrun has restarted it.
    """
    real = step.batch_loss
    calls = 0

    def stopping(*arguments):
        nonlocal calls
        calls += 1
        if rank == size - 1 and calls == stop_after:
            signal.raise_signal(signal.SIGTERM)
        if rank == size - 1 and calls == killed_after and os.environ[RESTARTS] == "0":
            os.kill(os.getpid(), signal.SIGKILL)
        loss = real(*arguments)
        return loss * torch.nan if rank == size - 1 and calls == poisoned else loss

    step.batch_loss = stopping
    try:
        code = train.main(argv)
    finally:
        step.batch_loss = real
    assert code == (0 if stop_after is None else 130)


def copied(rank, size, run, copy):
    """Copy a run folder, before others go on with it."""
    shutil.copytree(run, copy)


def gradients(rank, size, out, context, documents, length, sharded=False, counted=False, **sizes):
    """Compare the ranks' loss and gradients with those of one process.

    Also write how many sent tensors the rank still keeps and, with `counted`, the shapes of those
    that go from rank to rank.
    """
    torch.manual_seed(0)
    whole = tiny_model(**sizes).double()
    ranks = Ranks(rank, size, context, sharded, None)
    pieces = a_batch(2, length, documents)
    expected = whole.loss(*map(torch.from_numpy, (pieces.ids, pieces.targets, pieces.seq_idx)))
    expected.backward()

    spread = copy.deepcopy(whole)
    spread.zero_grad()
    loss_of = ranks.distribute(spread, "cpu")
    part = ranks.own_part(pieces)
    tensors = [torch.from_numpy(a) for a in (part.ids, part.targets, part.seq_idx)]
    loss = loss_of(*tensors)
    (loss * size).backward()
    report = {"loss": abs(ranks.total(loss.detach().clone()) / expected.item() - 1)}
    for (name, p), q in zip(whole.named_parameters(), spread.parameters(), strict=True):
        report[name] = error(q.grad.full_tensor() if sharded else q.grad, p.grad)
    kept = len(spread.backbone.layers[0].mixer.neighbours.pending_sends)
    shapes = passed(spread, tensors) if counted else None
    write(out, rank, {"errors": report, "passed": shapes, "kept": kept})


def error(got, expected):
    return ((got - expected).norm() / expected.norm()).item()


def passed(model, tensors):
    """The shapes of all tensors that go from rank to rank in a forward and a backward pass."""
    shapes = {"other": []}
    line = model.backbone.layers[0].mixer.neighbours
    with profile(record_shapes=True) as forward:
        loss = model.loss(*tensors)
        line.finish_sends()  # while it is profiled: later the profiler would crash
    with profile(record_shapes=True) as backward:
        loss.backward()
        line.finish_sends()
    for name, profiled in {"forward": forward, "backward": backward}.items():
        shapes |= {f"{name} sent": [], f"{name} received": []}
        for event in profiled.events():
            if event.name.startswith("gloo:"):
                way = {"gloo:send": f"{name} sent", "gloo:recv": f"{name} received"}
                shapes[way.get(event.name, "other")] += event.input_shapes[:1]
    return shapes


def a_batch(batch, length, documents):
    """Random tokens in documents of random lengths, many of which cross the ranks' borders."""
    random = np.random.default_rng(1)
    ids = random.integers(0, 300, (batch, length + 1))
    begins = np.zeros((batch, length), dtype=bool)
    for row in begins[:, 1:]:
        row[random.choice(length - 1, documents - 1, replace=False)] = True
    targets = np.where(np.roll(begins, -1, axis=1), IGNORED, ids[:, 1:])
    return Batch(ids[:, :-1], targets, begins.cumsum(1).astype(np.int32), begins[:, 0])


def memory(rank, size, out, context, length, **sizes):
    """Bytes that a forward pass keeps for backward, and the growth of the process in both."""
    torch.manual_seed(0)
    model = tiny_model(**sizes)
    ranks = Ranks(rank, size, context, False, None)
    loss_of = ranks.distribute(model, "cpu")
    part = ranks.own_part(a_batch(1, length, 3))
    tensors = [torch.from_numpy(a) for a in (part.ids, part.targets, part.seq_idx)]
    short = [t[:, :64] for t in tensors[:2]] + [tensors[2][:, : 64 + (context > 1)]]
    loss_of(*short).backward()  # so that the process has grown as much as it does by itself
    model.zero_grad()
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    before = peak()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = loss_of(*tensors)
    (loss * size).backward()
    grown = peak() - before
    saved = {name: p.grad for name, p in model.named_parameters()}
    torch.save(saved, f"{out}.{rank}.grads")
    write(
        out, rank, {"kept": sum(kept.values()), "grown": grown, "loss": ranks.total(loss.detach())}
    )


def peak():
    """The most memory this process has had, in bytes; getrusage would begin at its parent's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024


def write(out, rank, content):
    Path(f"{out}.{rank}.json").write_text(json.dumps(content))


def work(tasks):
    evaluation.SAMPLE_TOKENS = 8
    dist.init_process_group("gloo")
    for task, arguments in tasks:
        does = {"trained": trained, "copied": copied, "gradients": gradients, "memory": memory}
        does[task](dist.get_rank(), dist.get_world_size(), **arguments)
    dist.destroy_process_group()


def fork(size, tasks):
    """Fork the ranks with the variables that torchrun sets. Returns whether all succeeded.

    What a training imports while it runs is imported before, once for all.
    """
    import matplotlib.figure  # noqa: F401
    import rich.progress  # noqa: F401
    import torch._dynamo
    import torch.distributed.checkpoint
    import torch.distributed.fsdp  # noqa: F401

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    os.environ["TORCHELASTIC_RUN_ID"] = "forked"
    children = []
    for rank in map(str, range(size)):
        child = os.fork()
        if child == 0:
            os.environ |= {"RANK": rank, "LOCAL_RANK": rank}
            work(tasks)
            sys.exit()
        children.append(child)
    return not any([os.waitpid(child, 0)[1] for child in children])


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    if "RANK" in os.environ:
        work(given)
    elif not all(fork(size, tasks) for size, tasks in given):
        sys.exit(1)
