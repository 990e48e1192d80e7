"""Many processes: who this one is among them, how they share the work, and what they agree on.

The one file that knows of processes. `torchrun` starts them all with the same command line; a
`Ranks` says which one this is, spreads a model over them from outside, and gives each its part of
every batch, so that together they take the steps of one process. Started alone, all of it is idle.
"""

import io
import os
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ysnake import cli
from ysnake.config import IGNORED, InputError, ModelConfig
from ysnake.settings import Settings

if TYPE_CHECKING:
    import numpy as np
    import torch
    import torch.distributed as dist

    from ysnake.data import Batch
    from ysnake.model import LayerState, Mixer, Model

T = TypeVar("T")
TORCHRUN = "torchrun --nproc-per-node N -m ysnake.train ..."
STUCK_AFTER = timedelta(minutes=10)  # an exchange that takes longer is an error
FOR_EVER = timedelta(days=30)  # how long the others wait while the first rank works alone
TO_BE_NAMED = 10  # seconds in which torchrun names the rank that failed first, and ends the others
MOMENTS = ("exp_avg", "exp_avg_sq")  # what AdamW remembers of a parameter


def launched() -> bool:
    """Whether a launcher started this process as one of several."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


@contextmanager
def heard_once() -> Iterator[None]:
    """For what every rank does alike on its own: the first rank alone prints, errors too."""
    if int(os.environ.get("RANK", 0)) == 0:
        yield
        return
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        try:
            yield
        except InputError as error:
            _wait_to_be_ended(cli.WRONG_INPUT, error)
        except SystemExit as error:
            if error.code:
                _wait_to_be_ended(error.code, error)
            raise


def _wait_to_be_ended(code: Any, cause: BaseException) -> None:
    """End after the rank whose error it is, so that it has said its line and is the one named."""
    time.sleep(TO_BE_NAMED)
    raise SystemExit(code) from cause


def check(settings: Settings) -> None:
    """Raise InputError where these settings cannot be shared out to the processes there are."""
    size, context = int(os.environ.get("WORLD_SIZE", 1)), settings.context_parallel
    if not launched():
        if settings.shard or context > 1:
            option = "--shard" if settings.shard else "--context-parallel"
            raise InputError(f"{option}: needs several processes; start them with {TORCHRUN}")
        return
    if size % context:
        raise InputError(
            f"--context-parallel: expected a divisor of {size} processes, got {context}"
        )
    if settings.seq_len % context:
        raise InputError(
            f"--seq-len: {settings.seq_len} tokens cannot be split evenly over the {context} "
            "processes of --context-parallel"
        )
    if settings.seq_len // context < ModelConfig.conv_width - 1:
        raise InputError(
            f"--seq-len: {settings.seq_len // context} tokens for each of {context} processes are "
            "fewer than the convolution reaches back"
        )
    if settings.batch_size % (size // context):
        raise InputError(
            f"--batch-size: {settings.batch_size} sequences cannot be shared out evenly to "
            f"{size // context} {'groups of ' * (context > 1)}processes; it counts those of all"
        )
    if size > 1 and settings.memory is not None and not settings.resume:
        raise InputError(
            "--memory: plans for one process; with several give --batch-size, --accumulate and "
            "--recompute"
        )
    if context > 1 and settings.carry_state:
        raise InputError("--carry-state: hands states on in time, so not with --context-parallel")
    if settings.device not in ("auto", "cpu", "cuda"):
        raise InputError(
            f"--device: expected auto, cpu or cuda with many processes, got {settings.device}"
        )


@contextmanager
def joined(settings: Settings) -> Iterator["Ranks"]:
    """The processes that were started together, connected as long as the block runs."""
    if not launched():
        yield Ranks()
        return
    import torch
    import torch.distributed as dist

    with heard_once():
        on_gpu = cli.pick_device(settings.device) == "cuda"
        here, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
        if on_gpu and here > gpus:
            raise InputError(f"--nproc-per-node: {here} processes, but {gpus} GPUs here")
    if on_gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    ours = not dist.is_initialized()
    if ours:
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=STUCK_AFTER)
    rank, size, context = dist.get_rank(), dist.get_world_size(), settings.context_parallel
    patient = dist.new_group(backend="gloo", timeout=FOR_EVER)
    try:
        yield Ranks(rank, size, context, settings.shard, patient)
    except RuntimeError as error:
        if not lost_contact(error):
            raise
        if rank == 0:
            print(
                "error: lost contact with another process, which failed or was killed (the "
                "launcher's report names it); --resume goes on from the last checkpoint",
                file=sys.stderr,
                flush=True,
            )
        _wait_to_be_ended(cli.FAILED, error)
    finally:
        if ours:
            dist.destroy_process_group()


def lost_contact(error: BaseException) -> bool:
    """Whether it is an exchange with another process that failed."""
    import torch.distributed as dist

    return isinstance(error, dist.DistError) or "gloo" in str(error)


@dataclass(frozen=True)
class Ranks:
    """Which process this is, and how the processes share the work."""

    rank: int = 0
    size: int = 1
    context: int = 1  # ranks that share a sequence, neighbours in number
    sharded: bool = False
    patient: "dist.ProcessGroup | None" = None  # where one may wait for another for long

    @property
    def first(self) -> bool:
        """Whether this is the one that writes and draws."""
        return self.rank == 0

    @property
    def data_size(self) -> int:
        """Groups of ranks that have different sequences."""
        return self.size // self.context

    # What all ranks agree on.

    def together(self, work: Callable[[], T]) -> T:
        """Each rank's own work(). An InputError on any ends all, and is said once."""
        if self.size == 1:
            return work()
        import torch.distributed as dist

        result, said = None, None
        try:
            result = work()
        except InputError as error:
            said = str(error)
        errors: list[str | None] = [None] * self.size
        dist.all_gather_object(errors, said, group=self.patient)
        failed = [rank for rank, error in enumerate(errors) if error is not None]
        if not failed:
            return result
        if self.rank == failed[0]:
            raise InputError(said)
        _wait_to_be_ended(cli.WRONG_INPUT, InputError(errors[failed[0]]))

    def alone(self, work: Callable[[], T]) -> T | None:
        """work() on the first rank, which the others wait for; None on these."""
        return self.together(work if self.first else lambda: None)

    def as_first(self, value: T) -> T:
        """The first rank's value."""
        if self.size == 1:
            return value
        import torch.distributed as dist

        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        import torch

        return self.total(torch.tensor(float(flag))) > 0

    def total(self, share: "torch.Tensor") -> float:
        """The sum of every rank's share of a number."""
        if self.size > 1:
            import torch.distributed as dist

            dist.all_reduce(share)
        return share.item()

    # A rank's part of a batch.

    def part(self, batch: "Batch") -> "Batch":
        """This rank's rows of a batch, and its tokens of these.

        A batch of any number of rows: what is missing is made up with rows that do not count. Of
        tokens that are split, seq_idx has the one before them too.
        """
        if self.size == 1:
            return batch
        import numpy as np

        rows = self.rows(len(batch.ids))
        counts = rows < len(batch.ids)
        rows = rows % len(batch.ids)
        parts = {name: array[rows] for name, array in vars(batch).items()}
        parts["targets"][~counts] = IGNORED
        if self.context > 1:
            length = batch.ids.shape[1] // self.context
            start = self.rank % self.context * length
            for name in ("ids", "targets"):
                parts[name] = parts[name][:, start : start + length]
            before = np.maximum(np.arange(start - 1, start + length), 0)
            parts["seq_idx"] = parts["seq_idx"][:, before]
        return replace(batch, **parts)

    def rows(self, n_rows: int) -> "np.ndarray":
        """The numbers of this rank's rows among n_rows; as many on every rank, so maybe beyond."""
        import numpy as np

        share = -(-n_rows // self.data_size)
        return self.rank // self.context * share + np.arange(share)

    def all_rows(self, share: "torch.Tensor") -> "torch.Tensor":
        """Every rank's rows one below the other."""
        if self.size == 1:
            return share
        import torch
        import torch.distributed as dist

        shares = [torch.empty_like(share) for _ in range(self.size)]
        dist.all_gather(shares, share.contiguous())
        return torch.cat(shares)

    # A model on all ranks.

    def spread(self, model: "Model", device: str) -> Callable[..., "torch.Tensor"]:
        """Put the model to work on all ranks; returns what takes the place of its `loss`.

        Gradients are averaged over the ranks in backward.
        """
        if self.context > 1:
            import torch.distributed as dist

            line = _Line(self, dist.new_subgroups(self.context)[0])
            for layer in model.backbone.layers:
                _split_sequences(layer.mixer, line)
        if self.sharded:
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

            mesh = init_device_mesh(device, (self.size,))
            for module in (*model.backbone.layers, model):  # each moves its weights to the device
                fully_shard(module, mesh=mesh)
            register_fsdp_forward_method(model, "loss")
            return model.loss
        model.to(device)
        if self.size == 1:
            return model.loss
        from torch import nn
        from torch.nn.parallel import DistributedDataParallel

        class Loss(nn.Module):
            """`loss` as the forward that DDP looks for."""

            def __init__(self) -> None:
                super().__init__()
                self.model = model

            def forward(self, *batch: Any) -> "torch.Tensor":
                return model.loss(*batch)

        return DistributedDataParallel(Loss(), gradient_as_bucket_view=True)

    def exchanging(self, loss: Callable, now: bool) -> Any:
        """Context of a forward and a backward pass: whether gradients are exchanged already."""
        return nullcontext() if now or not hasattr(loss, "no_sync") else loss.no_sync()

    def whole(self, model: "Model") -> "Model | None":
        """The model with all its weights on the first rank; None on the others."""
        if self.sharded:
            import torch
            from torch.distributed.checkpoint.state_dict import (
                StateDictOptions,
                get_model_state_dict,
            )

            options = StateDictOptions(full_state_dict=True, cpu_offload=True)
            weights = get_model_state_dict(model, options=options)
            if self.first:
                with torch.device("meta"):
                    model = type(model)(model.config)
                model.load_state_dict(weights, assign=True)
        return model if self.first else None

    # The optimizer's memory: in last/ as it is or, sharded, in a folder that all ranks write.

    def save_optimizer(self, model: "Model", optimizer: Any, folder: Path) -> dict[str, Any]:
        """What resuming needs, on the first rank; sharded, it leads to files in `folder`."""
        if not self.sharded:
            return optimizer.state_dict()
        from torch.distributed import checkpoint

        self.alone(lambda: shutil.rmtree(folder, ignore_errors=True))
        if not optimizer.state:  # before the first step
            return {"steps": 0}
        moments = {
            f"{moment}.{name}": optimizer.state[parameter][moment]
            for name, parameter in model.named_parameters()
            for moment in MOMENTS
        }
        # safetensors: torch's own format would be read with pickle
        writer = checkpoint.HuggingFaceStorageWriter(str(folder), save_distributed=True)
        checkpoint.save(moments, storage_writer=writer, process_group=self.patient)
        return {"steps": next(iter(optimizer.state.values()))["step"].item()}

    def load_optimizer(
        self, model: "Model", optimizer: Any, saved: dict[str, Any], folder: Path
    ) -> None:
        """Take over what `save_optimizer` returned and wrote, on any number of ranks."""
        if "state" in saved and not self.sharded:
            optimizer.load_state_dict(saved)
            return
        import torch
        from torch.distributed import checkpoint
        from torch.distributed.tensor import distribute_tensor

        if "state" in saved:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            for i, memory in saved["state"].items():
                p = parameters[i]
                spread = {
                    m: distribute_tensor(
                        memory[m].to(p.device), p.device_mesh, p.placements, src_data_rank=None
                    )
                    for m in MOMENTS
                }
                optimizer.state[p] = spread | {"step": memory["step"].to(p.device)}
        elif saved["steps"]:
            moments = {
                f"{m}.{name}": torch.zeros_like(p, requires_grad=False)
                for name, p in model.named_parameters()
                for m in MOMENTS
            }
            reader = checkpoint.HuggingFaceStorageReader(str(folder))
            with warnings.catch_warnings():  # about loading in a single process
                warnings.simplefilter("ignore", UserWarning)
                checkpoint.load(moments, storage_reader=reader, process_group=self.patient)
            for name, p in model.named_parameters():
                optimizer.state[p] = {m: moments[f"{m}.{name}"] for m in MOMENTS}
                optimizer.state[p]["step"] = torch.tensor(saved["steps"], device=p.device)


class _Line:
    """The ranks that share a sequence, in its order: the `Neighbours` of ysnake_kernels."""

    def __init__(self, ranks: Ranks, group: "dist.ProcessGroup"):
        place = ranks.rank % ranks.context
        last = place + 1 == ranks.context
        self.beside = {1: None if last else ranks.rank + 1, -1: ranks.rank - 1 if place else None}
        self.group = group
        self.on_the_way: list[tuple[Any, torch.Tensor]] = []

    def exchange(self, tensor: "torch.Tensor", step: int) -> "torch.Tensor | None":
        import torch
        import torch.distributed as dist

        to, source = self.beside[step], self.beside[-step]
        tensor, received = tensor.contiguous(), None
        passing = []
        if to is not None:
            passing.append(dist.P2POp(dist.isend, tensor, to, self.group))
        if source is not None:
            received = torch.empty_like(tensor)
            passing.append(dist.P2POp(dist.irecv, received, source, self.group))
        for work in dist.batch_isend_irecv(passing):
            work.wait()
        return received

    def receive(self, like: "torch.Tensor", step: int) -> "torch.Tensor | None":
        import torch
        import torch.distributed as dist

        if self.beside[-step] is None:
            return None
        received = torch.empty_like(like)
        dist.recv(received, self.beside[-step], self.group)
        return received

    def send(self, tensor: "torch.Tensor", step: int) -> None:
        import torch.distributed as dist

        if self.beside[step] is not None:
            self.on_the_way = [(w, t) for w, t in self.on_the_way if not w.is_completed()]
            self.on_the_way.append((dist.isend(tensor, self.beside[step], self.group), tensor))


def _split_sequences(mixer: "Mixer", line: _Line) -> None:
    """Let the mixer read its part of sequences, unless it is given a state to read on from."""
    from ysnake_kernels.mixer.part import mixer_part

    read_on = mixer.forward

    def forward(
        projected: "torch.Tensor",
        seq_idx: "torch.Tensor | None",
        state: "LayerState | None",
        last_only: bool,
    ) -> "torch.Tensor":
        if state is not None:
            return read_on(projected, seq_idx, state, last_only)
        c = mixer.config
        return mixer_part(
            projected,
            mixer.conv1d.weight[:, 0],
            mixer.conv1d.bias,
            mixer.dt_bias,
            -mixer.A_log.float().exp(),
            mixer.D,
            c.chunk_size,
            line,
            seq_idx,
            c.dt_limit,
            mixer.norm.weight,
            c.norm_eps,
            mixer.out_proj.weight,
            mixer.out_proj.bias,
            c.n_groups,
        )

    mixer.forward = forward


def number(tensor: "torch.Tensor") -> float:
    """The value of a scalar, whether every rank has it or a share."""
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).item()
