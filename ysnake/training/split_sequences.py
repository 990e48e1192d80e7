"""Sequences split over several processes: each mixer sends its state to the next process."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist


class SequenceNeighbours:
    """The ranks that hold the neighbouring parts of a sequence: `Neighbours` of ysnake_kernels."""

    def __init__(self, rank: int, size: int, group: "dist.ProcessGroup"):
        """`size` ranks with successive numbers share each sequence; they form `group`."""
        place = rank % size
        last = place + 1 == size
        self.neighbour = {1: None if last else rank + 1, -1: rank - 1 if place else None}
        self.group = group
        self.pending_sends: list[tuple[Any, torch.Tensor]] = []

    def exchange(self, tensor: "torch.Tensor", step: int) -> "torch.Tensor | None":
        import torch
        import torch.distributed as dist

        to, source = self.neighbour[step], self.neighbour[-step]
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

        if self.neighbour[-step] is None:
            return None
        received = torch.empty_like(like)
        dist.recv(received, self.neighbour[-step], self.group)
        return received

    def send(self, tensor: "torch.Tensor", step: int) -> None:
        import torch.distributed as dist

        if self.neighbour[step] is not None:
            self.finish_sends()
            sending = dist.isend(tensor, self.neighbour[step], self.group)
            self.pending_sends.append((sending, tensor))

    def finish_sends(self) -> None:
        """Complete what was sent, which gloo does only in wait().

        Before a further state is sent, this waits for nobody: an exchange of edges came after the
        state before, so that one has arrived.
        """
        for sending, _ in self.pending_sends:
            sending.wait()
        self.pending_sends.clear()
