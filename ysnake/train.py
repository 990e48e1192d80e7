"""`python -m ysnake.train`: train a model on documents, watch it learn, stop and resume at will.

Every batch is a function of the settings and the step, so a run that was stopped goes on as if it
never had been. The functions here can be called one by one; `main` only strings them together.
"""

import json
import math
import os
import shutil
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ysnake import cli, memory, parallel
from ysnake import settings as settings_of
from ysnake.config import PRESETS, InputError, ModelConfig, model_config
from ysnake.parallel import Ranks
from ysnake.settings import SHIPPED, Settings

if TYPE_CHECKING:
    import torch
    from rich.console import Console
    from tokenizers import Tokenizer

    from ysnake.data import Batch, Tokens
    from ysnake.model import Model, State

MEAN_OVER = 50  # steps that the training loss is averaged over where it decides or is shown
GIVE_UP_AFTER = 10  # steps in a row without a finite loss
VAL_TOKENS = 1 << 15  # held-out tokens looked at while training
CLIP = 1.0  # largest norm of a step's gradient
KEPT_RECOMPUTING = 1 << 24  # bytes of the largest block that is kept: memory before time
DECAY_TO = 0.1  # the learning rate ends at this part of its peak
SAMPLE_PROMPT, SAMPLE_TOKENS = 32, 96
WRITTEN = ("metrics.jsonl", "samples.txt", "loss.png")  # in the folder of a run, as it goes


@dataclass
class Progress:
    """How far a run has come; all of it is saved, and plain values only."""

    step: int = 0
    tokens: int = 0
    elapsed: float = 0.0  # seconds of training
    skipped: int = 0
    skipped_in_a_row: int = 0
    recent: list[float] = field(default_factory=list)  # losses of the last steps
    best_val_loss: float | None = None
    evaluations_since_best: int = 0
    threads: int = 0
    processes: int = 1
    ended: str | None = None  # steps, time, loss, patience, interrupted or diverged

    @property
    def mean_loss(self) -> float:
        return sum(self.recent) / max(1, len(self.recent))


@dataclass
class Run:
    """All that a training run works with."""

    settings: Settings
    model: "Model"
    tokenizer: "Tokenizer"
    optimizer: "torch.optim.Optimizer"
    train: "Tokens"
    val: "Tokens"
    progress: Progress
    ranks: Ranks
    loss: "Callable[..., torch.Tensor]"  # the model's, of this rank's part of a batch
    carried: "State | None"  # the state that the next step starts from, with carry_state

    @property
    def folder(self) -> Path:
        return self.settings.run

    @property
    def device(self) -> "torch.device":
        return self.model.backbone.embeddings.weight.device


def open_run(settings: Settings, ranks: Ranks, console: "Console") -> Run:
    """The run that the settings mean, a new one or one to go on with, on every rank."""
    if not settings.resume:
        run = ranks.alone(lambda: start(settings, console))
        if ranks.size == 1:
            return run
        settings.run = ranks.as_first(settings.run)
    return resume(settings, ranks, console)


