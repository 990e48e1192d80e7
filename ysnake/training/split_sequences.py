"""One sequence split over several processes: each mixer passes its state on to the next process."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist

    from ysnake.model.network import LayerState, Mixer


class Line:
    """The ranks that share a sequence, in its order: the `Neighbours` of ysnake_kernels."""

    def __init__(self, rank: int, size: int, group: "dist.ProcessGroup"):
        """`size` ranks share each sequence, neighbours in number; `group` holds them."""
        place = rank % size
        last = place + 1 == size
        self.beside = {1: None if last else rank + 1, -1: rank - 1 if place else None}
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


def split_sequences(mixer: "Mixer", line: Line) -> None:
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
            mixer.rates(),
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
