"""OpenAI's API: the shapes of its replies over plain HTTP, and the `openai` client."""

import asyncio
import base64
import json
from dataclasses import replace
from struct import unpack

import httpx
import pytest
import torch
from running_server import NAME, options

from ysnake.checkpoints import checkpoint
from ysnake.inference.model_options import ModelOptions
from ysnake.serve import Options
from ysnake.serving import chat
from ysnake.serving.fields import Refused
from ysnake.serving.openai_api import completion
from ysnake.serving.service import load
from ysnake.text.tokenizer import encode

USER = {"role": "user", "content": "The boa"}
TRANSCRIPT = "User: The boa\nAssistant:"


@pytest.fixture
def post(address):
    def post(path, **body):
        return httpx.post(f"{address}/v1/{path}", json={"model": NAME, **body}, timeout=60)

    return post


def events(answer):
    """The objects of a stream."""
    lines = answer.text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]


def test_completions(post, client, address):
    whole = post("completions", prompt="The python", seed=3, max_tokens=12).json()
    (choice,) = whole["choices"]
    assert choice["text"] == client.generate(NAME, "The python", options=options()).response
    assert choice["finish_reason"] == "length"
    assert whole["usage"]["completion_tokens"] == 12
    more = {"stream": True, "stream_options": {"include_usage": True}}
    answer = post("completions", prompt=["The python"], seed=3, max_tokens=12, **more)
    *parts, usage = events(answer)
    assert "".join(part["choices"][0]["text"] for part in parts) == choice["text"]
    assert usage["usage"]["completion_tokens"] == 12
    assert "prompt_tokens_details" not in usage["usage"]  # it would tell what others have sent
    models = httpx.get(f"{address}/v1/models").json()
    assert [m["id"] for m in models["data"]] == [NAME]
    assert httpx.get(f"{address}/v1/models/{NAME}").json()["object"] == "model"


def test_a_stop_text_ends_a_completion(post, client):
    full = client.generate(NAME, "The", options=options(num_predict=60)).response
    stop = full[20:23]
    answer = post("completions", prompt="The", seed=3, max_tokens=60, stop=stop).json()
    (choice,) = answer["choices"]
    assert choice["text"] == full[: full.index(stop)]
    assert choice["finish_reason"] == "stop"


def test_chat_completions(post, client):
    known = client.generate(NAME, TRANSCRIPT, options=options(stop=chat.STOP))
    expected = known.response.lstrip()
    whole = post("chat/completions", messages=[USER], seed=3, max_completion_tokens=12).json()
    assert whole["object"] == "chat.completion"
    (choice,) = whole["choices"]
    assert choice["message"] == {"role": "assistant", "content": expected, "refusal": None}
    assert choice["finish_reason"] == known.done_reason
    parts = [{"type": "text", "text": "The "}, {"type": "text", "text": "boa"}]
    more = {"stream": True, "stream_options": {"include_usage": True}, "max_tokens": 12}
    answer = post("chat/completions", messages=[USER | {"content": parts}], seed=3, **more)
    *streamed, usage = events(answer)
    assert {part["object"] for part in [*streamed, usage]} == {"chat.completion.chunk"}
    deltas = [part["choices"][0]["delta"] for part in streamed]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert "".join(delta.get("content", "") for delta in deltas) == expected
    assert [part["choices"][0]["finish_reason"] for part in streamed][-2:] == [
        None,
        known.done_reason,
    ]
    assert usage["usage"]["completion_tokens"] == known.eval_count
    assert usage["choices"] == []


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "at least one message"),
        ([{"role": "tool", "content": "x"}], r"messages\[0\].role: expected one of system"),
        ([USER, {"role": "user", "content": 1}], r"messages\[1\]: content: expected a string"),
        ([USER | {"content": [{"type": "image_url"}]}], "expected parts of type text"),
        ([USER | {"mood": "good"}], r'messages\[0\]: this server does not know "mood"'),
    ],
)
def test_messages_that_cannot_be_read(post, messages, reason):
    answer = post("chat/completions", messages=messages)
    assert answer.status_code == 400
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(answer.json()["error"]["message"])


