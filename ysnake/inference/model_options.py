"""The options that name a model and say how to run it, and the loading of that model."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import Positional, arg

from ysnake.shared import cli

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from ysnake.inference.decoding import Decoder
    from ysnake.model.network import Model

Weights = Literal["auto", "float32", "bfloat16", "int8", "int4"]

# Single options, for commands that take only some of them.
PathOption = Positional[
    Annotated[
        Path | None,
        arg(
            metavar="[PATH]",
            help="A run, a checkpoint folder, or the name of a run in runs/; by default the newest "
            "run.",
        ),
    ]
]
CheckpointOption = Annotated[
    Literal["best", "last"] | None,
    arg(help="The checkpoint of the run; by default best if --patience ended training, else last."),
]
WeightsOption = Annotated[
    Weights,
    arg(
        help="How weights are stored for generation. Fewer bits generate a single text faster. "
        "bfloat16 and int4 on a CPU need Linux and a C++ compiler. auto is bfloat16 on such a CPU, "
        "and float32 otherwise."
    ),
]
DeviceOption = Annotated[str, arg(help="auto (CUDA if available, else CPU), cpu, cuda or mps.")]
ThreadsOption = Annotated[
    int | None, arg(help="CPU threads; by default one for each core that may be used.")
]


@dataclass
class ModelOptions:
    """Which model to run, and how."""

    path: PathOption = None
    checkpoint: CheckpointOption = None
    weights: WeightsOption = "auto"
    no_compile: bool = False
    """On a CPU, generate with pure torch. By default, C++ code generates, on Linux with a C++
    compiler. It is compiled at the first start, in a few seconds."""
    device: DeviceOption = "auto"
    threads: ThreadsOption = None

    def read(self) -> "tuple[Path, Tokenizer, Model]":
        """The folder of the checkpoint, its tokenizer, and its model as it was trained.

        Raises:
            InputError: an option is wrong, or there is no model to load.
        """
        return read_model(self.path, self.checkpoint, self.device, self.threads)

    def load(self) -> "tuple[Decoder, Tokenizer]":
        """Load the model for writing text in the terminal, and its tokenizer.

        Raises:
            InputError: an option is wrong, or there is no model to load.
        """
        from ysnake_kernels import preemption

        preemption.watch.silence()  # its warning would stand in the middle of the text
        _, tokenizer, model = self.read()
        return make_decoder(model, self.weights, not self.no_compile), tokenizer


def make_decoder(model: "Model", weights: Weights, compile: bool = True) -> "Decoder":
    """Make a `Decoder`. Standard error says when code is compiled, and why it cannot be.

    Raises:
        InputError: the weights cannot be stored so.
    """
    import torch
    from ysnake_kernels.allocator import give_back_freed_memory
    from ysnake_kernels.native.build import would_compile

    from ysnake.inference.decoding import Decoder

    weight = model.backbone.embeddings.weight
    suits = weight.device.type == "cpu" and weight.dtype == torch.float32
    if compile and suits and would_compile():
        print("compiling code for this processor, once: a few seconds", file=sys.stderr)
    decoder = Decoder(model, weights, compile)
    give_back_freed_memory()  # that of the weights before they were rounded
    if decoder.not_compiled:
        print(
            f"warning: {decoder.not_compiled}; generating with pure torch, which is slower",
            file=sys.stderr,
        )
    return decoder


def read_model(
    path: Path | None, checkpoint: str | None, device: str, threads: int | None
) -> "tuple[Path, Tokenizer, Model]":
    """Prepare this process for running a model, and read the model.

    Args:
        path: a run or a checkpoint folder; None means the newest run.
        checkpoint: "best" or "last" of the run; None means the usual one.
        device: where the model is to run; "auto" chooses.
        threads: of the CPU; None means one for each core that may be used.

    Returns:
        The folder of the checkpoint, its tokenizer, and its model.

    Raises:
        InputError: an argument is wrong, or there is no model to load.
    """
    path = cli.run_or_newest(path)

    from ysnake.checkpoints import checkpoint as checkpoints

    cli.tune_memory()
    cli.use_threads(threads)
    return checkpoints.load_all(path, checkpoint, cli.pick_device(device))
