"""Training on several processes: which one this is, how they share the work, and how they agree.

`torchrun` starts all processes with the same command line. `Ranks` knows the number of this
process, distributes a model over all of them and gives each its part of every batch. Together they
take the same steps as a single process. In a single process `Ranks` does nothing.
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
from ysnake.training.launch import (
    RESTARTS,
    end_after_failed_rank,
    launched,
    printed_once,
    processes_here,
)
from ysnake.training.optimizer import make_moments, moments_by_name
from ysnake.training.split_sequences import SequenceNeighbours

if TYPE_CHECKING:
    import numpy as np
    import torch
    import torch.distributed as dist

    from ysnake.model.network import Model
    from ysnake.text.data import Batch

T = TypeVar("T")
STUCK_AFTER = timedelta(minutes=10)  # an exchange between processes that takes longer fails
FOR_EVER = timedelta(days=30)  # the time limit while the others wait for the first rank


@contextmanager
def process_group(device: str, context: int, sharded: bool) -> Iterator["Ranks"]:
    """Connect the processes that were started together, while the block runs.

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

    with printed_once():
        on_gpu = cli.pick_device(device) == "cuda"
        here, gpus = processes_here(), torch.cuda.device_count()
        if on_gpu and here > gpus:
            raise InputError(f"{here} processes, but {gpus} GPUs here", field="--nproc-per-node")
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
                "launcher's report names it); --resume continues from the last checkpoint",
                file=sys.stderr,
                flush=True,
            )
        end_after_failed_rank(cli.FAILED, error)
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
    """Whether an exchange with another process failed."""
    import torch.distributed as dist

    # Gloo raises a plain RuntimeError, so the text has to tell: it names a source file of gloo.
    return isinstance(error, dist.DistError) or "gloo" in str(error)


