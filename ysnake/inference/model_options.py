"""The options that name a model and say how to run it, and the loading of that model."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import Positional, arg

from ysnake.shared import cli

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from ysnake.inference.decoding import Decoder


@dataclass
class ModelOptions:
    """Which model to run, and how."""

    path: Positional[Annotated[Path | None, arg(metavar="PATH")]] = None
    """A run or a checkpoint folder; by default the newest run."""
    checkpoint: Literal["best", "last"] | None = None
    """The checkpoint of the run; by default best if --patience ended training, else last."""
    weights: Literal["float32", "int8"] = "float32"
    """int8 generates faster on a CPU. The output is nearly identical."""
    compile: bool = False
    """Generate faster on a CPU, after some seconds of compiling. Needs a C++ compiler."""
    device: str = "auto"
    """auto (CUDA if available, else CPU), cpu, cuda or mps."""
    threads: int | None = None
    """CPU threads; by default one for each core."""

    def load(self) -> "tuple[Decoder, Tokenizer]":
        """Load the model for generating text, and its tokenizer.

        Raises:
            InputError: an option is wrong, or there is no model to load.
        """
        path = self.path or cli.newest_run()

        from ysnake.checkpoints import checkpoint
        from ysnake.inference.decoding import Decoder

        cli.tune_memory()
        cli.use_threads(self.threads)
        device = cli.pick_device(self.device)
        _, tokenizer, model = checkpoint.load_all(path, self.checkpoint, device)
        return Decoder(model, self.weights, self.compile), tokenizer
