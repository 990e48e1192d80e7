"""The Mamba-2 language model (arXiv 2405.21060): embedding, blocks, norm, head.

Parameter names and shapes are those of Hugging Face's Mamba2ForCausalLM. The model computes in two
forms that agree: whole sequences in parallel, and token by token with a state of constant size.
"""

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from ysnake_kernels import rms_norm_gated
from ysnake_kernels.backend import as_chosen_here
from ysnake_kernels.conv import last_tokens
from ysnake_kernels.layers_step.inputs import LayerWeights
from ysnake_kernels.linear import Linear, normed_linear, products_dtype
from ysnake_kernels.mixer import MixerInputs, MixerSizes, check_and_run
from ysnake_kernels.mixer.part import Neighbours, mixer_part
from ysnake_kernels.mixer_step import MixerWeights, mixer_step
from ysnake_kernels.norm import add_and_norm

from ysnake.model.config import ModelConfig
from ysnake.model.initialisation import initialise
from ysnake.model.loss import summed_loss


@dataclass
class LayerState:
    """The state of one layer. Its size does not depend on the length of the text."""

    # (batch, d_conv, conv_width - 1): the last inputs of the convolution, token by token in memory
    conv: Tensor
    ssm: Tensor  # (batch, n_heads, head_dim, d_state), float32


State = list[LayerState]


class RMSNorm(nn.Module):
    """x / rms(x) * weight; with a gate z, the norm of x * silu(z), over groups of features."""

    def __init__(self, features: int, eps: float, n_groups: int = 1):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(features))
        self.eps, self.group_size = eps, features // n_groups

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        return rms_norm_gated(
            x, self.weight, z=z, eps=self.eps, group_size=self.group_size, norm_before_gate=False
        )


class Mixer(nn.Module):
    """Projection in, convolution, SSD, gated norm, projection out (figure 6 of the paper)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        c = config
        self.sizes = MixerSizes(c.d_inner, c.n_heads, c.n_groups, c.d_state)
        self.in_proj = Linear(c.d_model, sum(self.sizes.projection), bias=c.bias)
        self.conv1d = nn.Conv1d(c.d_conv, c.d_conv, c.conv_width, groups=c.d_conv, bias=c.conv_bias)
        self.dt_bias = nn.Parameter(torch.empty(c.n_heads))
        self.A_log = nn.Parameter(torch.empty(c.n_heads))
        self.D = nn.Parameter(torch.empty(c.n_heads))
        self.norm = RMSNorm(c.d_inner, c.norm_eps, c.n_groups)
        self.out_proj = Linear(c.d_inner, c.d_model, bias=c.bias)
        # The processes with the other parts, where each sequence is split over several.
        self.neighbours: Neighbours | None = None

    def forward(
        self,
        projected: Tensor,
        seq_idx: Tensor | None,
        state: LayerState | None,
        last_only: bool,
    ) -> Tensor:
        """The mixer after in_proj: (batch, length, features) -> (batch, length, d_model).

        Args:
            projected: z, x, B, C and dt of each token, the output of in_proj.
            seq_idx: (batch, length), the document of each token.
            state: where to continue from; it is updated in place. None starts with zeros.
            last_only: return the output of the last token only.
        """
        inference = not torch.is_grad_enabled()
        if state is not None and projected.shape[1] == 1 and inference:
            y = mixer_step(projected[:, 0], state.conv, state.ssm, self.step_weights())
            return self.out_proj(y[:, None])
        if self.neighbours is not None and state is None:
            return mixer_part(self.inputs(projected, seq_idx, None, True), self.neighbours)
        out, ssm = check_and_run(self.inputs(projected, seq_idx, state, not inference))
        if state is not None and ssm is not None:
            xBC = self.sizes.split(projected.detach())[1].transpose(1, 2)
            state.conv = last_tokens(xBC, state.conv, seq_idx, self.config.conv_width)
            state.ssm = ssm.detach()
        if last_only:
            out = out[:, -1:]
        return self.out_proj(out) if inference else out

    def inputs(
        self,
        projected: Tensor,
        seq_idx: Tensor | None,
        state: LayerState | None,
        project: bool,
    ) -> MixerInputs:
        """What the operators take; `project` says whether they apply out_proj too."""
        c, out_proj = self.config, self.out_proj
        return MixerInputs(
            zxbcdt=projected,
            conv_initial_states=None if state is None else state.conv,
            initial_states=None if state is None else state.ssm,
            seq_idx=seq_idx,
            conv_weight=self.conv1d.weight[:, 0],
            conv_bias=self.conv1d.bias,
            dt_bias=self.dt_bias,
            A=self.rates(),
            D=self.D,
            norm_weight=self.norm.weight,
            out_weight=out_proj.weight if project else None,
            out_bias=out_proj.bias if project else None,
            sizes=self.sizes,
            silu=True,
            chunk_size=c.chunk_size,
            dt_limit=c.dt_limit,
            eps=c.norm_eps,
            norm_before_gate=False,
            want_states=state is not None,
            dtype=projected.dtype,
        )

    def rates(self) -> Tensor:
        """A, (heads,): the log of a head's decay in a step of size 1."""
        return -torch.exp(self.A_log.float())

    def step_weights(self) -> MixerWeights:
        """The weights between the projections, for one token."""
        c, taps = self.config, self.conv1d.weight[:, 0]
        parameters = (taps, self.conv1d.bias, self.dt_bias, self.rates(), self.D, self.norm.weight)
        return MixerWeights(*parameters, self.sizes, c.dt_limit, c.norm_eps)