@dataclass(frozen=True)
class Ranks:
    """Which process this is, and how the processes share the work."""

    rank: int = 0
    size: int = 1
    context: int = 1  # ranks that share a sequence; their numbers follow each other
    sharded: bool = False  # weights and optimizer are spread over all ranks
    patient_group: "dist.ProcessGroup | None" = (
        None  # without a short time limit, to wait for the first rank
    )

    @property
    def first(self) -> bool:
        """Whether this is the first rank, which writes the files."""
        return self.rank == 0

    @property
    def data_size(self) -> int:
        """The number of groups of ranks with different sequences."""
        return self.size // self.context

    # Agreement of all ranks.

    def on_all(self, work: Callable[[], T]) -> T:
        """Run work() on every rank. An InputError on any rank ends all; it is printed once."""
        if self.size == 1:
            return work()
        import torch.distributed as dist

        results: list[T] = []
        said = None
        try:
            results.append(work())
        except InputError as error:
            said = str(error)
        errors: list[str | None] = [None] * self.size
        dist.all_gather_object(errors, said, group=self.patient_group)
        failed = [(rank, error) for rank, error in enumerate(errors) if error is not None]
        if not failed:
            return results[0]
        rank, said = failed[0]
        if self.rank == rank:
            raise InputError(said)
        end_after_failed_rank(cli.WRONG_INPUT, InputError(said))

    def on_first(self, work: Callable[[], T]) -> T | None:
        """Run work() on the first rank only. The others wait, and get None."""
        return self.on_all(work if self.first else lambda: None)

    def from_first(self, value: T) -> T:
        """The value on the first rank."""
        if self.size == 1:
            return value
        import torch.distributed as dist

        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def any(self, flag: bool) -> bool:
        """Whether the flag is true on any rank."""
        import torch

        return self.total(torch.tensor(float(flag))) > 0

    def total(self, share: "torch.Tensor") -> float:
        """The sum of the shares of all ranks."""
        if self.size > 1:
            import torch.distributed as dist

            dist.all_reduce(share)
        return share.item()

    # A rank's part of a batch.

    def own_part(self, batch: "Batch") -> "Batch":
        """This rank's rows of a batch, and its tokens of these rows.

        If the rows cannot be divided evenly, rows that the loss ignores are added. If sequences are
        split, seq_idx also has the token before this rank's tokens.
        """
        if self.size == 1:
            return batch
        import numpy as np

        rows = self.own_rows(len(batch.ids))
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

    def own_rows(self, n_rows: int) -> "np.ndarray":
        """This rank's row indices. All ranks have equally many, so some may be n_rows or more."""
        import numpy as np

        share = -(-n_rows // self.data_size)
        return self.rank // self.context * share + np.arange(share)

    def gather_rows(self, share: "torch.Tensor") -> "torch.Tensor":
        """The rows of all ranks, concatenated."""
        if self.size == 1:
            return share
        import torch
        import torch.distributed as dist

        shares = [torch.empty_like(share) for _ in range(self.size)]
        dist.all_gather(shares, share.contiguous())
        return torch.cat(shares)

    # A model on all ranks.

    def distribute(self, model: "Model", device: str) -> Callable[..., "torch.Tensor"]:
        """Distribute the model over all ranks. Returns the function to call instead of `loss`.

        Backward averages the gradients over the ranks.
        """
        if self.context > 1:
            import torch.distributed as dist

            line = SequenceNeighbours(self.rank, self.context, dist.new_subgroups(self.context)[0])
            for layer in model.backbone.layers:
                layer.mixer.neighbours = line
        if self.sharded:
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

            mesh = init_device_mesh(device, (self.size,))
            for module in (*model.backbone.layers, model):  # each moves its weights to the device
                fully_shard(module, mesh=mesh)
            # FSDP2 warns that a block returns a view. No block changes its input in place.
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
            """`loss` as a forward, which DDP needs."""

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

    def gradient_exchange(self, loss: Callable, now: bool) -> Any:
        """A context for forward and backward. Gradients are exchanged only if `now`."""
        return nullcontext() if now or not hasattr(loss, "no_sync") else loss.no_sync()

    def gathered_model(self, model: "Model") -> "Model | None":
        """The model with all weights on the first rank; None on the others."""
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

    # The optimizer's state: in last/ or, if sharded, in a folder that all ranks write.

    def save_optimizer(self, model: "Model", optimizer: Any, folder: Path) -> dict[str, Any]:
        """The optimizer's state for a checkpoint.

        If it is sharded, all ranks write the moments into `folder`, and only the number of steps is
        returned.
        """
        if not self.sharded:
            return optimizer.state_dict()
        from torch.distributed import checkpoint

        self.on_first(lambda: shutil.rmtree(folder, ignore_errors=True))
        moments = moments_by_name(model, optimizer)
        # safetensors: torch's own format would be read with pickle
        writer = checkpoint.HuggingFaceStorageWriter(str(folder), save_distributed=True)

        def write() -> None:
            with _failures_named(folder, "cannot be written"):
                checkpoint.save(moments, storage_writer=writer, process_group=self.patient_group)

        self.on_all(write)
        return {"steps": next(iter(optimizer.state.values()))["step"].item()}

    def load_optimizer(
        self, model: "Model", optimizer: Any, saved: dict[str, Any], folder: Path
    ) -> None:
        """Restore what `save_optimizer` returned and wrote, on any number of ranks."""
        if "state" in saved and not self.sharded:
            optimizer.load_state_dict(saved)
            return
        from torch.distributed import checkpoint
        from torch.distributed.tensor import distribute_tensor

        if "state" in saved:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            for i, memory in saved["state"].items():
                p = parameters[i]
                spread = {
                    moment: distribute_tensor(
                        tensor.to(p.device), p.device_mesh, p.placements, src_data_rank=None
                    )
                    for moment, tensor in memory.items()
                    if moment != "step"
                }
                optimizer.state[p] = spread | {"step": memory["step"].to(p.device)}
        elif saved["steps"]:
            make_moments(optimizer)
            moments = moments_by_name(model, optimizer)
            reader = checkpoint.HuggingFaceStorageReader(str(folder))

            def read() -> None:
                with warnings.catch_warnings(), _failures_named(folder, "damaged"):
                    warnings.simplefilter("ignore", UserWarning)  # about a single process
                    checkpoint.load(
                        moments, storage_reader=reader, process_group=self.patient_group
                    )

            self.on_all(read)
            for state in optimizer.state.values():
                state["step"].fill_(saved["steps"])


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
    """The value of a scalar tensor, which may be sharded."""
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).item()
