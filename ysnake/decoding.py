"""Writing token by token on a CPU: weights laid out for it, and a step of few operations.

One token is a product of each weight with one row, so its speed is that of reading the weights.
A product with one row runs on one core; cut along its features and done as a batch of as many
products as there are threads, it reads memory with all of them. `weights="int8"` reads a quarter.
"""

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from ysnake_kernels.linear import Linear

from ysnake.config import InputError
from ysnake.model import Model, State

WEIGHTS = ("float32", "int8")
FEW = 2  # rows up to which a product cut along its features is the faster one


class Decoder:
    """A model made ready to read and write one token after another, in `step`s like its own."""

    def __init__(self, model: Model, weights: str = "float32"):
        """Lays out the model's weights anew where they are.

        With "int8" its matrices become 8-bit integers with a scale for each output, and their
        inputs 8-bit integers with a scale for each token. CPU only.

        Raises:
            InputError: `weights` is neither, or int8 is not possible here.
        """
        if weights not in WEIGHTS:
            raise InputError(f"--weights: expected {' or '.join(WEIGHTS)}, got {weights}")
        self.model = model.eval()
        weight = model.backbone.embeddings.weight
        on_cpu = weight.device.type == "cpu"
        self.fast = on_cpu and weight.dtype == torch.float32
        if weights == "int8":
            if not self.fast:
                raise InputError("--weights: int8 is for float32 models on a CPU")
            _quantise(model)
        elif self.fast:
            _transpose(model)
        self.layers = [_Layer(block) for block in model.backbone.layers] if self.fast else []
        self.norm = _Norm(model.backbone.norm_f.weight, model.backbone.norm_f.eps)

    @torch.no_grad()
    def step(
        self, ids: Tensor, state: State | None = None, last_only: bool = False
    ) -> tuple[Tensor, State]:
        """As `Model.step`."""
        one = ids.shape[-1] == 1 if ids.ndim == 2 else True
        if not (self.fast and one):
            return self.model.step(ids, state, last_only)
        if state is None:
            state = self.model.empty_state(ids.shape[0])
        backbone = self.model.backbone
        h = backbone.embeddings(ids.view(-1))
        for layer, memory in zip(self.layers, state, strict=True):
            layer(h, memory.conv, memory.ssm)
        logits = self.model.lm_head(self.norm(h))
        return logits if ids.ndim == 1 or last_only else logits[:, None], state


