"""Many completions at once: one thread owns the model and writes a token for each in every step.

Requests come and go between steps. Joining is copying a state of constant size into a row of the
batch, leaving is copying the last row over it. What the model remembers at the end of a prompt is
kept for a while, so that a later prompt of the same owner that begins alike is read on from there.
"""

import logging
import queue
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from ysnake.inference.decoding import Decoder
from ysnake.inference.generate import PIECE, Context, draw, luck
from ysnake.inference.sampling import Sampling
from ysnake.inference.text_stream import cut
from ysnake.model.network import LayerState


@dataclass(eq=False)
class Job:
    """One completion: what was asked for and, from the thread, how far it is."""

    ids: tuple[int, ...]
    sampling: Sampling
    max_tokens: int
    stops: tuple[str, ...] = ()
    owner: str = ""  # whose prompts it may read on from
    gone: bool = False  # nobody waits for it any more; set from outside
    context: Context | None = None  # while the prompt is read
    n_read: int = 0  # tokens of the prompt, those remembered included
    n_remembered: int = 0
    n_written: int = 0
    reason: str | None = None  # why it ended: stop, length, or error
    error: str | None = None
    started: int = field(default_factory=time.perf_counter_ns)
    read: int = 0  # when the prompt was read
    ended: int = 0

    def __post_init__(self) -> None:
        self.luck = luck(self.sampling.seed)
        self.decoder = DecodeStream(skip_special_tokens=True)
        self.waiting = ""  # text that may begin a stop text


News = list[tuple[Job, str, bool]]  # text that was written, and whether it is the job's last