def start(settings: Settings, console: "Console") -> Run:
    """Make the folder of a new run: tokenizer, tokens on disk, first weights; all or nothing."""
    import torch

    from ysnake import checkpoint, data
    from ysnake.model import Model

    if settings.run is None:
        settings.run = cli.RUNS / f"{settings.preset}-{time.strftime('%Y%m%d-%H%M%S')}"
    if settings.run.exists():
        raise InputError(f"{settings.run}: exists already; --resume goes on with a run")
    if settings.data == (SHIPPED,) and not SHIPPED.is_dir():
        raise InputError("--data: the shipped corpus is not installed here; give files or folders")
    files = data.find_files(settings.data)
    device = cli.pick_device(settings.device)

    if settings.from_ is not None:
        _, tokenizer, model = checkpoint.load_all(settings.from_)
        model.config.check_frame()
        if settings.chunk_size is not None:
            model.use_config(replace(model.config, chunk_size=settings.chunk_size))
        memory.fit(settings, model.config)
    else:
        tokenizer = train_tokenizer(settings, files, console)
        config = _config(settings, tokenizer)
        memory.fit(settings, config)
        torch.manual_seed(settings.seed)
        model = Model(config, settings.init)

    new = settings.run.with_name(f".{settings.run.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    first_run = not new.parent.exists()
    try:
        (new / "data").mkdir(parents=True)
    except OSError as error:
        raise InputError(f"{settings.run}: {error.strerror}") from error
    try:
        counts = _tokenise(settings, files, tokenizer, model.config, new / "data", console)
        if counts.train_tokens <= settings.seq_len:
            raise InputError(
                f"--seq-len: all documents together have {counts.train_tokens} tokens to train on, "
                f"fewer than a window of {settings.seq_len} and the token after it"
            )
        settings_of.write(settings, new)
        run = _assemble(replace(settings, run=new), model, tokenizer, Progress(), Ranks())
        save_last(run)  # before the folder has its name, so that no run is there without one
        checkpoint.sync(new)
        new.rename(settings.run)
    except BaseException as error:
        shutil.rmtree(new)
        if first_run:
            new.parent.rmdir()
        if isinstance(error, OSError):
            raise InputError(f"{settings.run}: {error.strerror}") from error
        raise
    console.print(
        f"[bold]{settings.run}[/]: {counts.train_documents} documents to learn "
        f"({counts.train_words:,} words, {counts.train_tokens:,} tokens), "
        f"{counts.val_documents} held out; {model.n_parameters():,} parameters on {device}"
    )
    return _assemble(settings, model, tokenizer, Progress(), Ranks())


def plan(settings: Settings, console: "Console") -> Any:
    """The table of --plan; the documents are read only if they decide the vocabulary."""
    from ysnake import checkpoint, data

    if settings.resume or settings.from_ is not None:
        source = settings.run / "last" if settings.resume else settings.from_
        config = checkpoint.load_config(checkpoint.resolve(source))
        config = replace(config, chunk_size=settings.chunk_size, output_size=settings.output_size)
    elif settings.vocab_size is not None:
        config = model_config(settings, settings.vocab_size, 0)
    else:
        tokenizer = train_tokenizer(settings, data.find_files(settings.data), console)
        config = _config(settings, tokenizer)
    return memory.table(config, settings)


def _config(settings: Settings, tokenizer: "Tokenizer") -> ModelConfig:
    from ysnake.tokenizer import eot_id

    return model_config(settings, tokenizer.get_vocab_size(), eot_id(tokenizer))


def train_tokenizer(settings: Settings, files: list[Path], console: "Console") -> "Tokenizer":
    """A tokenizer learnt from the documents to train on, of the size asked for."""
    from ysnake import data
    from ysnake import tokenizer as tokenizers

    wanted = settings.vocab_size or PRESETS[settings.preset].max_vocab
    with console.status("learning the vocabulary"):
        pieces = data.split(data.read_documents(files, settings.max_documents))
        texts = (text for text, _, held_out in pieces if not held_out)
        tokenizer = tokenizers.train(settings.tokenizer, texts, wanted)
    size = tokenizer.get_vocab_size()
    if size < wanted and settings.vocab_size is not None:
        raise InputError(f"--vocab-size: {wanted} cannot be met, these documents give {size}")
    if size < wanted:
        console.print(f"vocabulary: {size:,} entries, all that these documents give")
    return tokenizer


def _tokenise(
    settings: Settings,
    files: list[Path],
    tokenizer: "Tokenizer",
    config: ModelConfig,
    folder: Path,
    console: "Console",
) -> Any:
    from rich.progress import Progress as Bar

    from ysnake import data

    limited = settings.max_documents is not None
    total = None if limited else sum(path.stat().st_size for path in files)
    with Bar(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("writing tokens", total=total)
        return data.write_tokens(
            data.read_documents(files, settings.max_documents),
            tokenizer,
            config.bos_id,
            config.eos_id,
            folder,
            lambda characters: bar.advance(task, characters),
        )


def resume(settings: Settings, ranks: Ranks, console: "Console") -> Run:
    """Take up the run in settings.run where its last/ stands; the one before if it is damaged."""
    from ysnake import checkpoint

    folder = settings.run / "last"
    last, saved, model, tokenizer = ranks.together(lambda: _read_last(settings.run))
    try:
        run = _resumed(settings, ranks, last, saved, model, tokenizer, console)
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        if isinstance(error, InputError) or parallel.lost_contact(error):
            raise
        path = last / checkpoint.STATE
        said = str(error).partition("\n")[0]
        raise InputError(f"{path}: not the state of this training run ({said})") from error

    def settle() -> None:
        with cli.writing(settings.run):
            if last != folder:
                checkpoint.put_back(last, folder)
            _forget_metrics_after(run.folder / "metrics.jsonl", run.progress.step)

    if settings.resume:
        ranks.together(lambda: None)  # all have read
        ranks.alone(settle)
        console.print(f"[bold]{run.folder}[/]: goes on after step {run.progress.step}")
    return run


def _read_last(folder: Path) -> tuple[Path, dict[str, Any], "Model", "Tokenizer"]:
    from ysnake import checkpoint

    def read(last: Path) -> tuple[dict[str, Any], "Model", "Tokenizer"]:
        saved = checkpoint.load_training(last)
        return saved, checkpoint.load(last), checkpoint.load_tokenizer(last)

    for name in WRITTEN:
        if (folder / name).is_symlink():
            raise InputError(f"{folder / name}: a link; a run writes into its folder only")
    last, found = checkpoint.newest_good(folder / "last", read)
    return last, *found


def _resumed(
    settings: Settings,
    ranks: Ranks,
    last: Path,
    saved: dict[str, Any],
    model: "Model",
    tokenizer: "Tokenizer",
    console: "Console",
) -> Run:
    """The run that a checkpoint was saved of, as it stood then."""
    from ysnake import checkpoint

    if settings.output_size is not None:
        model = checkpoint.with_factors(model, saved["head"], settings.output_size)
    model.use_config(replace(model.config, chunk_size=settings.chunk_size))
    progress = Progress(**saved["progress"])
    before, now = _workers(progress.processes, progress.threads), _workers(ranks.size)
    if before != now and settings.resume:
        console.print(
            f"warning: started with {before}, goes on with {now}; the weights will differ in the "
            "last bits"
        )
    if progress.ended == "interrupted":
        progress.ended = None
    run = _assemble(settings, model, tokenizer, progress, ranks)
    for side, count in zip(("train", "val"), saved.get("corpus", ()), strict=False):
        if len(getattr(run, side)) != count:
            path = run.folder / "data" / f"{side}.tokens"
            raise InputError(f"{path}: damaged, the run began with {count:,} tokens")
    where = last / checkpoint.OPTIMIZER
    ranks.load_optimizer(run.model, run.optimizer, saved["optimizer"], where)
    if settings.carry_state:
        rows = ranks.rows(settings.batch_size)
        for layer, (conv, ssm) in zip(run.carried, saved["carried"], strict=True):
            layer.conv, layer.ssm = conv[rows].to(run.device), ssm[rows].to(run.device)
    return run


def _workers(processes: int, threads: int | None = None) -> str:
    import torch

    of_each = f"{threads or torch.get_num_threads()} threads"
    return of_each if processes == 1 else f"{processes} processes of {of_each}"


def _forget_metrics_after(path: Path, step: int) -> None:
    """Cut off what a killed run wrote after its last checkpoint; it will be written again."""
    if not path.exists():
        return
    kept = 0
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), 1):
        if not line.endswith(b"\n"):  # torn by a kill or a full disk
            break
        try:
            if json.loads(line)["step"] > step:
                break
        except (ValueError, LookupError, TypeError) as error:
            raise InputError(f"{path}, line {number}: not the metrics of a step") from error
        kept += len(line)
    os.truncate(path, kept)