class _Layer:
    """One token through one block, in place in its state and in h."""

    def __init__(self, block: nn.Module):
        mixer = block.mixer
        c = self.config = mixer.config
        self.norm = _Norm(block.norm.weight, block.norm.eps)
        self.out_norm = _Norm(mixer.norm.weight, c.norm_eps, c.n_groups)
        self.in_proj, self.out_proj = mixer.in_proj.forward, mixer.out_proj.forward
        self.taps = mixer.conv1d.weight.detach()[:, 0].t().contiguous()
        self.conv_bias = mixer.conv1d.bias.detach() if c.conv_bias else None
        self.dt_bias, self.A = mixer.dt_bias.detach(), -torch.exp(mixer.A_log.detach())
        self.D = mixer.D.detach()[:, None]
        self.sizes = [c.d_inner, c.d_conv, c.n_heads]
        self.mixed = [c.d_inner, c.n_groups * c.d_state, c.n_groups * c.d_state]

    def __call__(self, h: Tensor, conv: Tensor, ssm: Tensor) -> None:
        """h: (batch, d_model); conv and ssm as in `LayerState`."""
        c, batch = self.config, h.shape[0]
        z, xBC, dt = self.in_proj(self.norm(h)).split_with_sizes(self.sizes, 1)

        before = conv.transpose(1, 2)
        window = torch.cat([before, xBC[:, None]], 1)  # [batch width channels]
        before.copy_(window[:, 1:])
        xBC = window.mul_(self.taps).sum(1)
        if self.conv_bias is not None:
            xBC += self.conv_bias
        x, B, C = F.silu(xBC, inplace=True).split_with_sizes(self.mixed, 1)

        dt = F.softplus(dt + self.dt_bias)
        if c.dt_limit != (0.0, float("inf")):
            dt = dt.clamp_(*c.dt_limit)
        x = x.view(batch, c.n_heads, c.head_dim)
        ssm.mul_(torch.exp(dt * self.A)[..., None, None])
        by_group = ssm.view(batch, c.n_groups, -1, c.d_state)
        u = (x * dt[..., None]).view(batch, c.n_groups, -1, 1)
        by_group.addcmul_(u, B.view(batch, c.n_groups, 1, c.d_state))
        # C S^T for each head: S C takes up to ten times as long
        C = C.view(batch, c.n_groups, 1, 1, c.d_state)
        C = C.expand(-1, -1, c.n_heads // c.n_groups, -1, -1).reshape(-1, 1, c.d_state)
        y = torch.bmm(C, ssm.view(-1, c.head_dim, c.d_state).transpose(1, 2)).view(x.shape)
        y = y.addcmul_(x, self.D).view(batch, -1).mul_(F.silu(z))
        h += self.out_proj(self.out_norm(y))


class _Norm:
    """As `rms_norm_gated` without a gate, in the fewest operations."""

    def __init__(self, weight: Tensor, eps: float, groups: int = 1):
        self.weight, self.eps, self.groups = weight.detach(), weight.new_tensor(eps), groups
        self.share = groups / len(weight)

    def __call__(self, x: Tensor) -> Tensor:
        t = x.view(len(x), self.groups, -1)
        size = torch.linalg.vector_norm(t, dim=2, keepdim=True)
        scale = torch.addcmul(self.eps, size, size, value=self.share).rsqrt_()
        return torch.mul(t, scale).view(x.shape).mul_(self.weight)


class OneRow(Linear):
    """A linear layer whose weight lies in memory as its transpose, for products with few rows."""

    def lay_out(self) -> None:
        self.weight.data = self.weight.detach().t().contiguous().t()
        threads = torch.get_num_threads()
        self.cuts = 1 if self.in_features % threads else threads
        self.parts = self.weight.detach().t().view(self.cuts, -1, self.out_features)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.shape[:-1].numel()
        if rows > FEW or torch.is_grad_enabled():
            return super().forward(x)
        y = torch.bmm(x.reshape(rows, self.cuts, -1).transpose(0, 1), self.parts).sum(0)
        if self.bias is not None:
            y += self.bias
        return y if x.ndim == 2 else y.view(*x.shape[:-1], -1)


class Int8(nn.Module):
    """A linear layer with an int8 weight; each row of its input is scaled by its largest entry."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        weight = linear.weight.detach()
        scales = weight.abs().amax(1).clamp(min=1e-12) / 127
        zeros = torch.zeros(len(scales), dtype=torch.int64)
        with warnings.catch_warnings():  # that such tensors will go, a reason to pin torch
            warnings.simplefilter("ignore", UserWarning)
            quantised = torch.quantize_per_channel(weight, scales, zeros, 0, torch.qint8)
        bias = None if linear.bias is None else linear.bias.detach()
        self.packed = torch.ops.quantized.linear_prepack(quantised, bias)
        self.has_bias = bias is not None

    def forward(self, x: Tensor) -> Tensor:
        # The operator has one scale for all rows, and with reduce_range none of its sums overflows.
        if x.shape[:-1].numel() == 1 or self.has_bias:
            return torch.ops.quantized.linear_dynamic(x, self.packed, True)
        largest = x.abs().amax(-1, keepdim=True).clamp_(min=1e-12)
        return torch.ops.quantized.linear_dynamic(x / largest, self.packed, True).mul_(largest)


def _linears(model: Model) -> list[tuple[nn.Module, str]]:
    """Where the matrices are: modules, and the names of their linear layers."""
    mixers = [block.mixer for block in model.backbone.layers]
    found = [(mixer, name) for mixer in mixers for name in ("in_proj", "out_proj")]
    if isinstance(model.lm_head, nn.Linear):
        return [*found, (model, "lm_head")]
    return [*found, (model.lm_head, "down"), (model.lm_head, "up")]


def _transpose(model: Model) -> None:
    for module, name in _linears(model):
        linear = getattr(module, name)
        linear.__class__ = OneRow
        linear.lay_out()


def _quantise(model: Model) -> None:
    for module, name in _linears(model):
        setattr(module, name, Int8(getattr(module, name)))
