"""Decoding: one token at a time.

For one token every weight matrix is multiplied by a single row, so reading the weights takes most
of the time. On a CPU with a C++ compiler, code compiled on this machine takes the token through the
whole model. It reads weights of 32, 16, 8 or 4 bits. Without a compiler pure torch does the same,
in float32 or int8. On a GPU a CUDA graph is replayed.

Several tokens at once go through the model itself. If its weights are rounded anyway, and 16-bit
products are faster on this CPU, it uses these.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from ysnake_kernels.linear_step import Int8Linear, TransposedLinear
from ysnake_kernels.mixer_step.eager import prepare
from ysnake_kernels.mixer_step.eager import step as mixer_step
from ysnake_kernels.native.build import BuildError, NoCompiler, library
from ysnake_kernels.native.matrix import FORMATS, Float32Linear, PackedLinear
from ysnake_kernels.native.model_step import ModelStep
from ysnake_kernels.norm.eager import rms_norm_few_rows

from ysnake.inference.replay import ReplayedStep
from ysnake.model.network import Block, FactorisedHead, Model, RMSNorm, State
from ysnake.shared.errors import InputError
from ysnake.shared.processor import rounded_products, rounding_is_faster


class Decoder:
    """A model prepared for reading and writing one token after another by `step`."""

    def __init__(self, model: Model, weights: str = "float32", compile: bool = True):
        """Changes how the model's weights are stored.

        Args:
            model: in evaluation mode from now on.
            weights: how the matrices are stored. float32 keeps them as they are. On a CPU,
                bfloat16, int8 and int4 round the matrices of a float32 model; int8 has a scale for
                each output, int4 for each 32 weights of an output. On a GPU, bfloat16 rounds the
                whole model. auto is bfloat16 for a float32 model on a CPU where code can be
                compiled. Otherwise it keeps the weights as they are.
            compile: use code compiled on this machine, where that is possible. It is compiled once,
                in a few seconds. bfloat16 and int4 on a CPU need it. `not_compiled` says why it is
                not used, although there is a compiler.

        Raises:
            InputError: `weights` has another value, or is not possible here.
        """
        if weights not in ("auto", *FORMATS):
            expected = ", ".join(["auto", *FORMATS])
            raise InputError(f"expected one of {expected}, got {weights}", field="--weights")
        self.model = model.eval()
        weight = model.backbone.embeddings.weight
        self.fast = weight.device.type == "cpu" and weight.dtype == torch.float32
        self.weights = str(weight.dtype).removeprefix("torch.")  # how they are stored
        self.reading: Callable[[], AbstractContextManager[object]] = nullcontext
        self.native: ModelStep | None = None
        self.not_compiled = ""
        self.layers: list[_Layer] = []
        if self.fast:
            self._prepare(weights, compile)
        elif weights in ("int8", "int4"):
            raise InputError(
                f"{weights} is for float32 models on a CPU, and this one is in {self.weights} on "
                f"{weight.device.type}",
                field="--weights",
            )
        elif weights == "bfloat16":
            self.model.bfloat16()
            self.weights = weights
        self.replayed = ReplayedStep(model) if weight.device.type == "cuda" else None
        self.norm = _Norm(model.backbone.norm_f)

    def _prepare(self, weights: str, compile: bool) -> None:
        """Lay out the weights of a float32 model on a CPU."""
        why = "it is switched off"
        if compile:
            try:
                library()
            except BuildError as error:
                compile, why = False, str(error)
                self.not_compiled = "" if isinstance(error, NoCompiler) else why
        self.weights = weights
        if weights == "auto":
            self.weights = "bfloat16" if compile else "float32"
        if self.weights != "float32" and rounding_is_faster():
            self.reading = rounded_products
        if compile:
            self.native = _model_step(self.model, self.weights)
            return
        if self.weights not in ("float32", "int8"):
            raise InputError(
                f"{weights} needs compiled code, and {why}; float32 and int8 do not need it",
                field="--weights",
            )
        layer = TransposedLinear if self.weights == "float32" else Int8Linear
        for module, name in _linears(self.model):
            try:
                setattr(module, name, layer(getattr(module, name)))
            except NotImplementedError as error:
                raise InputError(f"{error}; float32 works", field="--weights") from error
        self.layers = [_Layer(block) for block in self.model.backbone.layers]

    @torch.no_grad()
    def step(
        self, ids: Tensor, state: State | None = None, last_only: bool = False
    ) -> tuple[Tensor, State]:
        """As `Model.step`, in the dtype of the weights also under autocast."""
        if torch.is_autocast_enabled(device := ids.device.type):
            with torch.autocast(device, enabled=False):
                return self.step(ids, state, last_only)
        one = ids.shape[-1] == 1 if ids.ndim == 2 else True
        if not (one and (self.fast or self.replayed)):
            with self.reading():
                return self.model.step(ids, state, last_only)
        if state is None:
            state = self.model.empty_state(ids.shape[0])
        if self.replayed:
            logits = self.replayed(ids.view(-1), state)
        elif self.native:
            states = [(layer.conv, layer.ssm) for layer in state]
            logits = self.native(self.model.backbone.embeddings(ids.view(-1)), states)
        else:
            logits = self._write(ids.view(-1), state)
        return logits if ids.ndim == 1 or last_only else logits[:, None], state

    def _write(self, ids: Tensor, state: State) -> Tensor:
        """One token for each row in pure torch: ids (batch,) -> logits (batch, vocab_size)."""
        h = self.model.backbone.embeddings(ids)
        for layer, own in zip(self.layers, state, strict=True):
            layer(h, own.conv, own.ssm)
        return self.model.lm_head(self.norm(h))


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
        return rms_norm_few_rows(x, self.weight, self.eps)


def _linears(model: Model) -> list[tuple[nn.Module, str]]:
    """All linear layers of the model: each as its module and its name in that."""
    mixers = [block.mixer for block in model.backbone.layers]
    found: list[tuple[nn.Module, str]]
    found = [(mixer, name) for mixer in mixers for name in ("in_proj", "out_proj")]
    if isinstance(model.lm_head, nn.Linear):
        return [*found, (model, "lm_head")]
    return [*found, (model.lm_head, "down"), (model.lm_head, "up")]


def _model_step(model: Model, format: str) -> ModelStep:
    """The whole model for the compiled code. Its matrices replace the model's own."""
    head = model.lm_head
    parts = [head.down, head.up] if isinstance(head, FactorisedHead) else [head]
    layers = [block.step_weights() for block in model.backbone.layers]
    norm = model.backbone.norm_f
    step = ModelStep(layers, norm.weight, norm.eps, [part.weight for part in parts], format)
    matrices = [*(m for both in step.projections for m in both), *step.head]
    for (module, name), matrix in zip(_linears(model), matrices, strict=True):
        exact = format == "float32"
        layer = Float32Linear(getattr(module, name), matrix) if exact else PackedLinear(matrix)
        setattr(module, name, layer)
    return step
