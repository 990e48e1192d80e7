"""Writing token by token: on a CPU weights laid out for it, and a step of few operations.

For one token every weight matrix is multiplied by a single row, so reading the weights takes most
of the time. Torch computes a product with one row on one core. Cut along its features, it becomes a
batch with one product for each thread, and all threads read memory. With `weights="int8"` a quarter
of the bytes is read.
"""

import warnings
from itertools import count
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from ysnake_kernels.linear import Linear

from ysnake.inference.replay import ReplayedStep
from ysnake.model.network import Block, Model, State
from ysnake.shared.errors import InputError

WEIGHTS = ("float32", "int8")
FEW = 2  # rows up to which a product cut along its features is the faster one


class Decoder:
    """A model prepared for reading and writing one token after another by `step`."""

    def __init__(self, model: Model, weights: str = "float32", compile: bool = False):
        """Changes the memory layout of the model's weights in place.

        Args:
            model: in evaluation mode from now on.
            weights: "float32" or, on a CPU, "int8". Matrices then become 8-bit integers with a
                scale for each output, and their inputs 8-bit integers with a scale for each token.
            compile: on a CPU, let torch.compile fuse the operations between the matrix products
                into a few loops. It compiles for one row now, for two and for more rows when these
                are first needed. It needs a C++ compiler; the first time on a machine each takes
                about 15 seconds.

        Raises:
            InputError: `weights` has another value, or int8 or compiling is not possible here.
        """
        if weights not in WEIGHTS:
            raise InputError(f"expected {' or '.join(WEIGHTS)}, got {weights}", field="--weights")
        self.model = model.eval()
        weight = model.backbone.embeddings.weight
        on_cpu = weight.device.type == "cpu"
        self.fast = on_cpu and weight.dtype == torch.float32
        if weights == "int8":
            if not self.fast:
                raise InputError("int8 is for float32 models on a CPU", field="--weights")
            _quantise(model)
        elif self.fast:
            _transpose(model)
        self.layers = [_Layer(block) for block in model.backbone.layers] if self.fast else []
        self.replayed = ReplayedStep(model) if weight.device.type == "cuda" else None
        self.norm = _Norm(model.backbone.norm_f.weight, model.backbone.norm_f.eps)
        self.write = self._write
        if compile:
            self._compile()

    @torch.no_grad()
    def step(
        self, ids: Tensor, state: State | None = None, last_only: bool = False
    ) -> tuple[Tensor, State]:
        """As `Model.step`."""
        one = ids.shape[-1] == 1 if ids.ndim == 2 else True
        if not (one and (self.fast or self.replayed)):
            return self.model.step(ids, state, last_only)
        if state is None:
            state = self.model.empty_state(ids.shape[0])
        if self.replayed:
            logits = self.replayed(ids.view(-1), state)
        else:
            memory = [s.conv for s in state], [s.ssm for s in state]
            logits = self.write(ids.view(-1), *memory)
        return logits if ids.ndim == 1 or last_only else logits[:, None], state

    def _write(self, ids: Tensor, convs: list[Tensor], ssms: list[Tensor]) -> Tensor:
        """One token for each row: ids (batch,) -> logits (batch, vocab_size)."""
        h = self.model.backbone.embeddings(ids)
        for layer, conv, ssm in zip(self.layers, convs, ssms, strict=True):
            layer(h, conv, ssm)
        return self.model.lm_head(self.norm(h))

    def _compile(self) -> None:
        if not self.fast:
            raise InputError("is for float32 models on a CPU", field="--compile")
        from torch._dynamo.exc import BackendCompilerFailed  # takes a second or two

        self.write = torch.compile(self._write)
        try:
            self.step(torch.zeros(1, dtype=torch.int64))
        except BackendCompilerFailed as error:
            why = next(line for line in str(error).splitlines() if line.strip())
            raise InputError(
                f"expected a C++ compiler that works: {why}", field="--compile"
            ) from error


