"""Many completions at once: one thread owns the model and writes one token for each in every step.

Requests join and leave the batch between steps. To join, a state of constant size is copied into a
row of the batch. To leave, the last row is copied over the row. The state after a prompt is kept
for a while. A later prompt of the same owner that begins with that prompt continues from the state.
The thread also reads the texts of embeddings, in turns with the prompts.
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

from ysnake.inference.decoding import Decoder
from ysnake.inference.embedding import MeanState
from ysnake.inference.generate import PROMPT_STEP, Context, draw, random_generator
from ysnake.inference.sampling import Sampling
from ysnake.inference.text_stream import TextStream, cut
from ysnake.model.network import LayerState


@dataclass(eq=False)
class Job:
    """One completion: what was requested, and its progress, which the thread updates."""

    ids: tuple[int, ...]
    sampling: Sampling
    max_tokens: int
    stops: tuple[str, ...] = ()
    owner: str = ""  # only prompts of the same owner are continued
    end_ids: frozenset[int] = frozenset()  # tokens that end it, besides the model's own
    gone: bool = False  # nobody waits for it any more; set from outside the thread
    context: Context | None = None  # while the prompt is read
    n_read: int = 0  # tokens of the prompt that are read, including remembered ones
    n_remembered: int = 0  # tokens of the prompt that did not have to be read again
    n_written: int = 0
    embeds: bool = False  # for an embedding: the text is read, and nothing is written
    pooled: MeanState | None = None  # of the text that is read for an embedding
    reason: str | None = None  # why it ended: stop, length, or error
    error: str | None = None
    started: int = field(default_factory=time.perf_counter_ns)
    read: int = 0  # when the prompt was read
    ended: int = 0

    def __post_init__(self) -> None:
        self.generator = random_generator(self.sampling.seed)
        self.written = TextStream(after=self.ids[-1] if self.ids else None)
        self.waiting = ""  # text that may begin a stop text


News = list[tuple[Job, str, bool]]  # a job, its new text, and whether the job has ended


class BatchWorker:
    """The thread that generates for all requests, and its rows.

    `submit` and `close` may be called from any other thread.
    """

    def __init__(
        self,
        decoder: Decoder,
        tokenizer: Tokenizer,
        deliver: Callable[[News], None],
        rows: int = 32,
        remembered: int = 32,
    ):
        """Start the thread.

        Args:
            decoder: the model.
            tokenizer: of the model.
            deliver: called in the thread after each step, with the new texts.
            rows: completions that are written at the same time.
            remembered: prompts whose state is kept.
        """
        self.decoder, self.tokenizer, self.deliver = decoder, tokenizer, deliver
        model = self.model = decoder.model
        self.n_tokens, self.rows, self.remembered = tokenizer.get_vocab_size(), rows, remembered
        weight = model.backbone.embeddings.weight
        self.state = model.empty_state(rows)
        self.logits = weight.new_zeros(rows, self.n_tokens, dtype=torch.float32)
        self.seen = weight.new_zeros(rows, model.config.vocab_size, dtype=torch.bool)
        self.writing: list[Job] = []  # the job of each row in use
        self.reading: deque[Job] = deque()
        # by owner and tokens, so that no client profits from what another one has sent
        self.memory: OrderedDict[tuple[str, tuple[int, ...]], Context] = OrderedDict()
        self.inbox: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self._work, name="batch", daemon=True)
        self.thread.start()

    def submit(self, job: Job) -> None:
        """Add a job. It ends by itself, or soon after `gone` is set."""
        self.inbox.put(job)

    def close(self) -> None:
        """End every job with an error, then end the thread."""
        self.inbox.put(None)

    def _work(self) -> None:
        with torch.no_grad():
            while self._receive():
                news: News = []
                try:
                    self._read(news)
                    self._write(news)
                except Exception as error:  # whatever it was, the clients must get an answer
                    logging.getLogger(__name__).exception("a step of the batch failed")
                    news += self._abandon(f"{type(error).__name__}: {error}")
                self.deliver(news)
            self.deliver(self._abandon("the server is stopping"))

    def _receive(self) -> bool:
        """Take new jobs from the inbox; wait for one if there is nothing to do. False: the end."""
        while True:
            try:
                job = self.inbox.get(block=not self.reading and not self.writing)
            except queue.Empty:
                return True
            if job is None:
                return False
            self.reading.append(job)

    def _read(self, news: News) -> None:
        """Read about PROMPT_STEP tokens of waiting prompts, so that writing continues soon."""
        self.reading = deque(job for job in self.reading if not job.gone)
        left = PROMPT_STEP
        while left > 0 and self.reading and len(self.writing) < self.rows:
            job = self.reading[0]
            reader: Context | MeanState
            if job.embeds:
                reader = job.pooled = job.pooled or MeanState(self.model)
            else:
                reader = job.context = job.context or self._remembered(job)
            ids = list(job.ids[job.n_read : job.n_read + PROMPT_STEP])
            reader.feed(ids)
            job.n_read += len(ids)
            left -= len(ids)
            if job.n_read < len(job.ids):
                self.reading.rotate(-1)
                continue
            if isinstance(reader, Context):
                self._join(job, reader)
            else:
                job.reason = "stop"
                job.read = job.ended = time.perf_counter_ns()
                news.append((job, "", True))
            self.reading.popleft()

    def _remembered(self, job: Job) -> Context:
        """A context to read the prompt with, from its longest remembered beginning."""
        known = [
            (owner, ids)
            for owner, ids in self.memory
            if owner == job.owner and job.ids[: len(ids)] == ids
        ]
        if known:
            longest = max(known, key=lambda key: len(key[1]))
            self.memory.move_to_end(longest)
            job.n_read = job.n_remembered = len(longest[1])
            return self.memory[longest].copy()
        return Context(self.decoder, self.n_tokens)

    def _join(self, job: Job, context: Context) -> None:
        row, job.context = len(self.writing), None
        for ours, theirs in zip(self.state, context.state, strict=True):
            ours.conv[row], ours.ssm[row] = theirs.conv[0], theirs.ssm[0]
        self.logits[row] = context.next_logits()[: self.n_tokens]
        self.seen[row] = context.seen
        job.read = time.perf_counter_ns()
        self.memory[job.owner, job.ids] = context
        self.memory.move_to_end((job.owner, job.ids))
        while len(self.memory) > self.remembered:
            self.memory.popitem(last=False)
        self.writing.append(job)

    def _leave(self, row: int) -> None:
        last = len(self.writing) - 1
        for tensor in (t for s in self.state for t in (s.conv, s.ssm)):
            tensor[row] = tensor[last]
        self.logits[row], self.seen[row] = self.logits[last], self.seen[last]
        self.writing[row] = self.writing[last]
        self.writing.pop()

    def _write(self, news: News) -> None:
        """Write one token for every row. Rows that are done leave."""
        for row in reversed(range(len(self.writing))):
            if self.writing[row].gone:
                self._leave(row)
        n = len(self.writing)
        if n == 0:
            return
        samplings = [job.sampling for job in self.writing]
        generators = [job.generator for job in self.writing]
        tokens = draw(self.logits[:n], self.seen[:n], samplings, generators)
        for row in reversed(range(n)):  # later rows are done already, so they may move
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
        """The new text that can be shown after a token. Sets the reason if the job has ended."""
        found, text = False, ""
        if token in self.model.config.end_ids or token in job.end_ids:
            job.reason = "stop"
        else:
            job.n_written += 1
            new = job.written.step(self.tokenizer, token)
            text, job.waiting, found = cut(job.waiting + new, job.stops)
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
