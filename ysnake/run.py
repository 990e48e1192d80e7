"""`python -m ysnake.run`: complete a text of any length, and print tokens as they come."""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from ysnake.inference.conversation import complete, converse, read
from ysnake.inference.model_options import ModelOptions
from ysnake.inference.sampling import Sampling
from ysnake.shared import cli, run_files, terminal
from ysnake.shared.errors import InputError, why
from ysnake.shared.files import check_place


@dataclass
class Options:
    """Complete text with a trained model. Without a prompt it completes each line that you type."""

    model: ModelOptions = field(default_factory=ModelOptions)
    prompt: str | None = None
    """The text to complete. Without it, you type texts line by line in a terminal. Piped input is
    read as one text, without its last line break."""
    prompt_file: Annotated[Path | None, arg(metavar="FILE")] = None
    """Read the prompt from this file, in UTF-8. Use it for a prompt too long for a command line."""
    max_tokens: int = 200
    """Largest number of tokens to generate."""
    sampling: Sampling = field(default_factory=Sampling)
    stop: Annotated[tuple[str, ...], arg(metavar="TEXT...")] = ()
    """Stop where one of these texts appears; it is not printed."""
    save_state: Annotated[Path | None, arg(metavar="FILE")] = None
    """Save the model's state after the prompt to this file, and generate nothing."""
    load_state: Annotated[Path | None, arg(metavar="FILE")] = None
    """Continue from the state in this file."""


def main(argv: list[str], program: str = cli.MODULES) -> int:
    """Complete as the command line says; returns the exit code."""
    options = cli.parse(Options, argv, cli.command_line("run", program))
    if options.max_tokens < 1:
        raise InputError(f"expected at least 1, got {options.max_tokens}", field="--max-tokens")
    if "" in options.stop:
        raise InputError("expected texts of at least one character", field="--stop")
    run_files.check_no_model(options.stop, "--stop")
    if options.prompt is not None and options.prompt_file is not None:
        raise InputError("cannot be combined with --prompt", field="--prompt-file")
    if options.save_state is not None:
        check_place(options.save_state, "--save-state")  # before a long prompt is read
    decoder, tokenizer = options.model.load()

    from ysnake.inference.generate import Context

    def new_context() -> Context:
        context = Context(decoder, tokenizer.get_vocab_size())
        if options.load_state is not None:
            context.load(options.load_state)
        return context

    how = (options.sampling, options.max_tokens, options.stop)
    prompt = options.prompt and terminal.check_text(options.prompt, "--prompt")
    if options.prompt_file is not None:
        prompt = read_prompt(options.prompt_file)
    if prompt is None and sys.stdin and sys.stdin.isatty() and options.save_state is None:
        converse(new_context, tokenizer, *how)
        return cli.DONE
    if prompt is None:
        prompt = terminal.read_input().removesuffix("\n")  # which echo and editors add
    context = new_context()
    read(context, tokenizer, prompt)
    if options.save_state is not None:
        context.save(options.save_state)
        size = options.save_state.stat().st_size / 1e6
        print(
            f"saved the state after the prompt to {options.save_state} "
            f"({size:.1f} MB at any length of text)",
            file=sys.stderr,
        )
    else:
        if complete(context, tokenizer, *how).stopped:
            return cli.INTERRUPTED
    return cli.DONE


def read_prompt(path: Path) -> str:
    """The text of a file, without a line break at its end."""
    try:
        return path.read_text(encoding="utf-8-sig").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise terminal.not_text(str(path), error.start, "utf-8") from error
    except OSError as error:
        raise InputError(f"--prompt-file: {path}: {why(error)}") from error


if __name__ == "__main__":
    cli.run(main)
