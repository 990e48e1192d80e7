"""Text to token ids and back: training, saving and loading of a tokenizer, one tokenizer.json.

`bpe` works on bytes and loses nothing. `word` knows whole words; an unknown word falls back to its
characters, and a character never seen is dropped. Both are `tokenizers.Tokenizer` objects.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from ysnake.shared.errors import InputError
from ysnake.shared.files import LARGEST_JSON
from ysnake.text import tokenizer_check

EOT = "<|endoftext|>"  # begins and ends every document: bos, eos and pad in one
FILE = "tokenizer.json"
_WORDS = Regex(tokenizer_check.WORDS)
LEAST_BPE = 257  # entries: one for each byte, and EOT
BLOCK = 64  # characters; longer words, as in DNA and some scripts, are cut for training
_FULL = re.compile(rf"\w{{{BLOCK}}}|[^\w\s]{{{BLOCK}}}|\s{{{BLOCK}}}")


def train(kind: str, texts: Iterable[str], max_vocab: int) -> Tokenizer:
    """Train a tokenizer of at most `max_vocab` entries, special token included, on `texts`."""
    learn = {"bpe": _train_bpe, "word": _train_word}[kind]
    return _ready(learn(_without_long_words(texts), max_vocab))


def check_size(kind: str, max_vocab: int) -> None:
    """Raise InputError if no tokenizer of this kind has so few entries, whatever the text is."""
    if kind == "bpe" and max_vocab < LEAST_BPE:
        raise InputError(
            f"a bpe tokenizer needs at least {LEAST_BPE}, got {max_vocab}", field="--vocab-size"
        )


def _without_long_words(texts: Iterable[str]) -> Iterator[str]:
    """Cut the texts after each block of BLOCK characters that lies within a word.

    Training looks at whole words for each merge, so long words would take quadratic time.
    """
    for text in map(_encodable, texts):
        start = 0
        for at in range(0, len(text), BLOCK):
            if _FULL.match(text, at):
                yield text[start : at + BLOCK]
                start = at + BLOCK
        yield text[start:]


def _train_bpe(texts: Iterable[str], max_vocab: int) -> Tokenizer:
    check_size("bpe", max_vocab)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=max_vocab,
        min_frequency=2,
        special_tokens=[EOT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _train_word(texts: Iterable[str], max_vocab: int) -> Tokenizer:
    split = pre_tokenizers.Split(_WORDS, "isolated")
    words: Counter[str] = Counter()
    for text in texts:
        words.update(word for word, _ in split.pre_tokenize_str(text))
    characters = sorted({c for word in words for c in word})
    if max_vocab <= len(characters):
        raise InputError(
            f"these texts have {len(characters)} characters, so a word tokenizer "
            f"needs at least {len(characters) + 1}, got {max_vocab}",
            field="--vocab-size",
        )
    entries = dict.fromkeys([EOT, *characters])  # an ordered set
    for word, _ in sorted(words.items(), key=lambda item: (-item[1], item[0])):
        if len(entries) == max_vocab:
            break
        entries.setdefault(word)
    vocab = {entry: i for i, entry in enumerate(entries)}
    # BPE without merges that first looks for the whole word, and else uses single characters.
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([EOT])
    return tokenizer


def _ready(tokenizer: Tokenizer) -> Tokenizer:
    # the characters "<|endoftext|>" inside a text do not end the document
    tokenizer.encode_special_tokens = True
    return tokenizer


def eot_id(tokenizer: Tokenizer) -> int:
    """The id of the token that begins and ends a document."""
    found = tokenizer.token_to_id(EOT)
    if found is None:
        raise InputError(f"{FILE}: the token {EOT} is missing")
    return found


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of a text, without special tokens."""
    return tokenizer.encode(_encodable(text), add_special_tokens=False).ids


def _encodable(text: str) -> str:
    """Replace what UTF-8 cannot encode, halves of surrogate pairs, by question marks."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


def dropped_bytes(tokenizer: Tokenizer, text: str, ids: list[int]) -> int:
    """Number of bytes that are lost in `ids`: those of characters without a token.

    What the tokenizer's normalizer changes, such as an accent's code points or capitals, is not
    lost.
    """
    unknown = getattr(tokenizer.model, "unk_token", None)
    if unknown is not None:
        unknown_id = tokenizer.token_to_id(unknown)
        ids = [i for i in ids if i != unknown_id]
    text, back = _encodable(text), decode(tokenizer, ids)
    if back == text:
        return 0
    if tokenizer.normalizer is not None:  # of both texts, since a decoder may undo a part of it
        text = tokenizer.normalizer.normalize_str(text)
        back = tokenizer.normalizer.normalize_str(back)
    missing = Counter(text) - Counter(back)
    return sum(len(character.encode()) * n for character, n in missing.items())


def decode(tokenizer: Tokenizer, ids: list[int]) -> str:
    """The text of token ids, without special tokens."""
    return tokenizer.decode(ids, skip_special_tokens=True)


def save(tokenizer: Tokenizer, folder: Path, **settings: str | None) -> None:
    """Write tokenizer.json, and the tokenizer_config.json that transformers reads.

    `settings`: what the latter gets besides, such as the "eos_token".
    """
    (folder / FILE).write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    written = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **settings,
        "clean_up_tokenization_spaces": False,
        # Text has no special tokens, unless a chat template writes them.
        "split_special_tokens": "chat_template" not in settings,
        "model_max_length": 10**30,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(written, indent=2) + "\n")


def load(folder: Path) -> Tokenizer:
    """Read the tokenizer of a checkpoint folder.

    Raises:
        InputError: the file is missing or is not a tokenizer. The message names it.
    """
    path = Path(folder) / FILE
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    if path.stat().st_size > LARGEST_JSON:
        raise InputError(f"{path}: expected at most {LARGEST_JSON:,} bytes")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        tokenizer_check.check(content)
        tokenizer = _ready(Tokenizer.from_str(json.dumps(content)))
        tokenizer.no_truncation()  # all tokens of a text, and no padding
        tokenizer.no_padding()
    except Exception as error:  # the library raises bare Exception for every bad file
        raise InputError(f"{path}: not a tokenizer that ysnake can use ({error})") from error
    return tokenizer