def _assemble(
    settings: Settings,
    model: "Model",
    tokenizer: "Tokenizer",
    progress: Progress,
    ranks: Ranks,
) -> Run:
    import torch
    from ysnake_kernels.allocator import keep_freed_memory

    from ysnake.data import Tokens

    if settings.recompute:
        keep_freed_memory(KEPT_RECOMPUTING)
    else:
        keep_freed_memory()
    config = model.config
    framing = (tokenizer.get_vocab_size(), config.bos_id, config.eos_id)
    train, val = (
        Tokens.open(settings.run / "data" / f"{side}.tokens", *framing) for side in ("train", "val")
    )
    progress.threads, progress.processes = torch.get_num_threads(), ranks.size
    model.backbone.recompute = settings.recompute
    loss = ranks.spread(model, cli.pick_device(settings.device))
    optimizer = make_optimizer(model, settings.weight_decay)
    run = Run(settings, model, tokenizer, optimizer, train, val, progress, ranks, loss, None)
    _forget_carried(run)
    return run


def _forget_carried(run: Run) -> None:
    if run.settings.carry_state:
        run.carried = run.model.empty_state(len(run.ranks.rows(run.settings.batch_size)))


def make_optimizer(model: "Model", weight_decay: float) -> "torch.optim.Optimizer":
    """AdamW that decays matrices only; A_log, D, dt_bias, norms and biases are vectors."""
    import torch

    groups = [
        {
            "params": [p for p in model.parameters() if (p.ndim >= 2) == matrices],
            "weight_decay": weight_decay if matrices else 0.0,
        }
        for matrices in (True, False)
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=True)


