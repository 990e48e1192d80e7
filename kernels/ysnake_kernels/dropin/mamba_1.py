"""mamba_ssm's Mamba layer, of Mamba-1.

Constructor arguments, parameter names and shapes, and so checkpoints, are theirs.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ysnake_kernels.dropin.functions import (
    causal_conv1d_fn,
    causal_conv1d_update,
    selective_state_update,
)
from ysnake_kernels.selective_scan import selective_scan


class Mamba(nn.Module):
    """The Mamba-1 block: projection in, convolution, selective scan, gate, projection out.

    `use_fast_path` is accepted and has no effect.

    Raises:
        ValueError: a `dt_init` that does not exist.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        dt_rank: int | str = "auto",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init: str = "random",
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        conv_bias: bool = True,
        bias: bool = False,
        use_fast_path: bool = True,
        layer_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if dt_init not in ("random", "constant"):
            raise ValueError(f"dt_init: expected 'random' or 'constant', got {dt_init!r}")
        self.d_model, self.d_state, self.d_conv, self.expand = d_model, d_state, d_conv, expand
        self.d_inner, self.layer_idx = expand * d_model, layer_idx
        self.dt_rank = math.ceil(d_model / 16) if isinstance(dt_rank, str) else dt_rank
        self.activation = "silu"
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.in_proj = nn.Linear(d_model, 2 * self.d_inner, bias=bias, **made)
        self.conv1d = nn.Conv1d(
            self.d_inner,
            self.d_inner,
            d_conv,
            groups=self.d_inner,
            padding=d_conv - 1,
            bias=conv_bias,
            **made,
        )
        self.x_proj = nn.Linear(self.d_inner, self.dt_rank + 2 * d_state, bias=False, **made)
        self.dt_proj = nn.Linear(self.dt_rank, self.d_inner, **made)
        std = dt_scale * self.dt_rank**-0.5
        low, high = math.log(dt_min), math.log(dt_max)
        dt = torch.empty(self.d_inner, **made).uniform_(low, high).exp_().clamp_(min=dt_init_floor)
        with torch.no_grad():
            self.dt_proj.weight.uniform_(-std if dt_init == "random" else std, std)
            self.dt_proj.bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # inverse of softplus
        rates = torch.arange(1, d_state + 1, dtype=torch.float32, device=device)
        self.A_log = nn.Parameter(rates.log().repeat(self.d_inner, 1))
        self.D = nn.Parameter(torch.ones(self.d_inner, device=device))
        for parameter in (self.A_log, self.D):
            parameter._no_weight_decay = True  # type: ignore[attr-defined]
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias, **made)

    def forward(self, hidden_states: Tensor, inference_params: Any = None) -> Tensor:
        """The output of the block, in the shape of hidden_states (batch, length, d_model).

        Args:
            inference_params: has `key_value_memory_dict`, where this layer keeps its states under
                `layer_idx`, and `seqlen_offset`, 0 for the prompt and above 0 for later tokens.
        """
        states = None
        if inference_params is not None:
            states = self._cached(inference_params.key_value_memory_dict, len(hidden_states))
            if inference_params.seqlen_offset > 0:
                return self.step(hidden_states, *states)[0]
        before, z = self.in_proj(hidden_states).transpose(1, 2).chunk(2, dim=1)
        if states is not None:  # the last d_conv tokens
            last = before[..., -self.d_conv :]
            states[0].copy_(F.pad(last, (self.d_conv - last.shape[-1], 0)))
        taps, bias = self.conv1d.weight[:, 0], self.conv1d.bias
        x = causal_conv1d_fn(before, taps, bias, activation=self.activation)
        assert isinstance(x, Tensor)
        dt, B, C = self._steps_and_projections(x.transpose(1, 2))
        y, last = selective_scan(
            *(x, dt.transpose(1, 2), self._A(), B.transpose(1, 2), C.transpose(1, 2)),
            D=self.D.float(),
            z=z,
            delta_bias=self.dt_proj.bias.float(),
            delta_softplus=True,
            return_last_state=True,
        )
        if states is not None:
            states[1].copy_(last)
        return self.out_proj(y.transpose(1, 2))

    def step(
        self, hidden_states: Tensor, conv_state: Tensor, ssm_state: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One token (batch, 1, d_model); the states are updated in place, and returned."""
        if hidden_states.shape[1] != 1:
            raise ValueError(f"hidden_states: expected 1 token, got {hidden_states.shape[1]}")
        x, z = self.in_proj(hidden_states[:, 0]).chunk(2, dim=1)
        taps, bias = self.conv1d.weight[:, 0], self.conv1d.bias
        x = causal_conv1d_update(x, conv_state, taps, bias, self.activation)
        dt, B, C = self._steps_and_projections(x)
        dt_bias = self.dt_proj.bias.float()
        y = selective_state_update(
            *(ssm_state, x, dt, self._A(), B, C, self.D, z, dt_bias), dt_softplus=True
        )
        return self.out_proj(y)[:, None], conv_state, ssm_state

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """The states before the first token; their size does not depend on `max_seqlen`."""
        conv = self.conv1d.weight.new_zeros(batch_size, self.d_inner, self.d_conv, dtype=dtype)
        ssm = self.dt_proj.weight.new_zeros(batch_size, self.d_inner, self.d_state, dtype=dtype)
        return conv, ssm

    def _cached(self, memory: dict[int, Any], batch: int) -> tuple[Tensor, Tensor]:
        if self.layer_idx is None:
            raise ValueError("layer_idx: expected a number to keep states under, got None")
        if self.layer_idx not in memory:
            memory[self.layer_idx] = self.allocate_inference_cache(batch, 0)
        return memory[self.layer_idx]

    def _steps_and_projections(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """dt before its bias, B and C of x [... d_inner]."""
        dt, B, C = self.x_proj(x).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        return F.linear(dt, self.dt_proj.weight), B, C

    def _A(self) -> Tensor:
        return -torch.exp(self.A_log.float())
