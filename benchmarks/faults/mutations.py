"""Changes that turn the content of a good file into that of a bad one.

hypothesis draws the kind of change, and a `random.Random` draws where. A draw takes longer than
reading a file, so each draw makes many files.
"""

import io
import json
import zipfile
from collections.abc import Callable
from copy import deepcopy
from random import Random
from typing import Any

from hypothesis import strategies as st

Mutation = Callable[[bytes, Random], bytes]
# names with a meaning in a tokenizer, a configuration or a list of weights
NAMES = ["BPE", "WordLevel", "Unigram", "WordPiece", "Regex", "ByteLevel", "Split", "Sequence"]
NAMES += [
    "Replace",
    "Strip",
    "Prepend",
    "Metaspace",
    "F32",
    "BF16",
    "I64",
    "U8",
    "bfloat16",
    "../x",
]
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-2, 400)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(NAMES),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner),
    max_leaves=5,
)
BYTE_EDITS = st.tuples(
    st.sampled_from(["exchange", "cut out", "put in", "end", "flip"]),
    st.binary(min_size=1, max_size=8),
)


@st.composite
def bytes_changed(draw: Any) -> Mutation:
    """Exchange, cut out or insert some bytes, flip a bit, or cut off the end."""
    edits = draw(st.lists(BYTE_EDITS, min_size=1, max_size=4))

    def mutate(content: bytes, chance: Random) -> bytes:
        for how, new in edits:
            at = chance.randrange(len(content) + 1)
            if how == "flip" and at < len(content):
                new = bytes([content[at] ^ (1 << new[0] % 8)])
            rest = {"cut out": at + len(new), "put in": at, "end": len(content)}
            after = content[rest.get(how, at + len(new)) :]
            content = content[:at] + (b"" if how in ("cut out", "end") else new) + after
        return content

    return mutate


@st.composite
def values_exchanged(draw: Any) -> Mutation:
    """Exchange or remove values deep in a JSON object."""
    edits = draw(st.lists(st.tuples(st.booleans(), VALUES), min_size=1, max_size=3))

    def mutate(content: bytes, chance: Random) -> bytes:
        whole = json.loads(content)
        for drop, value in edits:
            here = whole
            for depth in range(chance.randint(1, 4), 0, -1):
                keys = [*here] if isinstance(here, dict) else range(len(here))
                if not keys:
                    break
                key = chance.choice(keys)
                if depth > 1 and isinstance(here[key], dict | list):
                    here = here[key]
                    continue
                here[key] = deepcopy(value)
                if drop:
                    del here[key]
                break
        return json.dumps(whole).encode()

    return mutate


@st.composite
def header_changed(draw: Any) -> Mutation:
    """Change the list of tensors in a safetensors file, but keep its length right."""
    change = draw(values_exchanged() | bytes_changed())

    def mutate(content: bytes, chance: Random) -> bytes:
        end = 8 + int.from_bytes(content[:8], "little")
        header = change(content[8:end], chance)
        return len(header).to_bytes(8, "little") + header + content[end:]

    return mutate


@st.composite
def member_changed(draw: Any) -> Mutation:
    """Change a member of an archive of torch.save, but keep the checksums right."""
    change = draw(bytes_changed())

    def mutate(content: bytes, chance: Random) -> bytes:
        new = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(new, "w") as archive:
            names = old.namelist()
            chosen = chance.choice([names[0], *names])  # the first is the pickle
            for name in names:
                whole = old.read(name)
                archive.writestr(name, change(whole, chance) if name == chosen else whole)
        return new.getvalue()

    return mutate


@st.composite
def noise(draw: Any) -> Mutation:
    """Replace the content by any bytes."""
    pieces = draw(st.lists(st.binary(max_size=40), max_size=5))

    def mutate(_content: bytes, chance: Random) -> bytes:
        return b"".join(chance.sample(pieces, len(pieces)))

    return mutate
