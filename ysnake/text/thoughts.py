"""Removing the thoughts of reasoning models, and turn markers, from an answer.

Reasoning models write their thoughts before the answer. Each model family marks them differently.
Some templates open the thought in the prompt, so the answer only closes it.
"""

import re

_NAMES = "think|thinking|thoughts?|reasoning|reflection|analysis|scratchpad"
_OPEN = (
    rf"<\|?(?:\w+:)?(?:{_NAMES})(?:\s[^<>]*)?\|?>"  # <think>, <seed:think>, <|thinking|>
    r"|(?-i:\[(?:THINK|THINKING|THOUGHT|REASONING)\])"
    r"|◁think▷|<\|start_thinking\|>"
    # channels: <|channel|>analysis<|message|>, <|channel>thought
    r"|<\|channel\|?>\s*(?:analysis|commentary|thought)\b[^<\n]*(?:<\|message\|>)?"
    r"|^\s*here(?: is|'s) my thought process:"
)
_CLOSE = (
    rf"<\|?/(?:\w+:)?(?:{_NAMES})\|?>"
    r"|(?-i:\[/(?:THINK|THINKING|THOUGHT|REASONING)\])"
    r"|◁/think▷|<\|end_thinking\|>|<channel\|>"
    r"|<\|channel\|?>\s*final\b[^<\n]*(?:<\|message\|>)?"
    r"|^\s*here(?: is|'s) my response:"
    r"|assistantfinal(?=\S)"  # channels whose markers were left out
)
_FLAGS = re.IGNORECASE | re.DOTALL | re.MULTILINE
OPEN, CLOSE = re.compile(_OPEN, _FLAGS), re.compile(_CLOSE, _FLAGS)
THOUGHT = re.compile(rf"(?:{_OPEN}).*?(?:{_CLOSE})", _FLAGS)

_HEADER = r"(?:<\|(?:im_start|start_header_id|start)\|>|<start_of_turn>|<\|turn>)\s*"
ANSWERS = re.compile(rf"{_HEADER}(?:assistant|model)\s*(?:<\|end_header_id\|>)?", _FLAGS)
ASKS = re.compile(
    rf"(?:{_HEADER}(?:user|system|tool|human)\b|<\|(?:user|system)\|>|\[INST\]).*", _FLAGS
)
MARKER = re.compile(  # <|im_end|>, <turn|>, ...
    r"<[|\uff5c][^<>|\uff5c\n]{1,40}[|\uff5c]?>|<[^<>|\uff5c\n]{1,40}[|\uff5c]>"
    r"|</?s>|<(?:start|end)_of_turn>|<(?:bos|eos|pad|unk)>|\[/?INST\]|</?(?:answer|response)>",
    _FLAGS,
)


def without_thoughts(answer: str) -> str:
    """The answer without thoughts, turn markers and invented turns of the user.

    Everything before a closing marker without an opening one is a thought. So is everything after
    an opening marker without a closing one.
    """
    answer = _without_closed(answer)
    closed = [found.end() for found in CLOSE.finditer(answer)]
    answer = answer[closed[-1] :] if closed else answer
    opened = OPEN.search(answer)
    answer = answer[: opened.start()] if opened else answer
    answer = ASKS.sub("", ANSWERS.sub("", answer))
    return MARKER.sub("\n\n", answer)


def begins_in_thought(answer: str) -> bool:
    """Whether an answer closes a thought that it did not open."""
    return CLOSE.search(_without_closed(answer)) is not None


def _without_closed(answer: str) -> str:
    """The answer without the thoughts that are opened and closed.

    Only what precedes the last closing marker is searched for them. Otherwise each opening marker
    after it would be a search to the end of the answer.
    """
    ends = [found.end() for found in CLOSE.finditer(answer)]
    last = ends[-1] + 1 if ends else 0  # one more character, which a marker may look at
    return THOUGHT.sub("", answer[:last]) + answer[last:]
