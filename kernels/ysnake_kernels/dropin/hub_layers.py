"""The operators as layers of the `kernels` package, under the names that transformers looks up.

`kernels.LocalLayerRepository` takes the folder `hub`, and `kernels.register_kernel_mapping` takes
`mapping()`. A layer's `forward` replaces a function of a model, and has the function's arguments.
It does not know which model calls it.
"""

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ysnake_kernels.dropin import for_transformers, functions
from ysnake_kernels.selective_scan import selective_scan

FOLDER = Path(__file__).with_name("hub")
NAMES = (
    "causal_conv1d_fn",
    "causal_conv1d_update",
    "mamba_chunk_scan_combined",
    "selective_scan_fn",
    "selective_state_update",
)


def mapping() -> dict[str, dict[str, Any]]:
    """The argument of `kernels.register_kernel_mapping`, for a CPU and for a GPU."""
    # mypy takes our folder of that name for the package
    from kernels import LocalLayerRepository  # type: ignore[attr-defined]

    return {
        name: {device: LocalLayerRepository(FOLDER, layer_name=name) for device in ("cpu", "cuda")}
        for name in NAMES
    }


class causal_conv1d_fn(nn.Module):
    can_torch_compile = has_backward = True

    def forward(
        self,
        hidden_states: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        activation: str | None = None,
        **kwargs: Any,
    ) -> Tensor:
        if kwargs.get("seq_idx") is not None:  # not every model passes it to its scan too
            raise ValueError(
                "seq_idx: packed documents need ysnake_kernels.dropin.install() instead of "
                "use_kernels"
            )
        return for_transformers.convolve(hidden_states, weight, bias, None, activation)


class causal_conv1d_update(nn.Module):
    can_torch_compile, has_backward = True, False

    def forward(
        self,
        hidden_states: Tensor,
        conv_state: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        activation: str | None = None,
    ) -> Tensor:
        update = for_transformers.causal_conv1d_update
        return update(hidden_states, conv_state, weight, bias, activation)


class mamba_chunk_scan_combined(nn.Module):
    can_torch_compile = has_backward = True

    def forward(
        self,
        hidden_states: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        chunk_size: int,
        D: Tensor | None = None,
        dt_bias: Tensor | None = None,
        initial_states: Tensor | None = None,
        dt_softplus: bool = False,
        dt_limit: tuple[float, float] = (0.0, float("inf")),
        return_final_states: bool = False,
        **kwargs: Any,
    ) -> Tensor | tuple[Tensor, ...]:
        return functions.mamba_chunk_scan_combined(
            *(hidden_states, dt, A, B, C, chunk_size, D),
            z=kwargs.get("z"),
            dt_bias=dt_bias,
            initial_states=initial_states,
            seq_idx=kwargs.get("seq_idx"),
            dt_softplus=dt_softplus,
            dt_limit=dt_limit,
            return_final_states=return_final_states,
        )


class selective_scan_fn(nn.Module):
    can_torch_compile = has_backward = True

    def forward(
        self,
        hidden_states: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None = None,
        z: Tensor | None = None,
        delta_bias: Tensor | None = None,
        delta_softplus: bool = False,
        return_last_state: bool = False,
        use_mambapy: bool = False,
        use_associative_scan: bool = False,
        **kwargs: Any,
    ) -> Tensor | tuple[Tensor, Tensor]:
        options = (D, z, delta_bias, delta_softplus, return_last_state)
        return selective_scan(hidden_states, dt, A, B, C, *options)


class selective_state_update(nn.Module):
    can_torch_compile, has_backward = True, False

    def forward(
        self,
        state: Tensor,
        hidden_states: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None = None,
        dt_bias: Tensor | None = None,
        dt_softplus: bool = False,
        z: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        options = (D, z, dt_bias, dt_softplus)
        return functions.selective_state_update(state, hidden_states, dt, A, B, C, *options)