def make_moments(optimizer: "torch.optim.Optimizer") -> None:
    """What AdamW would make in its first step, among the gaps that backward has left."""
    import torch

    for parameter in (p for group in optimizer.param_groups for p in group["params"]):
        if not optimizer.state[parameter]:
            optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }


def save_last(run: Run) -> None:
    """Write last/: the model, and all that resuming needs."""
    from ysnake import checkpoint

    ranks = run.ranks
    shards = run.folder / f".{checkpoint.OPTIMIZER}.new"
    training = {
        "optimizer": ranks.save_optimizer(run.model, run.optimizer, shards),
        "progress": asdict(run.progress),
        "corpus": (len(run.train), len(run.val)),
    }
    if run.carried is not None:
        training["carried"] = [
            (ranks.all_rows(layer.conv), ranks.all_rows(layer.ssm)) for layer in run.carried
        ]
    progress = {k: v for k, v in asdict(run.progress).items() if k != "recent"}
    model = ranks.whole(run.model)

    def write() -> None:
        training["head"] = checkpoint.head_factors(model)
        parts = shards if ranks.sharded and shards.exists() else None
        checkpoint.save(run.folder / "last", model, run.tokenizer, training, progress, parts)

    ranks.alone(write)


def learning_rate(settings: Settings, progress: Progress) -> float:
    """Linear warm-up, then a cosine down to a tenth, over the steps or else over the clock."""
    warm = min(1.0, (progress.step + 1) / max(1, settings.warmup_steps))
    if settings.max_steps is not None:
        done = progress.step / settings.max_steps
    else:
        done = progress.elapsed / (60 * settings.max_minutes)
    cosine = (1 + math.cos(math.pi * min(done, 1.0))) / 2
    return settings.lr * warm * (DECAY_TO + (1 - DECAY_TO) * cosine)