class _Layer:
    """One token through one block. Updates the state and h in place."""

    def __init__(self, block: Block):
        mixer = block.mixer
        c = self.config = mixer.config
        self.norm = _Norm(block.norm.weight, block.norm.eps)
        self.out_norm = _Norm(mixer.norm.weight, c.norm_eps, c.n_groups)
        self.in_proj, self.out_proj = mixer.in_proj.forward, mixer.out_proj.forward
        self.taps = mixer.conv1d.weight.detach()[:, 0].t().contiguous()
        bias = mixer.conv1d.bias
        self.conv_bias = None if bias is None else bias.detach()
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
        y = self.recur(ssm, x, dt, *(t.view(batch, c.n_groups, 1, c.d_state) for t in (B, C)))
        y = y.addcmul_(x, self.D).view(batch, -1).mul_(F.silu(z))
        h += self.out_proj(self.out_norm(y))

    def recur(self, ssm: Tensor, x: Tensor, dt: Tensor, B: Tensor, C: Tensor) -> Tensor:
        """S' = exp(dt A) S + dt x B^T, in place, and S' C: (batch, heads, head_dim).

        x is (batch, heads, head_dim), dt (batch, heads), B and C (batch, groups, 1, d_state).
        """
        decay = torch.exp(dt * self.A)[..., None]
        batch, groups, _, n = B.shape
        rows = ssm.view(batch, groups, -1, n)
        u = (x * dt[..., None]).view(batch, groups, -1, 1)
        if torch.compiler.is_compiling():  # y from S: two passes over the state instead of three
            y = (rows * C).sum(-1).view(x.shape) * decay
            y += (u * (B * C).sum(-1, keepdim=True)).view(x.shape)
            ssm.mul_(decay[..., None])
            rows.addcmul_(u, B)
            return y
        ssm.mul_(decay[..., None])
        rows.addcmul_(u, B)
        # C S^T for each head: the order S C takes up to ten times as long
        C = C[:, :, None].expand(-1, -1, x.shape[1] // groups, -1, -1).reshape(-1, 1, n)
        return torch.bmm(C, ssm.view(-1, x.shape[2], n).transpose(1, 2)).view(x.shape)


class _Norm:
    """`rms_norm_gated` without a gate, in few operations."""

    def __init__(self, weight: Tensor, eps: float, groups: int = 1):
        self.weight, self.eps, self.groups = weight.detach(), weight.new_tensor(eps), groups
        self.share = groups / len(weight)

    def __call__(self, x: Tensor) -> Tensor:
        t = x.view(len(x), self.groups, -1)
        size = torch.linalg.vector_norm(t, dim=2, keepdim=True)
        scale = torch.addcmul(self.eps, size, size, value=self.share).rsqrt_()
        return torch.mul(t, scale).view(x.shape).mul_(self.weight)


# torch.compile calls this operator, since the loops that it would generate are slower. A compiled
# graph can pass no packed int8 weights, so it passes the number of the layer that holds them.
_layers: WeakValueDictionary[int, nn.Module] = WeakValueDictionary()
_numbers = count()
_library = torch.library.Library("ysnake", "DEF")
_library.define("linear(Tensor x, int layer, int outputs) -> Tensor")
_library.impl("linear", lambda x, layer, outputs: _layers[layer](x), "CPU")
torch.library.register_fake(
    "ysnake::linear", lambda x, layer, outputs: x.new_empty(*x.shape[:-1], outputs), lib=_library
)


def _register(layer: nn.Module) -> int:
    number = next(_numbers)
    _layers[number] = layer
    return number


def _as_operator(layer: "OneRow | Int8", x: Tensor) -> Tensor:
    return torch.ops.ysnake.linear(x, layer.number, layer.out_features)


class OneRow(Linear):
    """A linear layer whose weight is stored transposed, which is faster for one or two rows."""

    def __init__(self, linear: nn.Linear):
        """Uses the weight and bias of `linear`. The weight's memory layout changes in place."""
        sizes = (linear.in_features, linear.out_features, linear.bias is not None)
        super().__init__(*sizes, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.weight.data = self.weight.detach().t().contiguous().t()
        threads = torch.get_num_threads()
        self.cuts = 1 if self.in_features % threads else threads
        self.parts = self.weight.detach().t().view(self.cuts, -1, self.out_features)
        self.nothing = self.weight.new_zeros(1, 1, 1)
        self.number = _register(self)

    def forward(self, x: Tensor) -> Tensor:
        rows, compiling = x.shape[:-1].numel(), torch.compiler.is_compiling()
        if torch.is_grad_enabled():
            return super().forward(x)
        if rows > FEW:
            return _as_operator(self, x) if compiling else super().forward(x)
        cut = x.reshape(rows, self.cuts, -1).transpose(0, 1)
        if compiling:  # torch.compile calls baddbmm, but generates slow loops for bmm
            y = torch.baddbmm(self.nothing, cut, self.parts, beta=0).sum(0)
        else:
            y = torch.bmm(cut, self.parts).sum(0)
        if self.bias is not None:
            y += self.bias
        return y if x.ndim == 2 else y.view(*x.shape[:-1], -1)


class Int8(nn.Module):
    """A linear layer with an int8 weight. Each input row is scaled by its largest entry."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        weight = linear.weight.detach()
        scales = weight.abs().amax(1).clamp(min=1e-12) / 127
        zeros = torch.zeros(len(scales), dtype=torch.int64)
        with warnings.catch_warnings():  # torch will remove such tensors, one reason to pin it
            warnings.simplefilter("ignore", UserWarning)
            quantised = torch.quantize_per_channel(weight, scales, zeros, 0, torch.qint8)
        bias = None if linear.bias is None else linear.bias.detach()
        self.packed = torch.ops.quantized.linear_prepack(quantised, bias)
        self.has_bias = bias is not None
        self.out_features = linear.out_features
        self.number = _register(self)

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return _as_operator(self, x)
        # The operator uses one scale for all rows. With reduce_range no sum overflows.
        if x.shape[:-1].numel() == 1 or self.has_bias:
            return torch.ops.quantized.linear_dynamic(x, self.packed, True)
        largest = x.abs().amax(-1, keepdim=True).clamp_(min=1e-12)
        return torch.ops.quantized.linear_dynamic(x / largest, self.packed, True).mul_(largest)


def _linears(model: Model) -> list[tuple[nn.Module, str]]:
    """All linear layers of the model: each as its module and its name in that."""
    mixers = [block.mixer for block in model.backbone.layers]
    found: list[tuple[nn.Module, str]]
    found = [(mixer, name) for mixer in mixers for name in ("in_proj", "out_proj")]
    if isinstance(model.lm_head, nn.Linear):
        return [*found, (model, "lm_head")]
    return [*found, (model.lm_head, "down"), (model.lm_head, "up")]


def _transpose(model: Model) -> None:
    for module, name in _linears(model):
        setattr(module, name, OneRow(getattr(module, name)))


def _quantise(model: Model) -> None:
    for module, name in _linears(model):
        setattr(module, name, Int8(getattr(module, name)))