def test_all_unknown_options_are_named(post):
    for path, body in {
        "completions": {"prompt": "x"},
        "chat/completions": {"messages": [USER]},
        "embeddings": {"input": "x"},
    }.items():
        answer = post(path, **body, no_such_field=1, another="x")
        assert answer.status_code == 400
        message = answer.json()["error"]["message"]
        assert message == 'this server does not know "another", "no_such_field"'


def test_embeddings_are_the_mean_of_the_last_hidden_states(post, client, served):
    texts = ["The boa", "sleeps under a stone. " * 90]  # the second one is read in pieces
    answer = post("embeddings", input=texts).json()
    vectors = [data["embedding"] for data in answer["data"]]
    model, tokenizer = checkpoint.load(served), checkpoint.load_tokenizer(served)
    for text, vector in zip(texts, vectors, strict=True):
        ids = torch.tensor([[0, *encode(tokenizer, text)]])
        with torch.no_grad():
            mean = model.backbone(ids, None, None)[0].mean(0)
        torch.testing.assert_close(torch.tensor(vector), mean / mean.norm(), rtol=1e-4, atol=1e-5)
    assert answer["usage"]["prompt_tokens"] == sum(2 - 1 + len(encode(tokenizer, t)) for t in texts)
    assert client.embed(NAME, texts).embeddings == vectors
    packed = post("embeddings", input=texts[0], encoding_format="base64").json()["data"][0]
    packed = unpack(f"<{len(vectors[0])}f", base64.b64decode(packed["embedding"]))
    assert list(packed) == vectors[0]
    for bad in ([], [1, 2], None, {"a": 1}):
        assert post("embeddings", input=bad).status_code == 400


def test_a_model_without_a_first_token_needs_text(served):
    service = load(Options(ModelOptions(served, threads=1)))
    model = service.decoder.model
    model.use_config(replace(model.config, bos_id=None))
    assert len(asyncio.run(service.prompt_ids("x"))) == 1
    with pytest.raises(Refused, match="expected text, as this model has no token"):
        asyncio.run(service.prompt_ids(""))


def test_the_usual_number_of_tokens_keeps_to_the_limit(served):
    service = load(Options(ModelOptions(served, threads=1), max_tokens=10))
    asked = {"model": service.name, "prompt": "x"}
    assert asyncio.run(completion(service, asked, "")).job.max_tokens == 10


def test_the_openai_client(address):
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as api:
        how = {"model": NAME, "seed": 3}
        whole = api.completions.create(prompt="The boa", max_tokens=40, **how).choices[0]
        stop = whole.text[10:13]
        cut = api.completions.create(prompt="The boa", max_tokens=40, stop=[stop], **how)
        assert cut.choices[0].text == whole.text[: whole.text.index(stop)]
        assert cut.choices[0].finish_reason == "stop"
        stream = api.completions.create(prompt="The boa", max_tokens=40, stream=True, **how)
        assert "".join(part.choices[0].text for part in stream) == whole.text

        how |= {"messages": [USER], "max_completion_tokens": 12}
        reply = api.chat.completions.create(**how)
        assert reply.choices[0].message.role == "assistant"
        stream = api.chat.completions.create(
            stream=True, stream_options={"include_usage": True}, **how
        )
        *parts, last = stream
        text = "".join(part.choices[0].delta.content or "" for part in parts)
        assert text == reply.choices[0].message.content
        assert last.usage == reply.usage

        for refused in ({"logprobs": True}, {"n": 2}, {"response_format": {"type": "json_object"}}):
            with pytest.raises(openai.BadRequestError, match="does not support it"):
                api.chat.completions.create(**how, **refused)
        with pytest.raises(openai.BadRequestError, match='does not know "min_tokens"'):
            api.chat.completions.create(**how, extra_body={"min_tokens": 1})
        with pytest.raises(openai.NotFoundError, match="model 'bear' not found"):
            api.chat.completions.create(**how | {"model": "bear"})

        made = api.embeddings.create(model=NAME, input=["The boa", "The krait"])
        assert sum(x * x for x in made.data[1].embedding) == pytest.approx(1, abs=1e-5)
        assert api.models.list().data[0].id == NAME