def batch_loss(run: Run, batch: "Batch", state: "State | None" = None) -> "torch.Tensor":
    """Summed loss of this rank's part of a batch, in nats."""
    import torch

    batch = run.ranks.part(batch)
    ids, targets, seq_idx = (
        torch.from_numpy(array).to(run.device)
        for array in (batch.ids, batch.targets, batch.seq_idx)
    )
    if bool((seq_idx == seq_idx[:, :1]).all()):
        seq_idx = None  # one document in each window
    precision = run.settings.precision
    lower = precision == "bfloat16" or (precision == "auto" and run.device.type == "cuda")
    autocast = torch.autocast(run.device.type, torch.bfloat16) if lower else nullcontext()
    with autocast:
        return run.loss(ids, targets, seq_idx, state)


class Stop:
    """Whether Ctrl-C or SIGTERM has asked the run to stop; a second Ctrl-C stops at once."""

    requested = False

    @contextmanager
    def listening(self) -> Iterator["Stop"]:
        def request(number: int, _frame: object) -> None:
            if self.requested and number == signal.SIGINT:
                raise KeyboardInterrupt
            self.requested = True

        signals = (signal.SIGINT, signal.SIGTERM)
        before = [signal.signal(number, request) for number in signals]
        try:
            yield self
        finally:
            for number, handler in zip(signals, before, strict=True):
                signal.signal(number, handler)


def train_step(run: Run, stop: Stop) -> dict[str, float] | None:
    """One step of the optimiser. None if a stop was asked for: then nothing has changed."""
    import torch

    from ysnake import data
    from ysnake.model import LayerState

    settings, progress = run.settings, run.progress
    first = progress.step * settings.accumulate
    cut = (run.train, settings.seq_len, settings.batch_size)
    indices = range(first, first + settings.accumulate)
    if settings.carry_state:
        batches = [data.consecutive_windows(*cut, i) for i in indices]
        state = [LayerState(layer.conv, layer.ssm) for layer in run.carried]
    else:
        batches = [data.training_windows(*cut, i, settings.seed) for i in indices]
        state = None
    n_targets = max(1, sum(batch.n_targets for batch in batches))

    run.optimizer.zero_grad()
    total = torch.zeros((), device=run.device)
    for i, batch in enumerate(batches, 1):
        if run.ranks.any(stop.requested):
            return None
        for layer in state or ():  # lanes whose window begins a document forget
            keep = torch.from_numpy(~run.ranks.part(batch).starts_anew).to(layer.conv)
            layer.conv = layer.conv * keep[:, None, None]
            layer.ssm = layer.ssm * keep[:, None, None, None].to(layer.ssm)
        with run.ranks.exchanging(run.loss, now=i == len(batches)):
            loss = batch_loss(run, batch, state) / n_targets
            (loss * run.ranks.size).backward()  # ranks average, and here is a share of the loss
        total += loss.detach()
    loss = run.ranks.total(total)
    norm = parallel.number(torch.nn.utils.clip_grad_norm_(run.model.parameters(), CLIP))

    lr = learning_rate(settings, progress)
    if math.isfinite(loss) and math.isfinite(norm):
        for group in run.optimizer.param_groups:
            group["lr"] = lr
        run.optimizer.step()
        run.carried = state
        progress.skipped_in_a_row = 0
        progress.recent = [*progress.recent, loss][-MEAN_OVER:]
    else:
        progress.skipped += 1
        progress.skipped_in_a_row += 1
        _forget_carried(run)  # what made the step fail may be in the state
    progress.step += 1
    progress.tokens += settings.accumulate * settings.batch_size * settings.seq_len
    return {"train_loss": loss, "lr": lr, "grad_norm": norm}


def held_out_loss(run: Run) -> float | None:
    """Mean loss on held-out text, nats per token; None if nothing is held out."""
    import torch

    from ysnake import data

    settings = run.settings
    loss, n_targets = torch.zeros((), dtype=torch.float64), 0
    with torch.no_grad():
        for batch in data.held_out_windows(
            run.val, settings.seq_len, settings.batch_size, VAL_TOKENS
        ):
            loss += batch_loss(run, batch).item()
            n_targets += batch.n_targets
    return run.ranks.total(loss) / n_targets if n_targets else None


