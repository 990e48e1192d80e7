"""A trained model from Python: `ysnake.load("runs/mine").generate("Once")`."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from torch import Tensor

    from ysnake.inference.decoding import Decoder


class LanguageModel:
    """A model and its tokenizer. Made by `ysnake.load`."""

    def __init__(self, decoder: "Decoder", tokenizer: "Tokenizer"):
        self.decoder, self.tokenizer = decoder, tokenizer

    @overload
    def generate(
        self, prompt: str, max_tokens: int = ..., *, stop: Sequence[str] = ...,
        stream: Literal[False] = ..., **sampling: float | None,
    ) -> str: ...  # fmt: skip

    @overload
    def generate(
        self, prompt: str, max_tokens: int = ..., *, stop: Sequence[str] = ...,
        stream: Literal[True], **sampling: float | None,
    ) -> Iterator[str]: ...  # fmt: skip

    def generate(
        self,
        prompt: str,
        max_tokens: int = 200,
        *,
        stop: Sequence[str] = (),
        stream: bool = False,
        **sampling: float | None,
    ) -> str | Iterator[str]:
        """Complete a text.

        Args:
            prompt: the text to go on from.
            max_tokens: tokens to write at most.
            stop: end where one of these texts appears; it is not part of the result.
            stream: return the pieces of the text as they are written, instead of all of it.
            sampling: temperature, top_k, top_p, repetition_penalty, seed; see
                `ysnake.inference.sampling.Sampling`.

        Raises:
            InputError: a value out of its range.
            TypeError: an argument that is not known.
        """
        from ysnake.inference.conversation import read
        from ysnake.inference.generate import Context
        from ysnake.inference.sampling import Sampling
        from ysnake.inference.text_stream import texts, until
        from ysnake.shared.errors import InputError

        if max_tokens < 1:
            raise InputError(f"max_tokens: expected at least 1, got {max_tokens}")
        options: dict[str, Any] = {**sampling}
        how = Sampling(**options)
        context = Context(self.decoder, self.tokenizer.get_vocab_size())
        read(context, self.tokenizer, prompt)
        tokens = context.generate(how, max_tokens)
        pieces = until(texts(self.tokenizer, tokens), tuple(stop))
        return pieces if stream else "".join(pieces)

    def logits(self, text: str) -> "Tensor":
        """The logits of what follows each token of a text, its beginning included.

        Returns:
            (tokens + 1, vocab) on the model's device: row 0 follows the beginning of a document,
            row i the text's token i - 1.
        """
        import torch

        from ysnake.text.tokenizer import encode

        config = self.decoder.model.config
        ids = [config.bos_id, *encode(self.tokenizer, text)]
        device = self.decoder.model.backbone.embeddings.weight.device
        logits, _ = self.decoder.step(torch.tensor([ids], device=device))
        return logits[0, :, : self.tokenizer.get_vocab_size()]

    def loss(self, text: str) -> float:
        """The mean loss of a text as a document, in nats per token; its end counts, too."""
        from ysnake.inference.score import score

        return score(self.decoder, self.tokenizer, [(text, True)], lambda n: None).loss_per_token


def load(
    path: Path | str | None = None,
    *,
    checkpoint: Literal["best", "last"] | None = None,
    device: str = "auto",
    weights: Literal["float32", "int8"] = "float32",
) -> LanguageModel:
    """Read a model and its tokenizer.

    Args:
        path: a run, or a checkpoint folder of ours or of Hugging Face's Mamba2; None is the newest
            run in runs/.
        checkpoint: which one of a run; None is best where patience ended it, else last.
        device: auto (CUDA, else CPU), cpu, cuda or mps.
        weights: int8 writes faster on a CPU, and nearly the same.

    Raises:
        InputError: nothing to read there, or it is damaged.
    """
    from ysnake.checkpoints import checkpoint as checkpoints
    from ysnake.inference.decoding import Decoder
    from ysnake.shared import cli

    folder = cli.newest_run() if path is None else path
    _, tokenizer, model = checkpoints.load_all(folder, checkpoint, cli.pick_device(device))
    return LanguageModel(Decoder(model, weights), tokenizer)
