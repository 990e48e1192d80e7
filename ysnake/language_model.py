"""A trained model from Python: `ysnake.load("runs/mine").generate("Once")`."""

from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_type_hints, overload

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from torch import Tensor

    from ysnake.inference.decoding import Decoder
    from ysnake.inference.model_options import Weights


class LanguageModel:
    """A trained model and its tokenizer. `ysnake.load` makes one."""

    def __init__(self, decoder: "Decoder", tokenizer: "Tokenizer"):
        self.decoder, self.tokenizer = decoder, tokenizer

    def __repr__(self) -> str:
        config = self.decoder.model.config
        sizes = f"d_model={config.d_model}, n_layers={config.n_layers}"
        return f"<LanguageModel {sizes}, vocabulary of {self.tokenizer.get_vocab_size()}>"

    @overload
    def generate(
        self, prompt: str, max_tokens: int = ..., *, stop: str | Sequence[str] = ...,
        stream: Literal[False] = ..., **sampling: float | None,
    ) -> str: ...  # fmt: skip

    @overload
    def generate(
        self, prompt: str, max_tokens: int = ..., *, stop: str | Sequence[str] = ...,
        stream: Literal[True], **sampling: float | None,
    ) -> Iterator[str]: ...  # fmt: skip

    def generate(
        self,
        prompt: str,
        max_tokens: int = 200,
        *,
        stop: str | Sequence[str] = (),
        stream: bool = False,
        **sampling: float | None,
    ) -> str | Iterator[str]:
        """Complete a text.

        Args:
            prompt: the beginning of the text. The result does not contain it.
            max_tokens: largest number of tokens to generate.
            stop: end where this text, or one of these texts, appears. The result does not contain
                it.
            stream: return an iterator over pieces of the text, each as soon as it is generated.
            sampling: temperature, top_k, top_p, repetition_penalty and seed, as in
                `ysnake.inference.sampling.Sampling`.

        Raises:
            InputError: a value has a wrong type or is out of range.
            TypeError: there is no such argument.
        """
        from ysnake.inference.conversation import read
        from ysnake.inference.generate import Context
        from ysnake.inference.sampling import Sampling
        from ysnake.inference.text_stream import texts, until
        from ysnake.shared.errors import InputError, named_as_in_python

        known = [field.name for field in fields(Sampling)]
        if unknown := sampling.keys() - set(known):
            names = ", ".join(["prompt", "max_tokens", "stop", "stream", *known])
            raise TypeError(f"generate: no argument {min(unknown)}; expected {names}")
        stops = (stop,) if isinstance(stop, str) else tuple(stop)
        _check("prompt", prompt, str)
        _check("max_tokens", max_tokens, int)
        for text in stops:
            _check("stop", text, str)
            if not text:
                raise InputError("expected texts of at least one character", field="stop")
        for name, kind in get_type_hints(Sampling).items():
            if name in sampling:
                _check(name, sampling[name], kind)
        if max_tokens < 1:
            raise InputError(f"expected at least 1, got {max_tokens}", field="max_tokens")
        options: dict[str, Any] = {**sampling}
        context = Context(self.decoder, self.tokenizer.get_vocab_size())
        with named_as_in_python([*known, "prompt"]):
            how = Sampling(**options)
            read(context, self.tokenizer, prompt)
        tokens = context.generate(how, max_tokens)
        pieces = until(texts(self.tokenizer, tokens, context.last_token), stops)
        return pieces if stream else "".join(pieces)

    def logits(self, text: str) -> "Tensor":
        """The logits of the next token at each position of a text.

        Returns:
            A tensor (tokens + 1, vocabulary) on the model's device. Row 0 predicts the first token
            of the text, row i the token after the first i tokens. `tokenizer.encode(text).ids` are
            the tokens. The model's rows beyond the vocabulary, which pad it, are left out; `loss`
            counts them, as training does.
        """
        import torch

        from ysnake.text.tokenizer import encode

        _check("text", text, str)
        bos_id, _ = self.decoder.model.config.document_tokens()
        ids = [bos_id, *encode(self.tokenizer, text)]
        device = self.decoder.model.backbone.embeddings.weight.device
        logits, _ = self.decoder.step(torch.tensor([ids], device=device))
        return logits[0, :, : self.tokenizer.get_vocab_size()]

    def loss(self, text: str) -> float:
        """The mean loss of a document in nats per token. The token that ends it counts too."""
        from ysnake.inference.score import score

        _check("text", text, str)
        return score(self.decoder, self.tokenizer, [(text, True)], lambda n: None).loss_per_token


def _check(name: str, value: Any, kind: Any) -> None:
    """Raise InputError if an argument has another type."""
    from ysnake.shared.errors import InputError
    from ysnake.shared.field_types import is_a, name_of

    if not is_a(kind, value):
        raise InputError(f"expected {name_of(kind)}, got {value!r}"[:300], field=name)


def load(
    path: Path | str | None = None,
    *,
    checkpoint: Literal["best", "last"] | None = None,
    device: str = "auto",
    weights: "Weights" = "float32",
) -> LanguageModel:
    """Load a model and its tokenizer.

    Args:
        path: a run, the name of a run in runs/, or a checkpoint folder of ysnake or of Hugging
            Face's Mamba2. None means the newest run in runs/.
        checkpoint: the checkpoint of a run. None means best if `patience` ended training, else
            last.
        device: auto (CUDA if available, else CPU), cpu, cuda or mps.
        weights: float32, bfloat16, int8, int4 or auto: how they are stored. Fewer bits generate
            faster; `ysnake run --help` says more. float32 does not round them.

    Raises:
        InputError: there is no model to load, it is damaged, or its weights cannot be stored so.
    """
    from ysnake.checkpoints import checkpoint as checkpoints
    from ysnake.inference.model_options import make_decoder
    from ysnake.shared import cli
    from ysnake.shared.errors import named_as_in_python

    folder = cli.newest_run() if path is None else cli.find_run(Path(path))
    with named_as_in_python(["checkpoint", "device", "weights"]):
        _, tokenizer, model = checkpoints.load_all(folder, checkpoint, cli.pick_device(device))
        return LanguageModel(make_decoder(model, weights), tokenizer)
