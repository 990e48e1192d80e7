"""Many completions in one batch: each is as if it were alone."""

import time

import torch

from ysnake.checkpoints import checkpoint
from ysnake.inference.batch import BatchWorker, Job
from ysnake.inference.decoding import Decoder
from ysnake.inference.generate import Context, choose, draw, random_generator
from ysnake.inference.sampling import Sampling
from ysnake.text.tokenizer import decode


def test_each_row_is_drawn_in_its_own_way():
    """Rows with flat and with peaked logits: to draw from flat ones, more tokens must be sorted."""
    generator = torch.Generator().manual_seed(0)
    logits = (
        torch.randn(6, 1000, generator=generator) * torch.tensor([0.1, 9, 0.1, 0.1, 3, 0])[:, None]
    )
    seen = torch.rand(6, 1000, generator=generator) < 0.3
    ways = [{}, {}, {"top_k": 400}, {"temperature": 0}, {"repetition_penalty": 1.5}, {"top_p": 1}]
    samplings = [Sampling(**way) for way in ways]
    for seed in range(20):
        together = draw(logits, seen, samplings, [random_generator(seed + i) for i in range(6)])
        for i, (token, sampling) in enumerate(zip(together, samplings, strict=True)):
            assert token == choose(logits[i], seen[i], sampling, random_generator(seed + i))


def finished(tokenizer, m, jobs, **settings):
    """Run jobs, each handed in when the one before has written two pieces; gives their texts."""
    texts = {job: "" for job in jobs}
    late, ended = list(jobs[1:]), []

    def deliver(news):
        for job, text, end in news:
            texts[job] += text
            if end:
                ended.append(job)
            if late and job.n_written >= 2:
                worker.submit(late.pop(0))
        if len(ended) == len(jobs):
            worker.close()

    worker = BatchWorker(Decoder(m), tokenizer, deliver, **settings)
    worker.submit(jobs[0])
    worker.thread.join(60)
    assert len(ended) == len(jobs)
    return [texts[job] for job in jobs]


def test_rows_that_come_and_go_do_not_touch_each_other(served, monkeypatch):
    from ysnake.inference import batch, generate

    monkeypatch.setattr(batch, "PROMPT_STEP", 7)  # prompts are read in turns
    monkeypatch.setattr(generate, "PROMPT_STEP", 7)
    tokenizer, m = checkpoint.load_tokenizer(served), checkpoint.load(served)
    asked = [
        ((0, *range(5, 5 + 3 * i)), Sampling(seed=i, repetition_penalty=1 + i % 2), 4 + 5 * i % 17)
        for i in range(9)
    ]
    texts = finished(tokenizer, m, [Job(*a) for a in asked], rows=3)
    for text, (ids, sampling, n) in zip(texts, asked, strict=True):
        context = Context(m, tokenizer.get_vocab_size())
        context.feed(list(ids))
        assert decode(tokenizer, list(context.generate(sampling, n))).startswith(text.rstrip("�"))
        assert text


def test_a_prompt_that_begins_with_an_earlier_one_reads_only_the_rest(served):
    tokenizer, m = checkpoint.load_tokenizer(served), checkpoint.load(served)
    prompts = [(0, 5, 6), (0, 5, 6, 7, 8), (0, 5, 6, 7, 8), (0, 9), (0, 5, 6, 7)]

    def jobs():
        return [Job(ids, Sampling(seed=1), 6) for ids in prompts]

    remembering = jobs()
    texts = finished(tokenizer, m, remembering, remembered=2)
    assert [job.n_remembered for job in remembering] == [0, 3, 5, 0, 0]  # the fourth pushed it out
    assert texts == finished(tokenizer, m, jobs(), remembered=0)


def test_a_prompt_of_another_owner_is_not_read_on_from(served):
    tokenizer, m = checkpoint.load_tokenizer(served), checkpoint.load(served)
    jobs = [Job((0, 5, 6, 7), Sampling(seed=1), 3, owner=owner) for owner in "abab"]
    texts = finished(tokenizer, m, jobs)
    assert [job.n_remembered for job in jobs] == [0, 0, 4, 4]
    assert len(set(texts)) == 1


def test_jobs_of_clients_that_left_are_forgotten_while_another_writes(served):
    tokenizer, m = checkpoint.load_tokenizer(served), checkpoint.load(served)
    worker = BatchWorker(Decoder(m), tokenizer, lambda news: None, rows=1)
    worker.submit(Job((0, 5), Sampling(), 1_000_000))
    left = [Job((0, 6), Sampling(), 4) for _ in range(20)]
    for job in left:
        worker.submit(job)
        job.gone = True
    end = time.monotonic() + 60
    while (worker.reading or not worker.inbox.empty()) and time.monotonic() < end:
        time.sleep(0.01)
    assert worker.writing
    assert not worker.reading
    worker.close()
    worker.thread.join(60)


def test_an_error_in_the_model_ends_requests_not_the_batch(served, caplog):
    tokenizer, m = checkpoint.load_tokenizer(served), checkpoint.load(served)
    bad, good = Job((0, 100_000), Sampling(), 4), Job((0, 5), Sampling(), 4)
    ended = []

    def deliver(news):
        ended.extend(job for job, _, end in news if end)

    worker = BatchWorker(Decoder(m), tokenizer, deliver, rows=2)
    for job in (bad, good):
        worker.submit(job)
        end = time.monotonic() + 60
        while job not in ended:
            assert time.monotonic() < end
            time.sleep(0.01)
    worker.close()
    worker.thread.join(60)
    assert (bad.reason, good.error) == ("error", None)
    assert "IndexError" in caplog.text
