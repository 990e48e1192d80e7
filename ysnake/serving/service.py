"""The served model, and the requests in progress."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tokenizers import Tokenizer

from ysnake.checkpoints import checkpoint
from ysnake.inference.batch import BatchWorker, Job, News
from ysnake.inference.decoding import Decoder
from ysnake.inference.model_options import make_decoder
from ysnake.inference.sampling import Sampling
from ysnake.serving.fields import Body, Refused, take
from ysnake.shared.errors import InputError
from ysnake.text import chat_template
from ysnake.text.chat_template import ChatTemplate

if TYPE_CHECKING:
    from ysnake.serving.options import Options

MOST_LARGE = 64  # large requests that are read at the same time
SHORT = 4096  # bytes that the event loop itself tokenises, in a few milliseconds


@dataclass
class Service:
    """The model, its worker, and a queue of text for each request."""

    options: "Options"
    name: str
    decoder: Decoder
    n_parameters: int
    size: int  # of the weights, in bytes
    tokenizer: Tokenizer
    modified: datetime
    digest: str
    template: ChatTemplate | None  # None: a chat is a transcript
    longest: int  # bytes that a token stands for at most
    worker: BatchWorker | None = None  # while the application runs
    queues: dict[Job, asyncio.Queue] = field(default_factory=dict)
    n_large: int = 0

    def start(self) -> BatchWorker:
        """Start the worker. It delivers its texts to the running event loop."""
        loop = asyncio.get_running_loop()

        def deliver(news: News) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(self.hand_out, news)

        o = self.options
        self.worker = BatchWorker(self.decoder, self.tokenizer, deliver, o.parallel, o.remember)
        return self.worker

    def stop(self) -> None:
        """End every request with an error."""
        if self.worker is not None:
            self.worker.close()

    def hand_out(self, news: News) -> None:
        """Put each new text into the queue of its request. None ends the queue."""
        for job, text, ended in news:
            if job in self.queues:
                self.queues[job].put_nowait(text)
                if ended:
                    self.queues[job].put_nowait(None)

    def submit(self, job: Job) -> None:
        """Start a job. It occupies a place until `release`."""
        if len(self.queues) >= self.options.parallel + self.options.waiting:
            raise Refused("server busy: too many requests are waiting, try again", 429)
        assert self.worker is not None  # requests come after `start`
        self.queues[job] = asyncio.Queue()
        self.worker.submit(job)

    def release(self, job: Job) -> None:
        """Free the place of a job that has ended or whose client is gone."""
        job.gone = True
        del self.queues[job]

    async def text(self, job: Job) -> AsyncIterator[str]:
        """The text of a job while it is written. Yields all new text at once."""
        queue, ended = self.queues[job], False
        while not ended:
            texts = [await queue.get()]
            while not queue.empty():
                texts.append(queue.get_nowait())
            ended = texts[-1] is None
            if text := "".join(texts[:-1] if ended else texts):
                yield text

    async def embedding(self, ids: tuple[int, ...]) -> torch.Tensor:
        """The mean (d_model,) of the last hidden states of these tokens, scaled to length 1."""
        job = Job(ids, Sampling(), 0, embeds=True)
        self.submit(job)
        try:
            async for _ in self.text(job):
                pass
        finally:
            self.release(job)
        if job.error or job.pooled is None:
            raise Refused(job.error or "no embedding", 500)
        return job.pooled.vector()

    async def prompt_ids(self, text: str) -> tuple[int, ...]:
        """The token that begins a document, and the tokens of a prompt.

        A text with too many bytes is refused before it is split into tokens.
        """
        bos = self.decoder.model.config.bos_id
        return await self.piece_ids([text] if bos is None else [bos, text])

    async def piece_ids(self, pieces: list[str | int]) -> tuple[int, ...]:
        """The tokens of a prompt in pieces: texts, and ids of special tokens."""
        most, bos = self.options.max_prompt, self.decoder.model.config.bos_id
        # half of a surrogate pair becomes "?"
        texts = [p.encode("utf-8", "replace").decode() for p in pieces if isinstance(p, str)]
        expected = f"The text is too long: expected at most {most} tokens"
        code = "context_length_exceeded"
        if (size := sum(len(text.encode()) for text in texts)) > most * self.longest:
            raise Refused(f"{expected}, got {size} bytes, which make more", code=code)

        def encode() -> list:
            # unlike the other encoding functions, this one releases the interpreter lock
            return self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)

        encoded = iter(encode() if size <= SHORT else await asyncio.to_thread(encode))
        ids = [
            token
            for piece in pieces
            for token in (next(encoded).ids if isinstance(piece, str) else [piece])
        ]
        if (n := len(ids) - (ids[:1] == [bos])) > most:
            raise Refused(f"{expected}, got {n}", code=code)
        if not ids:
            raise Refused("expected text, as this model has no token that begins a document")
        return tuple(ids)

    @contextmanager
    def large_request(self) -> Iterator[None]:
        """Count a large request while it is read, and refuse it if there are too many."""
        if self.n_large >= MOST_LARGE:
            raise Refused("server busy: too many large requests at once, try again", 429)
        self.n_large += 1
        try:
            yield
        finally:
            self.n_large -= 1

    def owner(self, client: str) -> str:
        """Who shares remembered prompts with a client: only the client itself, or everybody."""
        return "" if self.options.share_prompts else client

    def check_name(self, body: Body) -> str:
        """The name of the model that a request asks for. Another model's is refused."""
        asked = take(body, "model", str) or take(body, "name", str)
        if not asked:
            raise Refused("model: expected the name of a model")
        if asked.removesuffix(":latest") != self.name:
            raise Refused(f"model '{asked}' not found, only '{self.name}'", 404, "model_not_found")
        return asked


def load(options: "Options") -> Service:
    """Load the model, and what the APIs say about it."""
    folder, tokenizer, model = options.model.read()
    template = None if options.plain_chat else load_template(folder, tokenizer)
    digest = sha256()
    for weight in model.parameters():
        digest.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    n_parameters = model.n_parameters()  # before the decoder lays out other weights
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    decoder = make_decoder(model, options.model.weights, not options.model.no_compile)
    return Service(
        options,
        name=(options.name or checkpoint.name_of(folder)).removesuffix(":latest"),
        decoder=decoder,
        n_parameters=n_parameters,
        size=size,
        tokenizer=tokenizer,
        modified=datetime.fromtimestamp(folder.stat().st_mtime, timezone.utc),
        digest=digest.hexdigest(),
        template=template,
        longest=max((len(token.encode()) for token in tokenizer.get_vocab()), default=1),
    )


def load_template(folder: Path, tokenizer: Tokenizer) -> ChatTemplate | None:
    """The chat template of a checkpoint. An error says how to start without it."""
    try:
        return chat_template.load(folder, tokenizer)
    except InputError as error:
        raise InputError(f"{error}; --plain-chat ignores the template") from error
