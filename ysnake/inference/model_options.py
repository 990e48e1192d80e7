"""The options that name a model and say how to run it, and the loading of that model."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import Positional, arg

from ysnake.shared import cli

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from ysnake.inference.decoding import Decoder
    from ysnake.model.network import Model

# Single options, for commands that take only some of them.
PathOption = Positional[
    Annotated[
        Path | None,
        arg(metavar="PATH", help="A run or a checkpoint folder; by default the newest run."),
    ]
]
CheckpointOption = Annotated[
    Literal["best", "last"] | None,
    arg(help="The checkpoint of the run; by default best if --patience ended training, else last."),
]
DeviceOption = Annotated[str, arg(help="auto (CUDA if available, else CPU), cpu, cuda or mps.")]
ThreadsOption = Annotated[int | None, arg(help="CPU threads; by default one for each core.")]


@dataclass
class ModelOptions:
    """Which model to run, and how."""

    path: PathOption = None
    checkpoint: CheckpointOption = None
    weights: Literal["float32", "int8"] = "float32"
    """int8 generates faster on a CPU. The output is nearly identical."""
    compile: bool = False
    """Generate faster on a CPU, after some seconds of compiling. Needs a C++ compiler."""
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

        from ysnake.inference.decoding import Decoder

        preemption.watch.silence()  # its warning would stand in the middle of the text
        _, tokenizer, model = self.read()
        return Decoder(model, self.weights, self.compile), tokenizer


def read_model(
    path: Path | None, checkpoint: str | None, device: str, threads: int | None
) -> "tuple[Path, Tokenizer, Model]":
    """Prepare this process for running a model, and read the model.

    Args:
        path: a run or a checkpoint folder; None means the newest run.
        checkpoint: "best" or "last" of the run; None means the usual one.
        device: where the model is to run; "auto" chooses.
        threads: of the CPU; None means one for each core.

    Returns:
        The folder of the checkpoint, its tokenizer, and its model.

    Raises:
        InputError: an argument is wrong, or there is no model to load.
    """
    path = path or cli.newest_run_named()

    from ysnake.checkpoints import checkpoint as checkpoints

    cli.tune_memory()
    cli.use_threads(threads)
    return checkpoints.load_all(path, checkpoint, cli.pick_device(device))
