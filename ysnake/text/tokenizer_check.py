"""Whether a foreign tokenizer.json is safe to run: all of its parts are known and bounded.

A small file can make a text grow without bound, make a pattern backtrack forever, or crash the
library. So the check accepts only parts whose time and memory are bounded by the size of the text:
those that this project writes, and those of well-known models.
"""

from typing import Any

from ysnake.shared.errors import InputError

# words and runs of punctuation keep the space before them, as in GPT-2
WORDS = r" ?\w+| ?[^\w\s]+|\s+"
_LETTERS = r"\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CASELESS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_LINES = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PATTERNS = {
    WORDS,
    r"'s|'t|'re|'ve|'m|'ll|'d| ?" + _LETTERS,  # GPT-2
    _CASELESS + r"\p{N}{1,3}" + _LINES,  # GPT-4, Llama 3
    _CASELESS + r"\p{N}" + _LINES,  # Qwen 2
}
MOST_PARTS = 8  # in a sequence
GROWTH = 8.0  # characters that replacements may make of one
SHORT = 16  # characters that a part may add to a text

NORMALIZERS = {"NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents", "Strip"}
PRE_TOKENIZERS = {"ByteLevel", "Digits", "Metaspace", "Whitespace", "WhitespaceSplit"}
PRE_TOKENIZERS |= {"Punctuation", "BertPreTokenizer"}
DECODERS = {"ByteLevel", "ByteFallback", "Fuse", "Metaspace"}


def check(content: Any) -> None:
    """Raise InputError, naming the part, unless a tokenizer.json of this content is safe to run."""
    if not isinstance(content, dict):
        raise InputError("expected an object")
    _check_model(content.get("model"))
    growth = 1.0
    for part in _parts(content, "normalizer", "normalizers"):
        growth *= _growth("normalizer", part, NORMALIZERS)
    _at_most("normalizer", growth)
    parts = _parts(content, "pre_tokenizer", "pretokenizers")
    for part in parts:
        if part["type"] == "Split":
            _check_pattern(part.get("pattern"))
        elif part["type"] not in PRE_TOKENIZERS:
            raise InputError(f"pre_tokenizer {_shown(part['type'])} is not supported")
    if sum(part["type"] == "ByteLevel" for part in parts) > 1:  # each doubles what is not ASCII
        raise InputError("pre_tokenizer: ByteLevel twice")
    growth = 1.0
    for part in _parts(content, "decoder", "decoders"):
        growth *= _growth("decoder", part, DECODERS)
    _at_most("decoder", growth)
    for part in _parts(content, "post_processor", "processors"):
        _check_post_processor(part)


def _shown(value: Any) -> str:
    return repr(value)[:60]


def _parts(content: dict[str, Any], name: str, plural: str) -> list[dict[str, Any]]:
    """The parts of a pipeline in their order: none, one, or those of a sequence."""
    part = content.get(name)
    if part is None:
        return []
    parts: Any = [part]
    if isinstance(part, dict) and part.get("type") == "Sequence":
        parts = part.get(plural)
    if not isinstance(parts, list) or len(parts) > MOST_PARTS:
        raise InputError(f"{name}: expected a sequence of at most {MOST_PARTS} parts")
    for part in parts:
        if not isinstance(part, dict) or not isinstance(part.get("type"), str):
            raise InputError(f"{name}: expected parts with a type")
    return parts


def _check_model(model: Any) -> None:
    if not isinstance(model, dict) or model.get("type") != "BPE":
        kind = model.get("type") if isinstance(model, dict) else model
        raise InputError(f"expected a model of type BPE, got {_shown(kind)}")
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name):
            raise InputError(f"model: {name} {_shown(model[name])} is not supported")
    unknown, vocab = model.get("unk_token"), model.get("vocab")
    if not isinstance(vocab, dict):
        raise InputError("model: expected a vocab of tokens and ids")
    if unknown is not None and (not isinstance(unknown, str) or unknown not in vocab):
        raise InputError(f"model: unk_token {_shown(unknown)} is not in its vocab")


def _growth(name: str, part: dict[str, Any], known: set[str]) -> float:
    """The most characters that a part makes of one. Characters that it adds once do not count."""
    if part["type"] == "Replace":
        pattern, new = part.get("pattern"), part.get("content")
        old = pattern.get("String") if isinstance(pattern, dict) else None
        if not (isinstance(old, str) and old and isinstance(new, str)):
            raise InputError(f"{name}: Replace of {_shown(pattern)} is not supported")
        return max(1.0, len(new) / len(old))
    if part["type"] == "Prepend" and name == "normalizer":
        text = part.get("prepend")
        if not isinstance(text, str) or not 1 <= len(text) <= SHORT:  # the library fails at none
            raise InputError(f"{name}: Prepend of {_shown(part.get('prepend'))} is not supported")
    elif part["type"] == "Strip" and name == "decoder":
        if not all(part.get(end) in range(SHORT) for end in ("start", "stop")):
            raise InputError(f"{name}: Strip of more than {SHORT} characters")
    elif part["type"] not in known:
        raise InputError(f"{name} {_shown(part['type'])} is not supported")
    return 1.0


def _at_most(name: str, growth: float) -> None:
    if growth > GROWTH:
        raise InputError(f"{name}: makes a text {growth:.3g} times as long, at most {GROWTH:g}")


def _check_pattern(pattern: Any) -> None:
    regex = pattern.get("Regex") if isinstance(pattern, dict) else None
    string = pattern.get("String") if isinstance(pattern, dict) else None
    if regex not in PATTERNS and not (isinstance(string, str) and string):
        raise InputError(f"pre_tokenizer: the pattern {_shown(regex or pattern)} is not supported")


def _check_post_processor(part: dict[str, Any]) -> None:
    """Check a post-processor. A template must not repeat the text.

    It may add special tokens, since ysnake always encodes without them.
    """
    if part["type"] == "ByteLevel":
        return
    single = part.get("single")
    if part["type"] != "TemplateProcessing" or not isinstance(single, list):
        raise InputError(f"post_processor {_shown(part['type'])} is not supported")
    texts = [piece for piece in single if isinstance(piece, dict) and "Sequence" in piece]
    if len(texts) != 1 or len(single) > MOST_PARTS:
        raise InputError("post_processor: expected a template with the text once")