def sample(run: Run, model: "Model", number: int) -> tuple[str, str]:
    """A prompt from the middle of a training document, and the model's own continuation."""
    from ysnake import data
    from ysnake.generate import Context, Sampling
    from ysnake.tokenizer import decode

    length = min(SAMPLE_PROMPT, max(1, len(run.train) // 8))
    middles = data.middles(run.train, length) or [run.train.ids[1 : 1 + length].tolist()]
    prompt = middles[number % len(middles)]
    context = Context(model, run.tokenizer.get_vocab_size())
    context.feed([model.config.bos_id, *prompt])
    written = list(context.generate(Sampling(temperature=0), SAMPLE_TOKENS))
    model.train()
    return decode(run.tokenizer, prompt), decode(run.tokenizer, written)


def reason_to_end(run: Run) -> str | None:
    """Why the run should end now, if it should."""
    settings, progress = run.settings, run.progress
    if progress.skipped_in_a_row >= GIVE_UP_AFTER:
        return "diverged"
    target = settings.stop_at_loss
    if target is not None and len(progress.recent) == MEAN_OVER and progress.mean_loss <= target:
        return "loss"
    if settings.max_steps is not None and progress.step >= settings.max_steps:
        return "steps"
    if settings.max_minutes is not None and progress.elapsed >= 60 * settings.max_minutes:
        return "time"
    if settings.patience is not None and progress.evaluations_since_best >= settings.patience:
        return "patience"
    return None


def evaluate(run: Run, console: "Console") -> float | None:
    """Held-out loss, best/ if it is the best so far, and a sample of text."""
    from rich.markup import escape

    from ysnake import checkpoint

    progress = run.progress
    loss = held_out_loss(run)
    better = False
    if loss is not None and math.isfinite(loss):
        better = progress.best_val_loss is None or loss < progress.best_val_loss
        progress.evaluations_since_best = 0 if better else progress.evaluations_since_best + 1
        progress.best_val_loss = loss if better else progress.best_val_loss
    model = run.ranks.whole(run.model)

    def write() -> None:
        if better:
            checkpoint.save(run.folder / "best", model, run.tokenizer)
        prompt, written = sample(run, model, progress.step // run.settings.eval_every)
        held_out = "" if loss is None else f", held-out loss {loss:.3f}"
        head = f"step {progress.step}: loss {progress.mean_loss:.3f}{held_out}"
        samples = run.folder / "samples.txt"
        with cli.writing(samples), samples.open("a", encoding="utf-8") as file:
            file.write(f"{head}\n{prompt} >>> {written}\n\n")
        console.print(f"[bold]{head}[/]\n[dim]{escape(prompt)}[/]{escape(written)}\n")

    run.ranks.alone(write)
    return loss


def fit(run: Run, stop: Stop, console: "Console") -> None:
    """Train until there is a reason to end; leaves last/, metrics and picture complete."""
    from ysnake.plot import plot_loss

    settings, progress = run.settings, run.progress
    speeds: deque[float] = deque(maxlen=MEAN_OVER)
    n_tokens = settings.accumulate * settings.batch_size * settings.seq_len
    path = run.folder / "metrics.jsonl" if run.ranks.first else Path(os.devnull)
    make_moments(run.optimizer)
    with (
        cli.writing(path),
        path.open("a", buffering=1) as metrics,
        _bar(run, console) as show,
    ):

        def sync() -> None:
            if run.ranks.first:
                os.fsync(metrics.fileno())

        while progress.ended is None:
            began = time.monotonic()
            line = train_step(run, stop)
            if line is None:
                progress.ended = "interrupted"
                break
            seconds = run.ranks.as_first(time.monotonic() - began)
            speeds.append(n_tokens / seconds)
            progress.elapsed += seconds
            progress.ended = reason_to_end(run)
            line = {"step": progress.step, "tokens": progress.tokens, **line}
            line |= {"tokens_per_s": n_tokens / seconds, "skipped": progress.skipped}
            if progress.step % settings.eval_every == 0 or progress.ended:
                began = time.monotonic()
                line["val_loss"] = evaluate(run, console)
                progress.elapsed += run.ranks.as_first(time.monotonic() - began)
                progress.ended = progress.ended or reason_to_end(run)
            finite = {k: v if v is not None and math.isfinite(v) else None for k, v in line.items()}
            metrics.write(json.dumps(finite) + "\n")
            show(sum(speeds) / len(speeds))
            if "val_loss" in line and run.ranks.first:
                plot_loss(run.folder)
            if progress.step % settings.checkpoint_every == 0 and progress.ended is None:
                sync()
                save_last(run)
        sync()
    save_last(run)
    run.ranks.alone(lambda: plot_loss(run.folder))


@contextmanager
def _bar(run: Run, console: "Console") -> Iterator[Any]:
    """A progress bar with loss, speed, memory and time left; yields the function that moves it."""
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    settings, progress = run.settings, run.progress
    columns = ("loss {task.fields[loss]:.3f}", "{task.fields[speed]:,.0f} tokens/s")
    columns = [TextColumn(text) for text in (*columns, "{task.fields[memory]}")]
    bar = Bar(
        TextColumn("step {task.fields[step]}"),
        BarColumn(),
        *columns,
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal or console.quiet,
    )
    task = bar.add_task("", total=1.0, step=progress.step, loss=0.0, speed=0.0, memory="")

    def show(speed: float) -> None:
        done = [progress.step / settings.max_steps] if settings.max_steps else []
        if settings.max_minutes:
            done.append(progress.elapsed / (60 * settings.max_minutes))
        shown = {"step": progress.step, "loss": progress.mean_loss, "speed": speed}
        bar.update(task, completed=max(done), memory=peak_memory(run.device.type), **shown)

    with bar:
        yield show


def peak_memory(device: str) -> str:
    """The most memory used so far, of the GPU or of this process; empty where it is not known."""
    if device == "cuda":
        import torch

        return f"{torch.cuda.max_memory_allocated() / 1e9:.2f} GB"
    try:
        import resource
        import sys
    except ImportError:  # not on Windows
        return ""
    unit = 1 if sys.platform == "darwin" else 1024
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9:.2f} GB"


ENDINGS = {
    "steps": "all {step} steps are done",
    "time": "the time is up",
    "loss": "the training loss is down to {loss:.3f}",
    "patience": "the held-out loss has stopped getting better",
    "interrupted": "interrupted; --resume goes on from here",
    "diverged": "loss or gradient were not finite ten times in a row, so the run was stopped; "
    "a lower --lr or a longer --warmup-steps helps most often",
}


def main(argv: list[str]) -> int:
    """Train as the command line says; returns the exit code."""
    with parallel.heard_once():
        settings = settings_of.parse(argv)
        parallel.check(settings)
        if settings.plan:
            console = cli.console()
            console.print(plan(settings, console))
            return cli.DONE
        cli.use_threads(settings.threads)
    with parallel.joined(settings) as ranks:
        return _train(settings, ranks)


def _train(settings: Settings, ranks: Ranks) -> int:
    console = cli.console()
    console.quiet = not ranks.first
    stop = Stop()
    run = open_run(settings, ranks, console)
    with stop.listening():
        if settings.resume:
            run.progress.ended = run.progress.ended and reason_to_end(run)
        fit(run, stop, console)
    progress = run.progress
    ending = ENDINGS[progress.ended].format(step=progress.step, loss=progress.mean_loss)
    console.print(
        f"[bold]{run.folder}[/]: {ending} "
        f"({progress.elapsed / 60:.1f} minutes of training, {progress.skipped} steps skipped)\n"
        f"picture: {run.folder / 'loss.png'}\n"
        f'next: python -m ysnake.run {run.folder} --prompt "..."'
    )
    return {"interrupted": cli.INTERRUPTED, "diverged": cli.FAILED}.get(progress.ended, cli.DONE)


if __name__ == "__main__":
    cli.run(main)
