"""GGUF files: their content, and that llama.cpp reads the same text and writes the same text."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small import corpus, entry, model, saved

from ysnake import export
from ysnake.checkpoints import checkpoint, gguf_file, modelfile
from ysnake.checkpoints.checkpoint import name_of
from ysnake.inference.generate import Context
from ysnake.inference.sampling import Sampling
from ysnake.shared.errors import InputError
from ysnake.text import tokenizer

gguf = pytest.importorskip("gguf", reason="pip install -e '.[gguf]' has it")

PAGE = """The cobra's asleep; they'll wake it, we've 'heard.
\tTabs\tand  double   spaces \n\n\n   and a broken\r\nline \t \n
蛇は眠る。眠い蛇、二匹。 뱀이 잔다. Змея спит, naïve café Ωμέγα ﷽ नमस्ते สวัสดี
🐍🐍 👩‍👩‍👧‍👦 🏳️‍🌈 ½ ² Ⅷ ٣ — “quoted” … <|endoftext|> is text here. x=1234567;y\u00a0z\u200b!
'S 'T don'T I'LL it's;we're --- ### $$ __init__ (a,b)  é vs é \u3000全角\u3000 end  """


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A checkpoint of a tiny model that is sure of itself, and the ten documents it has learnt."""
    pytest.importorskip("llama_cpp", reason="pip install llama-cpp-python reads it")
    folder = tmp_path_factory.mktemp("export")
    tales = corpus(folder, 40).read_text().strip().split("\n<|endoftext|>\n")
    documents = [f"Night {i}. " + " ".join(tales[i::10]) for i in range(10)]
    learnt = tokenizer.train("bpe", [*documents, PAGE], 500)
    m = model(vocab=learnt.get_vocab_size(), d_model=64, d_state=16, head_dim=16)
    rows = [[0, *tokenizer.encode(learnt, text), 0] for text in documents]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    targets = torch.tensor([row[1:] + [-100] * (longest - len(row)) for row in rows])
    optimizer = torch.optim.AdamW(m.parameters(), lr=1e-2)
    for _ in range(120):
        loss = F.cross_entropy(m(ids[:, :-1]).flatten(0, 1), targets.flatten(), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.3
    checkpoint.save(folder / "model", m, learnt)
    return folder / "model", documents


def write(folder, file, type="f32"):
    m, learnt = checkpoint.load(folder), checkpoint.load_tokenizer(folder)
    gguf_file.write_gguf(file, m, learnt, type, "a snake")
    return file


def llama(file):
    llama_cpp = pytest.importorskip("llama_cpp", reason="pip install llama-cpp-python reads it")
    return llama_cpp.Llama(
        str(file), n_ctx=512, n_threads=1, n_threads_batch=1, logits_all=True, verbose=False
    )


def greedy(llm, ids, count):
    """What llama.cpp goes on with, up to the end of the document."""
    llm.reset()
    out = []
    for token in llm.generate(ids, temp=0, repeat_penalty=1.0):
        if token == llm.token_eos() or len(out) == count:
            return out
        out.append(token)


def prompts(documents):
    """Beginnings of the documents, each of another length."""
    return [" ".join(text.split(" ")[: 3 + i]) for i, text in enumerate(documents)]


def test_llama_cpp_writes_the_same(trained, tmp_path):
    folder, documents = trained
    llm = llama(write(folder, tmp_path / "f32.gguf"))
    m, learnt = checkpoint.load(folder), checkpoint.load_tokenizer(folder)
    lengths = []
    for prompt in prompts(documents):
        ids = [0, *tokenizer.encode(learnt, prompt)]
        assert llm.tokenize(prompt.encode()) == ids
        context = Context(m, learnt.get_vocab_size())
        context.feed(ids)
        expected = list(context.generate(Sampling(temperature=0), 64))
        assert greedy(llm, ids, 64) == expected
        lengths.append(len(expected))
    assert lengths == [64] * 10


@pytest.mark.parametrize("type", ["f16", "bf16", "q8_0", "q4_0"])
def test_smaller_types_go_on_as_learnt(trained, tmp_path, type):
    folder, documents = trained
    llm = llama(write(folder, tmp_path / f"{type}.gguf", type))
    learnt = checkpoint.load_tokenizer(folder)
    right = 0
    for prompt, text in zip(prompts(documents), documents, strict=True):
        out = greedy(llm, [0, *tokenizer.encode(learnt, prompt)], 64)
        right += text.startswith(prompt + tokenizer.decode(learnt, out[:16]))
    assert right >= 7


def test_llama_cpp_reads_the_same_tokens(trained, tmp_path):
    folder, _ = trained
    llm, learnt = llama(write(folder, tmp_path / "x.gguf")), checkpoint.load_tokenizer(folder)
    for text in (PAGE, *PAGE.split("\n"), "", " ", "\n", "  a"):
        ids = tokenizer.encode(learnt, text)
        assert llm.tokenize(text.encode(), add_bos=False) == ids
        assert llm.tokenize(text.encode()) == [0, *ids]


SHAPES = {
    "untied": {"tied": False},
    "two groups, no bias of the convolution": {"n_groups": 2, "conv_bias": False},
    "a factorised head": {"tied": False, "output_size": 8},
    "another width and expansion": {"conv_width": 3, "expand": 3, "norm_eps": 1e-3},
}


@pytest.mark.parametrize("sizes", SHAPES.values(), ids=SHAPES)
def test_llama_cpp_gives_the_same_logits(tmp_path, sizes):
    folder = saved(tmp_path, **sizes)
    llm = llama(write(folder, tmp_path / "x.gguf"))
    ids = [0, *tokenizer.encode(checkpoint.load_tokenizer(folder), "The viper counts to 12.")]
    llm.eval(ids)
    with torch.no_grad():
        expected = checkpoint.load(folder)(torch.tensor([ids]))[0].numpy()
    ours = np.array(llm.scores[: len(ids)])
    assert np.linalg.norm(ours - expected) <= 1e-4 * np.linalg.norm(expected)


def test_content_of_a_file(tmp_path):
    folder = saved(tmp_path, n_groups=2)
    m, learnt = checkpoint.load(folder), checkpoint.load_tokenizer(folder)
    reader = gguf.GGUFReader(write(folder, tmp_path / "x.gguf"))
    fields = {name: field.contents() for name, field in reader.fields.items()}
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    size, rows = learnt.get_vocab_size(), m.config.vocab_size
    assert len(tokens) == len(types) == len(set(tokens)) == rows > size
    assert [learnt.id_to_token(i) for i in range(size)] == tokens[:size]
    kinds = gguf.TokenType
    expected = [kinds.CONTROL] + [kinds.NORMAL] * (size - 1) + [kinds.UNUSED] * (rows - size)
    assert types == expected
    assert fields["tokenizer.ggml.suppress_tokens"] == list(range(size, rows))
    for name, value in {
        "general.architecture": "mamba2",
        "general.name": "a snake",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.add_bos_token": True,
        "mamba2.ssm.conv_kernel": 4,
        "mamba2.ssm.group_count": 2,
        "mamba2.ssm.inner_size": 64,
        "mamba2.ssm.state_size": 8,
        "mamba2.ssm.time_step_rank": 8,
        "mamba2.block_count": 2,
    }.items():
        assert fields[name] == value, name
    tensors = {t.name: t.data for t in reader.tensors}
    mixer = m.backbone.layers[1].mixer
    for name, weight in {
        "token_embd.weight": m.backbone.embeddings.weight,
        "blk.1.ssm_a": -mixer.A_log.exp()[:, None],
        "blk.1.ssm_conv1d.weight": mixer.conv1d.weight[:, 0],
        "blk.1.ssm_dt.bias": mixer.dt_bias,
        "blk.1.ssm_norm.weight": mixer.norm.weight.view(2, -1),
    }.items():
        assert np.array_equal(tensors[name], weight.detach().numpy()), name
    assert "output.weight" not in tensors


def test_command(tmp_path, monkeypatch):
    folder = saved(tmp_path)
    monkeypatch.chdir(tmp_path)
    code, out, errors = entry(export.main, folder, "--gguf", "a.gguf", "--type", "q8_0")
    assert code == 0, errors
    assert "ollama create a -f Modelfile" in out
    assert f"a.gguf: {folder}, " in out
    lines = (tmp_path / "Modelfile").read_text().splitlines()
    assert lines[0] == modelfile.WRITTEN_BY_US
    assert lines[1].startswith(modelfile.HASH)
    assert lines[2:4] == ["FROM ./a.gguf", 'TEMPLATE "{{ .Prompt }}"']
    assert 'PARAMETER stop "<|endoftext|>"' in lines
    types = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "a.gguf").tensors}
    assert types["blk.0.ssm_in.weight"] == types["token_embd.weight"] == "Q8_0"
    assert types["blk.0.ssm_conv1d.weight"] == types["blk.0.ssm_norm.weight"] == "F32"


def test_a_chat_template_goes_with_the_model(tmp_path):
    """Ollama and llama.cpp take it from the file, so the Modelfile has none."""
    folder = saved(tmp_path)
    learnt = checkpoint.load_tokenizer(folder)
    learnt.add_special_tokens(["<|im_end|>"])
    source = "{% for m in messages %}{{ m['content'] + '<|im_end|>' }}{% endfor %}"
    settings = {"chat_template": source, "eos_token": "<|im_end|>"}
    m = model(vocab=learnt.get_vocab_size())
    checkpoint.save(tmp_path / "chatty", m, learnt, tokenizer_settings=settings)
    code, _, errors = entry(export.main, tmp_path / "chatty", "--gguf", tmp_path / "x.gguf")
    assert code == 0, errors
    fields = gguf.GGUFReader(tmp_path / "x.gguf").fields
    assert fields["tokenizer.chat_template"].contents() == source
    end = learnt.token_to_id("<|im_end|>")
    assert fields["tokenizer.ggml.eot_token_id"].contents() == end
    lines = (tmp_path / "Modelfile").read_text().splitlines()
    assert not [line for line in lines if line.startswith(("TEMPLATE", "PARAMETER stop"))]


def test_a_model_without_an_end_of_documents_has_no_stop_text(tmp_path):
    folder = saved(tmp_path, eos_id=None)
    assert entry(export.main, folder, "--gguf", tmp_path / "x.gguf")[0] == 0
    assert "PARAMETER stop" not in (tmp_path / "Modelfile").read_text()


def test_an_end_that_is_no_token_is_left_out(tmp_path):
    folder = saved(tmp_path, eos_id=-1, pad_id=-1)
    code, _, errors = entry(export.main, folder, "--gguf", tmp_path / "x.gguf")
    assert code == 0, errors
    assert "tokenizer.ggml.eos_token_id" not in gguf.GGUFReader(tmp_path / "x.gguf").fields
    assert "PARAMETER stop" not in (tmp_path / "Modelfile").read_text()


def test_ollama_stops_at_each_end(tmp_path):
    folder = saved(tmp_path, more_eos_ids=(270,))
    code, _, errors = entry(export.main, folder, "--gguf", tmp_path / "x.gguf")
    assert code == 0, errors
    second = json.dumps(checkpoint.load_tokenizer(folder).id_to_token(270), ensure_ascii=False)
    lines = (tmp_path / "Modelfile").read_text().splitlines()
    assert {'PARAMETER stop "<|endoftext|>"', f"PARAMETER stop {second}"} < set(lines)


@pytest.mark.parametrize("checkpoint", ["last", "last.old", "best"])
def test_a_model_has_the_name_of_its_run(tmp_path, monkeypatch, checkpoint):
    folder = tmp_path / "mine" / checkpoint
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder.parent)
    assert name_of(Path(checkpoint)) == "mine"
    assert name_of(tmp_path / "mine") == "mine"


def test_files_of_the_user_are_not_replaced(tmp_path):
    folder = saved(tmp_path)
    out = tmp_path / "out"
    out.mkdir()
    assert entry(export.main, folder, "--gguf", out / "x.gguf")[0] == 0
    assert entry(export.main, folder, "--gguf", out / "y.gguf")[0] == 0
    assert "FROM ./y.gguf" in (out / "Modelfile").read_text()
    changed = (out / "Modelfile").read_text().replace("0.8", "0.3")
    for text in (changed, changed.replace("# SHA-256", "# sha-256")):
        (out / "Modelfile").write_text(text)
        code, _, errors = entry(export.main, folder, "--gguf", out / "x.gguf")
        assert (code, errors.count("\n")) == (2, 1)
        assert (out / "Modelfile").read_text() == text
    code, _, errors = entry(export.main, folder, "--gguf", out / "none/x.gguf")
    assert code == 2
    assert f"--gguf: {out / 'none'}: no such folder; make it first" in errors
    for name in ("Modelfile", "modelfile"):
        code, _, errors = entry(export.main, folder, "--gguf", out / name)
        assert (code, errors.count("\n")) == (2, 1)
        assert "the export also writes a file called Modelfile there" in errors
    (out / "Modelfile").write_text("FROM mine\n")
    (out / "y.gguf").unlink()
    code, _, errors = entry(export.main, folder, "--gguf", out / "y.gguf")
    assert (code, errors.count("\n")) == (2, 1)
    assert f"{out / 'Modelfile'}: exists, and was written or changed by someone else" in errors
    assert (out / "Modelfile").read_text() == "FROM mine\n"
    assert {path.name for path in out.iterdir()} == {"Modelfile", "x.gguf"}


@pytest.mark.skipif(os.name == "nt", reason="links need rights there")
def test_a_link_is_replaced_and_not_written_through(tmp_path):
    mine, file = tmp_path / "mine", tmp_path / "x.gguf"
    mine.write_text("mine")
    file.symlink_to(mine)
    write(saved(tmp_path), file)
    assert mine.read_text() == "mine"
    assert file.read_bytes().startswith(b"GGUF")
    assert not file.is_symlink()


def test_what_cannot_be_exported_is_refused_and_nothing_written(tmp_path, monkeypatch):
    file = tmp_path / "out" / "x.gguf"
    with pytest.raises(InputError, match=r"x\.gguf: No such file or directory"):
        write(saved(tmp_path), file)
    file.parent.mkdir()
    words = tokenizer.train("word", ["The boa sleeps."], 300)
    bpe = tokenizer.train("bpe", ["The boa sleeps."], 300)
    for m, learnt, message in (
        (model(), words, "llama.cpp does not support the tokenizer of this model"),
        (model(), tokenizer.train("bpe", ["a b c"], 300), "takes no tokenizer without merges"),
        (model(bias=True), bpe, "bias: llama.cpp has no biases"),
        (model(dt_limit=(0.01, 1.0)), bpe, "dt_limit: llama.cpp has no limits"),
    ):
        with pytest.raises(InputError, match=message):
            gguf_file.write_gguf(file, m, learnt, "f32", "x")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(InputError, match="--gguf: needs the package gguf"):
        gguf_file.write_gguf(file, model(), bpe, "f32", "x")
    assert list(file.parent.iterdir()) == []
