"""The embedding of a text: the mean of the last hidden states of its tokens."""

import torch
from torch import Tensor

from ysnake.model.network import Model


class MeanState:
    """Reads tokens in pieces and keeps the sum of their last hidden states."""

    def __init__(self, model: Model):
        """The layers of `model` are used as they are, also those of a `Decoder`."""
        self.backbone, self.state = model.backbone, model.empty_state(1)
        self.device = model.backbone.embeddings.weight.device
        self.sum = torch.zeros(model.config.d_model, dtype=torch.float64)
        self.n_tokens = 0

    @torch.no_grad()
    def feed(self, ids: list[int]) -> None:
        """Read these tokens."""
        hidden = self.backbone(torch.tensor([ids], device=self.device), None, self.state)
        self.sum += hidden[0].sum(0).cpu()
        self.n_tokens += len(ids)

    def vector(self) -> Tensor:
        """The mean (d_model,) of all tokens read so far, scaled to length 1."""
        mean = self.sum / self.n_tokens
        return (mean / mean.norm().clamp(min=1e-12)).float()
