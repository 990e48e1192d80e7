"""What all commands share: options from a dataclass, one-line errors, exit codes, the device."""

import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import MISSING, Field, fields, is_dataclass, replace
from itertools import chain
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    TextIO,
    TypeVar,
    get_args,
    get_origin,
    get_type_hints,
)

import docstring_parser
import tyro
from tyro.constructors import (
    ConstructorRegistry,
    PrimitiveConstructorSpec,
    PrimitiveTypeInfo,
    StructConstructorSpec,
    StructFieldSpec,
    StructTypeInfo,
    UnsupportedTypeAnnotationError,
)

from ysnake.shared import control_groups, run_lock, terminal
from ysnake.shared.errors import InputError, option, why
from ysnake.shared.shown import escape_controls

if TYPE_CHECKING:
    from rich.console import Console

DONE, FAILED, WRONG_INPUT, INTERRUPTED = 0, 1, 2, 130
MOST_THREADS = 4096
STYLE = (tyro.conf.FlagCreatePairsOff, tyro.conf.OmitArgPrefixes)  # of all options
KINDS = ConstructorRegistry()  # how tyro reads the types of options, where not in its own way

# The two ways to start a command. Its name follows.
MODULES, PROGRAM = "python -m ysnake.", "ysnake "
RUNS = Path("runs")

Options = TypeVar("Options")


def command_line(name: str, program: str = MODULES) -> str:
    """How to start a command, for messages to the user.

    Args:
        name: the command, for example "generate_data".
        program: MODULES or PROGRAM, as the user started the present command.
    """
    return program + (name if program == MODULES else name.replace("_", "-"))


@KINDS.primitive_rule
def optional(
    info: PrimitiveTypeInfo,
) -> PrimitiveConstructorSpec | UnsupportedTypeAnnotationError | None:
    """Show an option of `kind | None` as one of `kind`. The word None still means None."""
    kinds = get_args(info.type)
    if len(kinds) != 2 or type(None) not in kinds:
        return None
    kind = kinds[0] if kinds[1] is type(None) else kinds[1]
    spec = ConstructorRegistry.get_primitive_spec(PrimitiveTypeInfo.make(kind, info.markers))
    if isinstance(spec, UnsupportedTypeAnnotationError):
        return spec

    def none_or(words: list[str]) -> Any:
        return None if words == ["None"] else spec.instance_from_str(words)

    def words_of(value: Any) -> list[str]:
        return ["None"] if value is None else spec.str_from_instance(value)

    return replace(
        spec,
        instance_from_str=none_or,
        is_instance=lambda value: value is None or spec.is_instance(value),
        str_from_instance=words_of,
    )


@KINDS.struct_rule
def described(info: StructTypeInfo) -> StructConstructorSpec | None:
    """The options in a dataclass. The help of each is its docstring, as one paragraph.

    An option whose default says nothing, such as None, shows no default.
    """
    if not is_dataclass(info.type) or info.type.__module__.startswith("tyro."):
        return None
    kinds = get_type_hints(info.type, include_extras=True)
    docstrings = docstring_parser.parse_from_object(info.type).params
    helps = {each.arg_name: " ".join((each.description or "").split()) for each in docstrings}
    shown = tyro.conf.arg(help_behavior_hint=lambda value: value and f"(default: {value})")
    silent = tyro.conf.arg(help_behavior_hint="")

    def make(**values: Any) -> Any:
        try:
            return info.type(**values)
        except InputError as error:  # tyro would show a ValueError in its own words
            raise _Refused(error) from error

    make.__doc__ = " ".join((info.type.__doc__ or "").split())  # what tyro shows above the options

    def spec(field: Field) -> StructFieldSpec:
        known = isinstance(info.default, info.type)
        default = getattr(info.default, field.name) if known else _default(field)
        hint = silent if default is None or default is False else shown
        kind: Any = Annotated[kinds[field.name], hint]
        return StructFieldSpec(field.name, kind, default, helps.get(field.name))

    return StructConstructorSpec(make, tuple(spec(field) for field in fields(info.type)))