class Batch:
    """The thread and its rows. `submit` and `close` may be called from any other thread."""

    def __init__(
        self,
        decoder: Decoder,
        tokenizer: Tokenizer,
        deliver: Callable[[News], None],
        rows: int = 32,
        remembered: int = 32,
    ):
        """`deliver` is called in the thread, once a step; `remembered`: prompts kept at most."""
        self.decoder, self.tokenizer, self.deliver = decoder, tokenizer, deliver
        model = self.model = decoder.model
        self.n_tokens, self.rows, self.remembered = tokenizer.get_vocab_size(), rows, remembered
        weight = model.backbone.embeddings.weight
        self.state = model.empty_state(rows)
        self.logits = weight.new_zeros(rows, self.n_tokens, dtype=torch.float32)
        self.seen = weight.new_zeros(rows, model.config.vocab_size, dtype=torch.bool)
        self.writing: list[Job] = []  # the job of each row in use
        self.reading: deque[Job] = deque()
        # by owner and tokens: what a client has sent is of no use to another
        self.memory: OrderedDict[tuple[str, tuple[int, ...]], Context] = OrderedDict()
        self.inbox: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self._work, name="batch", daemon=True)
        self.thread.start()

    def submit(self, job: Job) -> None:
        """Take a job in; it ends by itself, or soon after `gone` is set."""
        self.inbox.put(job)

    def close(self) -> None:
        """End every job with an error, and the thread."""
        self.inbox.put(None)

    def _work(self) -> None:
        with torch.no_grad():
            while self._receive():
                news: News = []
                try:
                    self._read()
                    self._write(news)
                except Exception as error:  # whatever it was, those who wait must hear of it
                    logging.getLogger(__name__).exception("a step of the batch failed")
                    news += self._abandon(f"{type(error).__name__}: {error}")
                self.deliver(news)
            self.deliver(self._abandon("the server is stopping"))

    def _receive(self) -> bool:
        """Take what came in, or wait for it where there is nothing to do; False is the end."""
        while True:
            try:
                job = self.inbox.get(block=not self.reading and not self.writing)
            except queue.Empty:
                return True
            if job is None:
                return False
            self.reading.append(job)

    def _read(self) -> None:
        """Read some of the prompts that wait, about a piece in all, so that nobody waits long."""
        left = PIECE
        while left > 0 and self.reading and len(self.writing) < self.rows:
            job = self.reading[0]
            if job.gone:
                self.reading.popleft()
                continue
            if job.context is None:
                self._remember(job)
            piece = list(job.ids[job.n_read : job.n_read + PIECE])
            job.context.feed(piece)
            job.n_read += len(piece)
            left -= len(piece)
            if job.n_read < len(job.ids):
                self.reading.rotate(-1)
            else:
                self.reading.popleft()
                self._join(job)

    def _remember(self, job: Job) -> None:
        """Begin from the longest beginning of the prompt that is still known."""
        known = [
            (owner, ids)
            for owner, ids in self.memory
            if owner == job.owner and job.ids[: len(ids)] == ids
        ]
        if known:
            longest = max(known, key=lambda key: len(key[1]))
            self.memory.move_to_end(longest)
            job.context = self.memory[longest].copy()
            job.n_read = job.n_remembered = len(longest[1])
        else:
            job.context = Context(self.decoder, self.n_tokens)

    def _join(self, job: Job) -> None:
        row, context, job.context = len(self.writing), job.context, None
        for ours, theirs in zip(self.state, context.state, strict=True):
            ours.conv[row], ours.ssm[row] = theirs.conv[0], theirs.ssm[0]
        self.logits[row] = context.logits[: self.n_tokens]
        self.seen[row] = context.seen
        self.writing.append(job)
        job.read = time.perf_counter_ns()
        self.memory[job.owner, job.ids] = context
        self.memory.move_to_end((job.owner, job.ids))
        while len(self.memory) > self.remembered:
            self.memory.popitem(last=False)

    def _leave(self, row: int) -> None:
        last = len(self.writing) - 1
        for tensor in (t for s in self.state for t in (s.conv, s.ssm)):
            tensor[row] = tensor[last]
        self.logits[row], self.seen[row] = self.logits[last], self.seen[last]
        self.writing[row] = self.writing[last]
        self.writing.pop()

    def _write(self, news: News) -> None:
        """Write one token for every row; rows that are done leave."""
        for row in reversed(range(len(self.writing))):
            if self.writing[row].gone:
                self._leave(row)
        n = len(self.writing)
        if n == 0:
            return
        samplings = [job.sampling for job in self.writing]
        generators = [job.luck for job in self.writing]
        tokens = draw(self.logits[:n], self.seen[:n], samplings, generators)
        for row in reversed(range(n)):  # the rows behind have had their turn and may move
            job = self.writing[row]
            text = self._take(job, tokens[row])
            ended = job.reason is not None
            if ended:
                self._leave(row)
                tokens[row] = tokens[-1]
                tokens.pop()
            if text or ended:
                news.append((job, text, ended))
        n = len(self.writing)
        if n == 0:
            return
        ids = torch.tensor(tokens, device=self.logits.device)
        state = [LayerState(layer.conv[:n], layer.ssm[:n]) for layer in self.state]
        logits, _ = self.decoder.step(ids, state)
        self.logits[:n] = logits[:, : self.n_tokens]
        self.seen[torch.arange(n, device=ids.device), ids] = True

    def _take(self, job: Job, token: int) -> str:
        """The text that a token lets out; where it is the last, the reason is set."""
        found, text = False, ""
        if token == self.model.config.eos_id:
            job.reason = "stop"
        else:
            job.n_written += 1
            piece = job.decoder.step(self.tokenizer, token) or ""
            text, job.waiting, found = cut(job.waiting + piece, job.stops)
            if found:
                job.reason = "stop"
            elif job.n_written == job.max_tokens:
                job.reason = "length"
        if job.reason is not None:
            job.ended = time.perf_counter_ns()
            text += job.waiting
        return text

    def _abandon(self, why: str) -> News:
        jobs = [*self.writing, *self.reading]
        self.writing.clear()
        self.reading.clear()
        for job in jobs:
            job.reason, job.error = "error", why
        return [(job, "", True) for job in jobs]
