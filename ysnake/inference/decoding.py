"""Writing token by token: on a CPU with weights laid out for it, and with few operations.

For one token every weight matrix is multiplied by a single row, so reading the weights takes most
of the time. The layers of `ysnake_kernels.linear_step` read them with all threads, or read int8
weights, a quarter of the bytes. The mixer between its projections is one step of
`ysnake_kernels.mixer_step`.
"""

import torch
from torch import Tensor, nn
from ysnake_kernels.linear_step import Int8, OneRow
from ysnake_kernels.mixer_step.eager import prepare
from ysnake_kernels.mixer_step.eager import step as mixer_step
from ysnake_kernels.norm.eager import few_rows

from ysnake.inference.replay import ReplayedStep
from ysnake.model.network import Block, Model, RMSNorm, State
from ysnake.shared.errors import InputError

WEIGHTS = ("float32", "int8")


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
        self.norm = _Norm(model.backbone.norm_f)
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
        self.norm = _Norm(block.norm)
        self.in_proj, self.out_proj = mixer.in_proj.forward, mixer.out_proj.forward
        self.weights = prepare(mixer.step_weights(), torch.float32)

    def __call__(self, h: Tensor, conv: Tensor, ssm: Tensor) -> None:
        """h: (batch, d_model); conv and ssm as in `LayerState`."""
        projected = self.in_proj(self.norm(h))
        h += self.out_proj(mixer_step(projected, conv, ssm, self.weights))


class _Norm:
    """A norm of the model for one token of each row."""

    def __init__(self, norm: RMSNorm):
        self.weight, self.eps = norm.weight.detach(), norm.weight.new_tensor(norm.eps)

    def __call__(self, x: Tensor) -> Tensor:
        return few_rows(x, self.weight, self.eps)


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
