"""Turning a language model's answer into plain prose for a corpus, or dropping it.

Models wrap a text in markdown and small talk, refuse, stop early and repeat themselves. Here an
answer becomes paragraphs of one line each, and refusals and repetitions are recognised.
"""

import re
from collections import Counter

from ysnake.text.thoughts import without_thoughts

SHINGLE = 5  # consecutive words that are compared together
NEAR = 0.4  # share of the smaller document's shingles that makes two documents near duplicates
DUPLICATE, NEAR_DUPLICATE = "duplicate", "near duplicate"  # verdicts
APOSTROPHE = str.maketrans("\u2019", "'")  # typographic apostrophes become ASCII ones
HEADING = 8  # a paragraph of at most this many words, without a sentence's end, is a heading

SENTENCE_END = r"""[.!?…]["'”\u2019)\]]*"""
TEXTS = "document|text|entry|article|note|label|paragraph|essay|passage|piece|story|prose|column"
TEXTS += "|script|explanation|definition|description|account|summary|version|report|talk|answer"
# small talk before the text and after it
CHATTER = re.compile(
    r"(sure|certainly|of course|absolutely|okay|great question)( thing)?([!.:]|,(?= (here|i)\b))\s*"
    r"|i('d| would) be (happy|glad|delighted) to\b[^.!:]*[.!:]\s*"
    rf"|(here('s| is| are)|below is)\b[^.!:]{{0,80}}\b({TEXTS})\b[^.!:]{{0,120}}:\s*"
    r"|(here('s| is| are)|below is)\b[^.!]*:$",
    re.IGNORECASE,
)
FAREWELL = re.compile(
    r"(let me know|i hope (this|that|it)|would you like|feel free|do you want me)\b.*"
    r"|\(?(word count|approximately|about)?:?\s*\d+ words\.?\)?"
    r"|\(?note:.*\bi('ve| have)?\b.*",
    re.IGNORECASE,
)
# what makes "I couldn't" and "I don't have" a refusal; a scene may begin so, too
UNDONE = "find|locate|identify|verify|confirm|determine|provide|write|access|help (you|with)"
LACKS = "access|ability|information|knowledge|details|data|facts|records?|sources?|context"
LACKS += "|opinions?|feelings?|experiences?"
REFUSAL = re.compile(
    r"(i('m| am)( very| so| truly)? (sorry|afraid|unable|not able)"
    r"|(sorry|unfortunately|regrettably|i apologi[sz]e),?( but)? i\b"
    r"|i (can't|cannot|can not|won't)\b"
    rf"|i (couldn't|could not) (\w+ly )?({UNDONE})\b"
    rf"|i (don't|do not) (\w+ly )?have (\S+ ){{0,3}}?({LACKS})\b"
    r"|as an ai\b)"
    r"|.*\bas an? (ai|artificial intelligence|large language)( language)? (model|assistant)\b"
    r"|.*\bas an ai,? i\b",
    re.IGNORECASE | re.DOTALL,
)


def plain(answer: str, cut: bool = False) -> str:
    """An answer as paragraphs of one line each, without thoughts, markdown and small talk.

    Headings, tables and code are left out. A list becomes one or more sentences. An answer that was
    `cut` at its end loses its last sentence, if that is not whole.
    """
    answer = without_thoughts(answer)
    # before the items of lists become sentences: the last item may be cut, too
    paragraphs = _paragraphs(whole_sentences(answer) if cut else answer)
    while paragraphs and (found := CHATTER.match(paragraphs[0].translate(APOSTROPHE))):
        paragraphs[:1] = filter(None, [paragraphs[0][found.end() :]])
    while paragraphs and FAREWELL.fullmatch(paragraphs[-1].translate(APOSTROPHE)):
        paragraphs.pop()
    return "\n\n".join(p for p in paragraphs if len(p.split()) > HEADING or _ends(p))


def _paragraphs(answer: str) -> list[str]:
    """The text of each paragraph and list. A list is joined to the paragraph that announces it."""
    from markdown_it import MarkdownIt

    foreign = ("code", "lheading", "reference", "html_block", "html_inline")  # not part of prose
    markdown = MarkdownIt("commonmark").enable("table").disable(foreign)
    answer = re.sub(
        r"^(\s*\d{3,})(?=[.)])", r"\1\\", answer, flags=re.MULTILINE
    )  # a year does not begin a list
    paragraphs: list[str] = []
    items: list[str] = []
    lists, before = 0, ""  # how deep in lists, and the type of the token before
    for token in markdown.parse(answer):
        if token.type.endswith(("_list_open", "_list_close")):
            lists += token.nesting
        if token.type == "inline" and before == "paragraph_open":
            texts = (
                " " if child.type.endswith("break") else child.content
                for child in token.children or ()
                if child.type in ("text", "code_inline", "softbreak", "hardbreak")
            )
            items.append(" ".join("".join(texts).split()))
        if items and not lists:
            if token.type.endswith("_list_close"):
                announced = bool(paragraphs) and paragraphs[-1].endswith(":")
                start = paragraphs.pop() + " " if announced else ""
                paragraphs.append(start + _sentences(items))
            else:
                paragraphs += items
            items = []
        before = token.type
    return [p for p in paragraphs if p]


def _sentences(items: list[str]) -> str:
    """The items of a list as sentences if any item is one, else separated by commas."""
    items = [item.rstrip(",;:") for item in items]
    if any(map(_ends, items)):
        return " ".join(item if _ends(item) else item + "." for item in items)
    return ", ".join(items) + "."


def _ends(text: str) -> bool:
    return re.search(SENTENCE_END + r"$", text) is not None


def whole_sentences(text: str) -> str:
    """The text up to the end of its last complete sentence; empty if there is none.

    The number of an item in a list ends no sentence.
    """
    pattern = rf"^[ \t]*\d+\.|({SENTENCE_END})(?=\s|$)"
    ends = [found.end() for found in re.finditer(pattern, text, re.MULTILINE) if found[1]]
    return text[: ends[-1]] if ends else ""


def is_refusal(text: str) -> bool:
    """Whether the model refuses, or says what it cannot do."""
    return REFUSAL.match(text.translate(APOSTROPHE)) is not None


class Seen:
    """The documents so far, stored so that a similar one is found quickly.

    A document is represented by its shingles, all sequences of five words. Each shingle is stored
    with the first document that has it.
    """

    def __init__(self) -> None:
        self.texts: set[int] = set()
        self.owner: dict[int, int] = {}
        self.sizes: list[int] = []

    def verdict(self, text: str) -> str | None:
        """DUPLICATE (up to case and punctuation), NEAR_DUPLICATE, or None if it is new."""
        words, shingles = _shingles(text)
        if hash(words) in self.texts:
            return DUPLICATE
        shared = Counter(self.owner[s] for s in shingles if s in self.owner)
        near = (n >= NEAR * min(len(shingles), self.sizes[i]) for i, n in shared.items())
        return NEAR_DUPLICATE if any(near) else None

    def add(self, text: str) -> None:
        """Store a document."""
        words, shingles = _shingles(text)
        self.texts.add(hash(words))
        for shingle in shingles:
            self.owner.setdefault(shingle, len(self.sizes))
        self.sizes.append(len(shingles))


def _shingles(text: str) -> tuple[tuple[str, ...], set[int]]:
    words = tuple(re.findall(r"\w+", text.lower()))
    starts = range(max(1, len(words) - SHINGLE + 1))
    return words, {hash(words[i : i + SHINGLE]) for i in starts}