class Block(nn.Module):
    """mixer(norm(h)). The next block adds this to h, since one kernel adds and norms there.

    For backward it stores little besides h and in_proj's output.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.mixer = Mixer(config)

    def forward(
        self,
        h: Tensor,
        mixed: Tensor | None,
        seq_idx: Tensor | None,
        state: LayerState | None,
        last_only: bool,
    ) -> tuple[Tensor, Tensor]:
        """h + mixed, and this mixer's output. `mixed` is the output of the mixer before, if any."""
        h, projected = self.project(h, mixed)
        return h, self.mixer(projected, seq_idx, state, last_only)

    def step_weights(self) -> LayerWeights:
        """All weights of the block, for one token."""
        in_proj, out_proj = self.mixer.in_proj, self.mixer.out_proj
        before = (self.norm.weight, self.norm.eps, in_proj.weight, in_proj.bias)
        return LayerWeights(*before, self.mixer.step_weights(), out_proj.weight, out_proj.bias)

    def project(self, h: Tensor, mixed: Tensor | None) -> tuple[Tensor, Tensor]:
        """h + mixed, and in_proj of its norm, which the mixer takes."""
        norm, layer = self.norm, self.mixer.in_proj
        if torch.is_grad_enabled():
            return normed_linear(h, mixed, norm.weight, norm.eps, layer.weight, layer.bias)
        dtype = products_dtype(norm.weight)
        h, normed = add_and_norm(h, mixed, norm.weight, norm.eps, dtype)
        return h, layer(normed)


def _read_on(
    block: Block,
    h: Tensor,
    mixed: Tensor | None,
    seq_idx: Tensor | None,
    state: LayerState | None,
    last_only: bool,
) -> tuple[Tensor, Tensor, LayerState | None]:
    """The output of the block and its new state. `state` is unchanged, so it can be used again."""
    after = copy(state)
    return *block(h, mixed, seq_idx, after, last_only), after


