"""`python -m ysnake.export`: a model as a GGUF file, for llama.cpp, Ollama and what builds on them.

Beside the file lies the Modelfile that `ollama create` reads.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import arg

from ysnake.checkpoints.gguf_file import write_gguf
from ysnake.checkpoints.modelfile import check, modelfile
from ysnake.inference.model_options import CheckpointOption, PathOption
from ysnake.inference.sampling import Sampling
from ysnake.shared import cli, files
from ysnake.shared.shown import as_argument
from ysnake.text import chat_template


@dataclass(kw_only=True)
class Options:
    """Write a model as a GGUF file, and a Modelfile beside it."""

    path: PathOption = None
    checkpoint: CheckpointOption = None
    gguf: Annotated[Path, arg(metavar="FILE")]
    """The file to write. An existing one is replaced."""
    type: Literal["f32", "f16", "bf16", "q8_0", "q4_0"] = "f32"
    """Type of the matrices: f32 is exact, f16 and bf16 take half the size, q8_0 about a quarter,
    q4_0 about a seventh."""


def main(argv: list[str], program: str = cli.MODULES) -> int:
    """Export as the command line says; returns the exit code."""
    options = cli.parse(Options, argv, cli.command_line("export", program))
    beside = check(options.gguf)

    from ysnake.checkpoints import checkpoint

    path = cli.run_or_newest(options.path)
    folder, tokenizer, model = checkpoint.load_all(path, options.checkpoint)
    settings, eos_id = chat_template.kept(folder), model.config.eos_id
    template = settings.get("chat_template")
    end_of_turn = tokenizer.token_to_id(settings.get("eos_token", "")) if template else None
    if end_of_turn == eos_id:
        end_of_turn = None
    chat = (template, end_of_turn)
    write_gguf(options.gguf, model, tokenizer, options.type, checkpoint.name_of(folder), *chat)
    drawn = Sampling()
    parameters = {
        "temperature": drawn.temperature,
        "top_k": drawn.top_k,
        "top_p": drawn.top_p,
        "repeat_penalty": drawn.repetition_penalty,
    }
    # with a chat template Ollama ends a text at the tokens that the GGUF file names
    ends = model.config.end_ids - ({eos_id, end_of_turn} if template else set())
    known = [tokenizer.id_to_token(token) for token in sorted(ends) if token >= 0]
    stops = [token for token in known if token is not None]
    text = modelfile(options.gguf, parameters, stops, chats=template is not None)
    with files.replacing(beside) as new:
        new.write_text(text, encoding="utf-8", errors="surrogateescape")
    size = f"{options.gguf.stat().st_size / 1e6:.1f} MB"
    create = f"ollama create {as_argument(options.gguf.stem)} -f {as_argument(beside)}"
    cli.console().print(
        f"[bold]{cli.markup(options.gguf)}[/]: {cli.markup(folder)}, {model.n_parameters():,} "
        f"parameters as {options.type}, {size}\n{cli.markup(create)}"
    )
    return cli.DONE


if __name__ == "__main__":
    cli.run(main)
