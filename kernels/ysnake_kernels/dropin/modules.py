"""mamba_ssm's Mamba2 layer.

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
    mamba_chunk_scan_combined,
    mamba_split_conv1d_scan_combined,
    selective_state_update,
)
from ysnake_kernels.dropin.norms import GatedRMSNorm as RMSNorm
from ysnake_kernels.linear import Linear
from ysnake_kernels.mixer import MixerSizes


class Mamba2(nn.Module):
    """The Mamba-2 block: projection in, convolution, scan, gated norm, projection out.

    With `d_ssm`, only that many of the expand * d_model features go through the scan. The others go
    through a gated linear unit.

    Raises:
        ValueError: sizes that do not divide one another.
        NotImplementedError: `process_group`, tensor parallelism.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 128,
        d_conv: int = 4,
        conv_init: float | None = None,
        expand: int = 2,
        headdim: int = 64,
        d_ssm: int | None = None,
        ngroups: int = 1,
        A_init_range: tuple[float, float] = (1, 16),
        D_has_hdim: bool = False,
        rmsnorm: bool = True,
        norm_before_gate: bool = False,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        dt_limit: tuple[float, float] = (0.0, float("inf")),
        bias: bool = False,
        conv_bias: bool = True,
        chunk_size: int = 256,
        use_mem_eff_path: bool = True,
        layer_idx: int | None = None,
        process_group: Any = None,
        sequence_parallel: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if process_group is not None:
            raise NotImplementedError("process_group: tensor parallelism is not offered")
        self.d_model, self.d_state, self.d_conv, self.expand = d_model, d_state, d_conv, expand
        self.headdim, self.ngroups, self.chunk_size = headdim, ngroups, chunk_size
        self.D_has_hdim, self.rmsnorm, self.norm_before_gate = D_has_hdim, rmsnorm, norm_before_gate
        self.dt_limit, self.use_mem_eff_path, self.layer_idx = dt_limit, use_mem_eff_path, layer_idx
        self.activation = "silu"
        self.d_inner = expand * d_model
        self.d_ssm = self.d_inner if d_ssm is None else d_ssm
        self.d_mlp = self.d_inner - self.d_ssm
        if self.d_ssm % headdim:
            raise ValueError(f"headdim: expected a divisor of {self.d_ssm}, got {headdim}")
        self.nheads = self.d_ssm // headdim
        if self.nheads % ngroups:
            raise ValueError(f"ngroups: expected a divisor of {self.nheads} heads, got {ngroups}")
        self._sizes = MixerSizes(self.d_ssm, self.nheads, ngroups, d_state)
        self.d_xbc = self._sizes.channels
        made: dict[str, Any] = {"device": device, "dtype": dtype}

        features = 2 * self.d_mlp + sum(self._sizes.projection)
        self.in_proj = Linear(d_model, features, bias=bias, **made)
        self.conv1d = nn.Conv1d(
            self.d_xbc,
            self.d_xbc,
            d_conv,
            groups=self.d_xbc,
            padding=d_conv - 1,
            bias=conv_bias,
            **made,
        )
        if conv_init is not None:
            nn.init.uniform_(self.conv1d.weight, -conv_init, conv_init)
        low, high = math.log(dt_min), math.log(dt_max)
        dt = torch.empty(self.nheads, **made).uniform_(low, high).exp_().clamp_(min=dt_init_floor)
        self.dt_bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))  # inverse of softplus
        A = torch.empty(self.nheads, device=device).uniform_(*A_init_range)
        self.A_log = nn.Parameter(A.log_().to(dtype))
        skips = self.d_ssm if D_has_hdim else self.nheads
        self.D = nn.Parameter(torch.ones(skips, device=device))
        for parameter in (self.dt_bias, self.A_log, self.D):
            parameter._no_weight_decay = True  # type: ignore[attr-defined]
        if rmsnorm:
            size = self.d_ssm // ngroups
            self.norm = RMSNorm(self.d_ssm, 1e-5, size, norm_before_gate, **made)
        self.out_proj = Linear(self.d_inner, d_model, bias=bias, **made)

    def forward(
        self,
        u: Tensor,
        seqlen: int | None = None,
        seq_idx: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        inference_params: Any = None,
    ) -> Tensor:
        """The output of the block, in the shape of u.

        Args:
            u: (batch, length, d_model), or with `seqlen` (batch * seqlen, d_model).
            seq_idx, cu_seqlens: packed sequences, as in `mamba_chunk_scan_combined`.
            inference_params: has `key_value_memory_dict`, where this layer keeps its states under
                `layer_idx`, and `seqlen_offset`, 0 for the prompt and above 0 for later tokens.
        """
        shape = u.shape
        if seqlen is not None:
            u = u.unflatten(0, (-1, seqlen))
        states = None
        if inference_params is not None:
            batch = u.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
            states = self._cached(inference_params.key_value_memory_dict, batch)
            if inference_params.seqlen_offset > 0:
                return self.step(u, *states)[0].view(shape)
        zxbcdt = self.in_proj(u)
        whole = self.use_mem_eff_path and self.d_mlp == 0 and states is None and cu_seqlens is None
        if not whole:
            return self._in_parts(zxbcdt, seq_idx, cu_seqlens, states).view(shape)
        out = mamba_split_conv1d_scan_combined(
            zxbcdt,
            self.conv1d.weight[:, 0],
            self.conv1d.bias,
            self.dt_bias,
            self._A(),
            self._D(),
            self.chunk_size,
            seq_idx=seq_idx,
            dt_limit=self.dt_limit,
            activation=self.activation,
            rmsnorm_weight=self.norm.weight if self.rmsnorm else None,
            rmsnorm_eps=self.norm.eps if self.rmsnorm else 1e-6,
            outproj_weight=self.out_proj.weight,
            outproj_bias=self.out_proj.bias,
            headdim=self.headdim,
            ngroups=self.ngroups,
            norm_before_gate=self.norm_before_gate,
        )
        assert isinstance(out, Tensor)
        return out.view(shape)

    def step(
        self, hidden_states: Tensor, conv_state: Tensor, ssm_state: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One token (batch, 1, d_model); the states are updated in place, and returned."""
        if hidden_states.shape[1] != 1:
            raise ValueError(f"hidden_states: expected 1 token, got {hidden_states.shape[1]}")
        z0, x0, z, xBC, dt = self._split(self.in_proj(hidden_states[:, 0]))
        taps, bias = self.conv1d.weight[:, 0], self.conv1d.bias
        xBC = causal_conv1d_update(xBC, conv_state, taps, bias, self.activation)
        x, B, C = self._sizes.split_channels(xBC)
        P, D = self.headdim, self._D()
        y = selective_state_update(
            ssm_state,
            x,
            dt[..., None].expand(-1, -1, P),
            self._A()[:, None, None].expand(-1, P, self.d_state),
            B,
            C,
            D if D.ndim == 2 else D[:, None].expand(-1, P),
            z=None if self.rmsnorm else z.unflatten(-1, (-1, P)),
            dt_bias=self.dt_bias[:, None].expand(-1, P),
            dt_softplus=True,
        )
        return self._out(y.flatten(-2), z, z0, x0)[:, None], conv_state, ssm_state

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """The states before the first token; their size does not depend on `max_seqlen`."""
        conv = self.conv1d.weight.new_zeros(batch_size, self.d_conv, self.d_xbc, dtype=dtype)
        ssm = self.in_proj.weight.new_zeros(
            batch_size, self.nheads, self.headdim, self.d_state, dtype=dtype
        )
        return conv.transpose(1, 2), ssm

    def _cached(self, memory: dict[int, Any], batch: int) -> tuple[Tensor, Tensor]:
        if self.layer_idx is None:
            raise ValueError("layer_idx: expected a number to keep states under, got None")
        if self.layer_idx not in memory:
            memory[self.layer_idx] = self.allocate_inference_cache(batch, 0)
        return memory[self.layer_idx]

    def _in_parts(
        self,
        zxbcdt: Tensor,
        seq_idx: Tensor | None,
        cu_seqlens: Tensor | None,
        states: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        """The block as separate operators, for calls that one function cannot take."""
        z0, x0, z, xBC, dt = self._split(zxbcdt)
        xBC = xBC.transpose(1, 2)
        if cu_seqlens is not None and seq_idx is None:
            places = torch.arange(xBC.shape[2], device=xBC.device, dtype=cu_seqlens.dtype)
            seq_idx = (torch.bucketize(places, cu_seqlens, right=True) - 1)[None]
        if states is not None:  # the last d_conv tokens, of each packed sequence
            ends = [xBC.shape[2]] if cu_seqlens is None else cu_seqlens[1:].tolist()
            starts = [0] if cu_seqlens is None else cu_seqlens[:-1].tolist()
            for i, (start, end) in enumerate(zip(starts, ends, strict=True)):
                row = slice(None) if cu_seqlens is None else slice(i, i + 1)
                last = xBC[..., max(start, end - self.d_conv) : end]
                states[0][row] = F.pad(last, (self.d_conv - last.shape[-1], 0))
        taps, bias = self.conv1d.weight[:, 0], self.conv1d.bias
        convolved = causal_conv1d_fn(xBC, taps, bias, seq_idx, activation=self.activation)
        assert isinstance(convolved, Tensor)
        x, B, C = self._sizes.split_channels(convolved.transpose(1, 2))
        out = mamba_chunk_scan_combined(
            x,
            dt,
            self._A(),
            B,
            C,
            self.chunk_size,
            D=self._D(),
            z=None if self.rmsnorm else z.unflatten(-1, (-1, self.headdim)),
            dt_bias=self.dt_bias,
            seq_idx=seq_idx,
            cu_seqlens=cu_seqlens,
            dt_softplus=True,
            dt_limit=self.dt_limit,
            return_final_states=states is not None and cu_seqlens is None,
            return_varlen_states=states is not None and cu_seqlens is not None,
        )
        y, *final = out if isinstance(out, tuple) else (out,)
        if states is not None:
            states[1].copy_(final[0])
        return self._out(y.flatten(-2), z, z0, x0)

    def _split(self, zxbcdt: Tensor) -> tuple[Tensor, ...]:
        return zxbcdt.split([self.d_mlp, self.d_mlp, *self._sizes.projection], dim=-1)

    def _out(self, y: Tensor, z: Tensor, z0: Tensor, x0: Tensor) -> Tensor:
        if self.rmsnorm:
            y = self.norm(y, z)
        if self.d_mlp:
            y = torch.cat([F.silu(z0) * x0, y], dim=-1)
        return self.out_proj(y)

    def _A(self) -> Tensor:
        return -torch.exp(self.A_log.float())

    def _D(self) -> Tensor:
        return self.D.unflatten(0, (-1, self.headdim)) if self.D_has_hdim else self.D