class Backbone(nn.Module):
    """Tokens to hidden states."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.residual_in_fp32 = config.residual_in_fp32
        self.embeddings = nn.Embedding(config.vocab_size, config.d_model)
        blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.layers = cast(Sequence[Block], blocks)
        self.recompute = False  # store only the input of each block: slower by a tenth
        self.norm_f = RMSNorm(config.d_model, config.norm_eps)

    def forward(
        self,
        ids: Tensor,
        seq_idx: Tensor | None,
        state: State | None,
        last_only: bool = False,
    ) -> Tensor:
        h, mixed = self.embed(ids), None
        for i, layer in enumerate(self.layers):
            own = None if state is None else state[i]
            at_end = last_only and i == len(self.layers) - 1
            if self.recompute:
                if mixed is not None:
                    h, mixed = h + mixed, None  # to keep one tensor for each block
                read = partial(
                    checkpoint,
                    as_chosen_here(_read_on),
                    use_reentrant=False,
                    preserve_rng_state=False,
                )
                h, mixed, after = read(layer, h, mixed, seq_idx, copy(own), at_end)
            else:
                h, mixed, after = _read_on(layer, h, mixed, seq_idx, copy(own), at_end)
            if own is not None:  # in place: FSDP and DDP may have passed a copy of the list
                own.conv, own.ssm = after.conv, after.ssm
        return self.normed(h, mixed)

    def embed(self, ids: Tensor) -> Tensor:
        """The embeddings, in the dtype of the residual stream."""
        h = self.embeddings(ids)
        return h.float() if self.residual_in_fp32 and h.dtype != torch.float64 else h

    def normed(self, h: Tensor, mixed: Tensor | None) -> Tensor:
        """The last hidden states, from what the last block returned."""
        assert mixed is not None  # a model has at least one block
        h, norm = h[:, -mixed.shape[1] :], self.norm_f
        if torch.is_grad_enabled():
            return norm(h + mixed).to(norm.weight.dtype)
        return add_and_norm(h, mixed, norm.weight, norm.eps, norm.weight.dtype)[1]


class FactorisedHead(nn.Module):
    """d_model -> output_size -> logits."""

    def __init__(self, d_model: int, output_size: int, vocab_size: int):
        super().__init__()
        self.down = Linear(d_model, output_size, bias=False)
        self.up = Linear(output_size, vocab_size, bias=False)

    def forward(self, h: Tensor) -> Tensor:
        return self.up(self.down(h))


class Model(nn.Module):
    """A Mamba-2 language model. No positional embedding: the recurrence orders the tokens."""

    def __init__(self, config: ModelConfig, init: str = "hippo", zero_out: bool = False):
        """Draw the weights by `initialise`, with torch's global generator."""
        super().__init__()
        self.config = config
        self.backbone = Backbone(config)
        self.lm_head: Linear | FactorisedHead
        c = config
        if c.output_size is not None:
            self.lm_head = FactorisedHead(c.d_model, c.output_size, c.vocab_size)
        else:
            self.lm_head = Linear(c.d_model, c.vocab_size, bias=False)
            if c.tied:
                self.lm_head.weight = self.backbone.embeddings.weight
        initialise(self, init, zero_out)

    def forward(
        self, ids: Tensor, seq_idx: Tensor | None = None, state: State | None = None
    ) -> Tensor:
        """ids (batch, length) -> logits (batch, length, vocab_size).

        `seq_idx` (batch, length) numbers packed documents, which do not see each other. A `state`
        is continued and updated in place; no gradient flows into it.
        """
        return self.lm_head(self.backbone(ids, seq_idx, state))

    def loss(
        self,
        ids: Tensor,
        targets: Tensor,
        seq_idx: Tensor | None = None,
        state: State | None = None,
    ) -> Tensor:
        """The summed cross-entropy of `forward`'s logits and targets (batch, length), in nats.

        Targets of -100 are ignored. The logits of all tokens never exist at the same time.
        """
        h = self.backbone(ids, seq_idx, state).flatten(0, 1)
        head = self.lm_head
        if isinstance(head, FactorisedHead):
            h, head = head.down(h), head.up
        return summed_loss(h, head.weight, targets.flatten())

    @torch.no_grad()
    def step(
        self, ids: Tensor, state: State | None = None, last_only: bool = False
    ) -> tuple[Tensor, State]:
        """Read one or more further tokens, without gradients.

        Args:
            ids: (batch,), one token for each row; or (batch, length), several for each row.
            state: what the call before returned; it is updated in place. None starts with zeros.
            last_only: compute only the logits of the last token.

        Returns:
            logits, and the state. Logits are (batch, vocab_size) for `ids` (batch,) and with
            `last_only`, else (batch, length, vocab_size).
        """
        if state is None:
            state = self.empty_state(ids.shape[0])
        h = self.backbone(ids[:, None] if ids.ndim == 1 else ids, None, state, last_only)
        if ids.ndim == 1 or last_only:
            h = h[:, -1]
        return self.lm_head(h), state

    def empty_state(self, batch: int) -> State:
        """The state before the first token."""
        c, weight = self.config, self.backbone.embeddings.weight
        exact = torch.float64 if weight.dtype == torch.float64 else torch.float32
        conv, ssm = (c.conv_width - 1, c.d_conv), (c.n_heads, c.head_dim, c.d_state)
        return [
            LayerState(
                torch.zeros(batch, *conv, dtype=weight.dtype, device=weight.device).mT,
                torch.zeros(batch, *ssm, dtype=exact, device=weight.device),
            )
            for _ in range(c.n_layers)
        ]

    def use_config(self, config: ModelConfig) -> None:
        """Use another configuration with the same shapes, for instance another chunk size."""
        self.config = config
        for layer in self.backbone.layers:
            layer.mixer.config = config

    def n_parameters(self) -> int:
        """The number of parameters. Shared ones count once."""
        return sum(p.numel() for p in self.parameters())