def _default(field: Field) -> Any:
    if field.default is not MISSING:
        return field.default
    return tyro.MISSING if field.default_factory is MISSING else field.default_factory()


class _Refused(Exception):
    """Carries the InputError of a dataclass through tyro."""

    def __init__(self, error: InputError):
        super().__init__(str(error))
        self.error = error


def together(options: type, argv: Sequence[str]) -> list[str]:
    """The arguments, with all values of a repeated option in one place.

    So `--data a --data b` is `--data a b`. tyro would take the last values alone. Only options that
    take any number of values are moved.

    Args:
        options: the dataclass of the options.
        argv: the arguments.
    """
    kinds = {option(name): kind for name, kind in get_type_hints(options).items()}
    found: dict[str, list[list[str]]] = {}  # for each such option: what each occurrence takes
    others: list[str] = []
    here = others
    for word in argv:
        name, equals, value = word.partition("=")
        name = name.replace("_", "-")
        kind = kinds.get(name) if word.startswith("--") else None
        if get_origin(kind) is tuple and get_args(kind)[-1] is Ellipsis:
            here = [value] if equals else []
            found.setdefault(name, []).append(here)
            here = others if equals else here
        else:
            here = others if word.startswith("-") else here
            here.append(word)
    if all(len(given) == 1 for given in found.values()):
        return list(argv)
    moved = (word for name, given in found.items() for word in [name, *chain(*given)])
    return [*others, *moved]


def parse(
    options: type[Options], argv: list[str], command: str, default: Options | None = None
) -> Options:
    """Read the options of a command line into a dataclass.

    Ends the process for `--help` and for options that cannot be read.

    Args:
        options: the dataclass. The string below a field is its help.
        argv: the arguments.
        command: how the user started the command, for the usage line.
        default: values of the options that are not given.
    """
    try:
        parsed: Any = tyro.cli(
            options,
            prog=command,
            args=together(options, argv),
            default=default,
            config=STYLE,
            registry=KINDS,
        )
    except _Refused as refused:
        raise refused.error from None
    return parsed


def run(command: Callable[[list[str]], int]) -> None:
    """Run a command with the arguments of this process and end the process with its exit code."""
    terminal.prepare()
    try:
        code = command(sys.argv[1:])
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        code = WRONG_INPUT
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = INTERRUPTED
    except BrokenPipeError:  # the program that read our output has ended
        sys.stderr.close()
        code = FAILED
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        message = escape_controls(f"{where}{why(error)}")
        print(f"error: {message}", file=sys.stderr)
        code = FAILED
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        print(
            "error: not enough memory; smaller sizes or a smaller batch need less", file=sys.stderr
        )
        code = FAILED
    sys.exit(code)


def out_of_memory(error: BaseException) -> bool:
    """Whether the memory of this machine or of its GPU was too small."""
    # torch raises a plain RuntimeError when CPU memory is full, so its text must tell.
    said = ("DefaultCPUAllocator", "out of memory")
    return isinstance(error, MemoryError) or any(text in str(error) for text in said)


@contextmanager
def file_errors(path: Path) -> Iterator[None]:
    """Turn an OSError inside the block into an InputError that names the path.

    The block may write, read or lock files.
    """
    try:
        yield
    except OSError as error:
        raise InputError(f"{error.filename or path}: {why(error)}") from error


def console(stream: TextIO | None = None) -> "Console":
    """The console that a command prints to. It wraps no lines; the terminal does.

    `stream` is standard output unless given. A command continues when its terminal is closed or the
    program that reads its output ends.
    """
    from rich.console import Console

    stream = stream or sys.stdout
    out: Any = stream and terminal.LastingOutput(stream)
    return Console(file=out, highlight=False, soft_wrap=True)


def markup(text: object) -> str:
    """Escape text, such as a path, so that rich prints it unchanged."""
    from rich.markup import escape

    return escape(escape_controls(str(text)))


