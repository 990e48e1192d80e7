"""Many processes: who this one is among them, how they share the work, and what they agree on.

`torchrun` starts them all with the same command line. A `Ranks` says which one this is, spreads a
model over all of them and gives each its part of every batch, so that together they take the steps
of one process. In a process that was started alone a `Ranks` does nothing.
"""

import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ysnake.model.config import IGNORED
from ysnake.shared import cli
from ysnake.shared.errors import InputError
from ysnake.training.launch import RESTARTS, heard_once, launched, wait_to_be_ended
from ysnake.training.split_sequences import Line, split_sequences

if TYPE_CHECKING:
    import numpy as np
    import torch
    import torch.distributed as dist

    from ysnake.model.network import Model
    from ysnake.text.data import Batch

T = TypeVar("T")
STUCK_AFTER = timedelta(minutes=10)  # an exchange that takes longer is an error
FOR_EVER = timedelta(days=30)  # how long the others wait while the first rank works alone
MOMENTS = ("exp_avg", "exp_avg_sq")  # what AdamW remembers of a parameter


@contextmanager
def joined(device: str, context: int, sharded: bool) -> Iterator["Ranks"]:
    """Connect the processes that were started together, as long as the block runs.

    Args:
        device: the option --device.
        context: processes that share a sequence.
        sharded: whether weights and optimizer are spread over all processes.
    """
    if not launched():
        yield Ranks()
        return
    import torch
    import torch.distributed as dist

    with heard_once():
        on_gpu = cli.pick_device(device) == "cuda"
        here, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
        if on_gpu and here > gpus:
            raise InputError(f"--nproc-per-node: {here} processes, but {gpus} GPUs here")
    if on_gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    ours = not dist.is_initialized()
    try:
        if ours:
            _connect("cpu:gloo,cuda:nccl" if on_gpu else "gloo")
        patient = dist.new_group(backend="gloo", timeout=FOR_EVER)
        yield Ranks(dist.get_rank(), dist.get_world_size(), context, sharded, patient)
    except RuntimeError as error:
        if not lost_contact(error):
            raise
        if os.environ["RANK"] == "0":
            print(
                "error: lost contact with another process, which failed or was killed (the "
                "launcher's report names it); --resume goes on from the last checkpoint",
                file=sys.stderr,
                flush=True,
            )
        wait_to_be_ended(cli.FAILED, error)
    finally:
        if ours and dist.is_initialized():
            dist.destroy_process_group()


def _connect(backend: str) -> None:
    """Connect this process with the others of its launch.

    They find each other's addresses in a store. torchrun keeps that for all its restarts, with the
    addresses of the processes that it has ended. So each restart has a part of its own.
    """
    import torch.distributed as dist

    store, rank, size = next(dist.rendezvous("env://", timeout=STUCK_AFTER))
    part = f"restart {os.environ.get(RESTARTS, 0)} of {size}"
    store = dist.PrefixStore(part, store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=STUCK_AFTER)


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
        wait_to_be_ended(cli.WRONG_INPUT, InputError(errors[failed[0]]))

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

            line = Line(self.rank, self.context, dist.new_subgroups(self.context)[0])
            for layer in model.backbone.layers:
                split_sequences(layer.mixer, line)
        if self.sharded:
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

            mesh = init_device_mesh(device, (self.size,))
            for module in (*model.backbone.layers, model):  # each moves its weights to the device
                fully_shard(module, mesh=mesh)
            # that a block returns a view: no block changes in place what another has returned
            warnings.filterwarnings("ignore", "FSDP2-wrapped module", UserWarning)
            register_fsdp_forward_method(model, "loss")
            return model.loss
        model.to(device)
        if self.size == 1:
            return model.loss
        import torch
        from torch import nn
        from torch.nn.parallel import DistributedDataParallel

        class Loss(nn.Module):
            """`loss` as the forward that DDP looks for."""

            def __init__(self) -> None:
                super().__init__()
                self.model = model

            def forward(self, *batch: Any) -> "torch.Tensor":
                return model.loss(*batch)

        loss = DistributedDataParallel(Loss(), gradient_as_bucket_view=True)
        # The first backward pass decides in which order gradients are exchanged from then on, and
        # with it their last bits. So it is made at once: the first step is then like all others.
        ids = torch.zeros(1, model.config.conv_width, dtype=torch.int64, device=device)
        loss(ids, ids).backward()
        model.zero_grad()
        return loss

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

        def write() -> None:
            with _failures_named(folder, "cannot be written"):
                checkpoint.save(moments, storage_writer=writer, process_group=self.patient)

        self.together(write)
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

            def read() -> None:
                with warnings.catch_warnings(), _failures_named(folder, "damaged"):
                    warnings.simplefilter("ignore", UserWarning)  # about a single process
                    checkpoint.load(moments, storage_reader=reader, process_group=self.patient)

            self.together(read)
            for name, p in model.named_parameters():
                optimizer.state[p] = {m: moments[f"{m}.{name}"] for m in MOMENTS}
                optimizer.state[p]["step"] = torch.tensor(saved["steps"], device=p.device)


@contextmanager
def _failures_named(folder: Path, what: str) -> Iterator[None]:
    """Raise InputError, on every rank, where torch fails on a file in `folder` on one of them."""
    from torch.distributed.checkpoint import CheckpointException

    try:
        yield
    except CheckpointException as error:
        reason = str(next(iter(error.failures.values()))[0]).partition("\n")[0]
        raise InputError(f"{folder}: {what} ({reason})") from error


def number(tensor: "torch.Tensor") -> float:
    """The value of a scalar, whether every rank has it or a share."""
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).item()
