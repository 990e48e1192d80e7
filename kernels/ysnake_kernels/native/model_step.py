"""One token through a whole model by the compiled code, from the residual stream to the logits."""

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from ysnake_kernels.checks import check
from ysnake_kernels.layers_step.inputs import LayerWeights
from ysnake_kernels.mixer_step.eager import NO_LIMIT, prepare
from ysnake_kernels.native.build import library, threads_for
from ysnake_kernels.native.matrix import Matrix, MatrixStruct, as_floats

Pointer = ctypes.c_void_p
FLOAT32 = (torch.float32,)


class LayerStruct(ctypes.Structure):
    """`Layer` in kernels.cpp."""

    _fields_ = [
        ("norm", Pointer),
        *((name, MatrixStruct) for name in ("in_", "out")),
        *((name, Pointer) for name in ("taps", "conv_bias", "dt_bias", "A", "D", "gated_norm")),
        *((name, ctypes.c_double) for name in ("eps", "gated_eps")),
    ]


class SizesStruct(ctypes.Structure):
    """`Sizes` in kernels.cpp."""

    _fields_ = [
        *((n, ctypes.c_int64) for n in ("d_model", "d_inner", "heads", "groups", "state", "width")),
        *((name, ctypes.c_double) for name in ("dt_low", "dt_high")),
    ]


class ModelStruct(ctypes.Structure):
    """`Model` in kernels.cpp."""

    _fields_ = [
        ("sizes", SizesStruct),
        *((name, ctypes.c_int64) for name in ("layers", "outputs")),
        *((name, Pointer) for name in ("layer", "output", "norm")),
        ("eps", ctypes.c_double),
    ]


class ModelStep:
    """A model laid out for the compiled code. Packed formats copy its weights."""

    def __init__(
        self,
        layers: Sequence[LayerWeights],
        norm_weight: Tensor,
        eps: float,
        head: Sequence[Tensor],
        format: str,
    ):
        """Lay the weights out.

        Args:
            layers: the weights of each layer, as `layers_step` takes them, in float32 on the CPU.
                All layers have the same sizes.
            norm_weight: (d_model,), of the norm after the last layer.
            eps: of that norm.
            head: one or two matrices that turn its output into logits, one after the other.
            format: of all matrices, as in `Matrix`.

        Raises:
            ValueError: the format is unknown.
            BuildError: the code cannot be compiled here.
        """
        self.code = library()
        sizes, dt_limit = layers[0].mixer.sizes, layers[0].mixer.dt_limit
        width = layers[0].mixer.conv_weight.shape[1]
        self.projections = [
            (Matrix(w.in_weight, w.in_bias, format), Matrix(w.out_weight, w.out_bias, format))
            for w in layers
        ]
        self.head = [Matrix(weight, None, format) for weight in head]
        self.vocabulary = self.head[-1].rows
        self.of_a_product = layers[0].in_weight.numel()
        channels, d_model = sizes.channels, layers[0].in_weight.shape[1]
        self.of_a_row = (
            (d_model,),
            (channels, width - 1),
            (sizes.heads, sizes.head_dim, sizes.state),
        )
        self.kept: list[object] = []  # what the structs point to
        structs = [self._layer(*each) for each in zip(layers, self.projections, strict=True)]
        layer_array = (LayerStruct * len(layers))(*structs)
        head_array = (MatrixStruct * len(head))(*(m.struct for m in self.head))
        self.struct = ModelStruct(
            SizesStruct(
                *(d_model, sizes.d_inner, sizes.heads, sizes.groups),
                *(sizes.state, width),
                *(NO_LIMIT if dt_limit is None else dt_limit),
            ),
            *(len(layers), len(head)),
            *(ctypes.addressof(self._keep(each)) for each in (layer_array, head_array)),
            *(self._at(norm_weight), eps),
        )

    def __call__(self, h: Tensor, states: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """The logits after one token of each row. All states are updated in place.

        Args:
            h: (batch, d_model), contiguous float32: the embeddings. They are overwritten.
            states: conv_state and ssm_state of each layer, as in `mixer_step`, in float32.

        Returns:
            (batch, vocabulary), float32.

        Raises:
            ValueError, TypeError: an argument has the wrong shape, dtype, device or layout.
        """
        self._check(h, states)
        fields: list[int] = []  # those of `State` in kernels.cpp, for one layer after the other
        for conv, ssm in states:
            fields += (conv.data_ptr(), ssm.data_ptr(), *conv.stride())
        structs = (ctypes.c_int64 * len(fields))(*fields)  # quicker than ctypes.Structure
        logits = h.new_empty(len(h), self.vocabulary)
        sizes = map(ctypes.c_int64, (len(h), threads_for(self.of_a_product)))
        self.code.ysnake_step(
            *(ctypes.byref(self.struct), structs, Pointer(h.data_ptr()), *sizes),
            Pointer(logits.data_ptr()),
        )
        return logits

    def _check(self, h: Tensor, states: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Raise where the compiled code would read or write outside of a tensor."""
        if len(states) != (count := len(self.projections)):
            raise ValueError(f"states: expected those of {count} layers, got {len(states)}")
        of_h, of_conv, of_ssm = ((len(h), *sizes) for sizes in self.of_a_row)
        like = self.head[0].weights
        check("h", h, of_h, like, "the model", FLOAT32)
        for conv, ssm in states:
            check("conv_state", conv, of_conv, like, "h", FLOAT32)
            check("ssm_state", ssm, of_ssm, like, "h", FLOAT32)
            if not ssm.is_contiguous():
                raise ValueError("ssm_state: expected a contiguous tensor, got a strided one")
        if not h.is_contiguous():
            raise ValueError("h: expected a contiguous tensor, got a strided one")

    def _layer(self, weights: LayerWeights, projections: tuple[Matrix, Matrix]) -> LayerStruct:
        ready = prepare(weights.mixer, torch.float32)
        vectors = (ready.dt_bias, ready.A, ready.D, ready.norm_weight)
        return LayerStruct(
            self._at(weights.norm_weight),
            *(m.struct for m in projections),
            self._at(ready.taps),
            None if ready.conv_bias is None else self._at(ready.conv_bias),
            *map(self._at, vectors),
            *(weights.eps, weights.mixer.eps),
        )

    def _at(self, tensor: Tensor) -> int:
        return self._keep(as_floats(tensor)).data_ptr()

    def _keep(self, thing):
        self.kept.append(thing)
        return thing