def runs() -> list[Path]:
    """The folders of all runs in runs/, without hidden folders."""
    found = RUNS.glob("*/settings.json")
    return [path.parent for path in found if not path.parent.name.startswith(".")]


def being_made() -> str:
    """A line about the trainings in runs/ that are being prepared; empty if there are none."""
    names = ", ".join(str(folder) for folder in run_lock.being_made(RUNS))
    return names and f"a training is being prepared: {names}"


def no_run() -> str:
    """The error message if there is no run in runs/."""
    return f"{RUNS}: no run there yet; {being_made() or f'`{PROGRAM}train` makes one'}"


def newest_run() -> Path:
    """The folder of the run that was started or resumed last."""
    found = runs()
    if not found:
        raise InputError(no_run())
    return max(found, key=lambda folder: (folder / "settings.json").stat().st_mtime)


def find_run(path: Path) -> Path:
    """The folder that a user names. The name of a run in runs/ is enough."""
    inside = RUNS / path
    return inside if inside.is_dir() and not path.exists() else path


def run_or_newest(path: Path | None) -> Path:
    """The folder that a user names, or else the newest run. Then standard error gets its name."""
    if path is not None:
        return find_run(path)
    folder = newest_run()
    print(f"the newest run: {escape_controls(str(folder))}", file=sys.stderr)
    return folder


def pick_device(name: str) -> str:
    """The device to compute on: `auto` means CUDA if this machine has a GPU, else the CPU.

    Raises:
        InputError: this machine does not have the device, or the variable YSNAKE_BACKEND names
            nothing that runs on it.
    """
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(
            f"expected auto, cpu, cuda or mps, got {name}", field="--device"
        ) from error
    count = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": torch.backends.mps.is_available()}
    if (device.index or 0) >= count.get(device.type, 0):
        raise InputError(f"{name} is not available here", field="--device")
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # on which CUDA graphs are captured
    if "YSNAKE_BACKEND" in os.environ:
        from ysnake_kernels.backend import choose

        try:
            choose(torch.empty(0, device=device))
        except (ValueError, RuntimeError) as error:
            raise InputError(str(error)) from error
    return name


def tune_memory() -> None:
    """Tune memory allocation for a command that runs a model on a CPU.

    Freed memory is kept, not returned to the system, so that the next operation reuses it. Huge
    pages make reading weights faster; they take some more memory.
    """
    import torch
    from ysnake_kernels.allocator import keep_freed_memory

    keep_freed_memory()
    name = "THP_MEM_ALLOC_ENABLE"
    if name not in os.environ:
        os.environ[name] = "1"
        torch.empty(1)  # torch reads the variable once, for its first tensor
        del os.environ[name]  # child processes do not inherit it


def use_threads(count: int | None) -> None:
    """Set the number of CPU threads.

    None leaves the choice to torch, which takes one for each core. But if a container or a job may
    use the time of fewer cores, it gets fewer threads. Processes that a launcher started on this
    machine share the cores. More threads would wait for each other.

    Raises:
        InputError: the number is out of range.
    """
    import torch

    if count is not None:
        if not 1 <= count <= MOST_THREADS:
            raise InputError(f"expected 1 to {MOST_THREADS}, got {count}", field="--threads")
        torch.set_num_threads(count)
    elif "OMP_NUM_THREADS" not in os.environ:
        here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        cores = (control_groups.cpu_limit() or os.cpu_count() or 1) / here
        if cores < torch.get_num_threads():
            torch.set_num_threads(max(1, math.ceil(cores)))


@contextmanager
def usual_torch() -> Iterator[None]:
    """In the block torch computes as in a new process. Afterwards its settings are as before.

    A program may have chosen another default dtype, or call this inside `torch.no_grad` or
    `torch.autocast`. The block may change the number of threads.
    """
    import torch

    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    try:
        with torch.inference_mode(False), torch.enable_grad(), ExitStack() as autocasts:
            for device in devices:
                autocasts.enter_context(torch.autocast(device, enabled=False))
            yield
    finally:
        torch.set_default_dtype(dtype)
        torch.set_num_threads(threads)
