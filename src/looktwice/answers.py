"""Answers: finding the thinking and the answer in a completion, and judging an answer by rules. Pure text.

Sources: R-GRPO's answer routing. Whether two short answers say the same is the matter of `judging/`; no model judges
here, and what the rules cannot decide is wrong.
"""

from __future__ import annotations

import re

from looktwice.calls import TOOL_CALL_CLOSE, TOOL_CALL_OPEN, TOOL_RESPONSE_CLOSE, TOOL_RESPONSE_OPEN
from looktwice.judging.verdict import says_the_same
from looktwice.messages import ANSWER_OPEN, THINK_CLOSE, THINK_OPEN

Solution = str | tuple[str, ...]
"""A gold answer, or several of which each is right."""

MAX_ANSWER_CHARS = 1000
"""A longer answer is never right: it could list every candidate (the guard of DeepEyes)."""

_ANSWER_BLOCK = re.compile(r"<answer>((?:(?!</?answer>).)*)</answer>", re.DOTALL | re.IGNORECASE)
_THINKING_AGAIN = re.compile(rf"{THINK_OPEN}(?:(?!{THINK_OPEN}).)*?(?:{THINK_CLOSE}|\Z)", re.DOTALL)
_TOOL_TEXT = re.compile(
    rf"{TOOL_CALL_OPEN}(?:(?!{TOOL_CALL_OPEN}).)*?{TOOL_CALL_CLOSE}"
    rf"|{TOOL_RESPONSE_OPEN}(?:(?!{TOOL_RESPONSE_OPEN}).)*?{TOOL_RESPONSE_CLOSE}",
    re.DOTALL,
)
_STATED_ALONE = re.compile(
    r"(?:.*\n|[^\n]* )?####\s*(\S[^\n]*)"
    r"|(?:(?:so|thus|hence|therefore),? )?(?:the )?(?:final |correct )?answer(?: is\b:?|:)\s*(\S[^\n]*)"
    r"|(?:正确)?答案(?:是|为)?[:：]?\s*(\S[^\n]*)",
    re.IGNORECASE | re.DOTALL,
)
"""A text that ends in "#### 7", as the answers of GSM8K do, or is no more than "The answer is 7"."""
_STATED_ANSWER = re.compile(r"\banswer(?:\s+is\b\s*:?|\s*:)\s*(\S.*)", re.IGNORECASE)
_NOT_STATED = re.compile(
    r"(?:n't|\b(?:not|never|cannot|doubt|whether|if|false|wrong|incorrect|unlikely))"
    r"(?: (?:think|believe|say|know|tell|sure|certain|true|clear|if|whether|that))*"
    r"(?: (?:the|my|a|an|final|correct|right|best))*\s*$",
    re.IGNORECASE,
)
"""What before "answer is" states none: "I don't think the", "the wrong"."""
_MAX_CHARS_BEFORE = 80

_MATH = re.compile(
    r"\$\$\s*([^$\s][^$]*)\$\$|\$\s*([^$\s][^$]*)\$|\\\(((?:(?!\\\)).)+)\\\)|\\\[((?:(?!\\\]).)+)\\\]"
    r"|\\(?:text|mathrm|mathbf)\{([^{}]+)\}|\\boxed\{()\s*\}",
    re.DOTALL,
)
"""A whole text in the delimiters or a command of LaTeX."""
_BOXED = re.compile(r"\\(?:boxed|fbox)\{")


def split_thinking(text: str) -> tuple[str, str]:
    """(thinking, rest), both stripped and without the think tags, split at the first `</think>`.

    The opening tag is optional, because a prompt may end in it. Without any tag everything is the rest. A block that
    was opened and never closed is thinking that was cut off: what stands before it is the rest (the official chat
    code calls the whole text the response there).
    """
    thinking, closing_tag, rest = text.partition(THINK_CLOSE)
    if closing_tag:
        return thinking.replace(THINK_OPEN, "", 1).strip(), rest.strip()
    rest, _, thinking = text.partition(THINK_OPEN)
    return thinking.strip(), rest.strip()


def strip_tool_text(text: str) -> str:
    """The text without crop calls and tool responses."""
    return _TOOL_TEXT.sub("", text)


def after_thinking(text: str) -> str:
    """What is said aloud: the text after its thinking, without thinking that was begun again."""
    return _THINKING_AGAIN.sub("", split_thinking(text)[1]).strip()


def find_answer_block(text: str) -> str | None:
    """The stripped content of the last complete `<answer>…</answer>` after the thinking, or None."""
    blocks = _ANSWER_BLOCK.findall(after_thinking(text))
    return blocks[-1].strip() if blocks else None


def extract_answer(text: str) -> str | None:
    """The short answer to judge in a completion, or None when it holds none.

    From the last complete answer block after the thinking; without one, from all that follows the thinking. There, in
    this order: the last `\\boxed{…}`; in a text without a block what follows "answer is" or "answer:", unless it is
    denied; then the block, or the last line of the text (as R-GRPO does). An answer block that was opened and cut off
    is no answer.
    """
    block = find_answer_block(text)
    if block is not None:
        return last_boxed(block) or block or None
    rest = after_thinking(text)
    if ANSWER_OPEN in rest:
        return None
    rest = strip_tool_text(rest).strip()
    stated = [
        found[1]
        for found in _STATED_ANSWER.finditer(rest)
        if not _NOT_STATED.search(rest[max(0, found.start() - _MAX_CHARS_BEFORE) : found.start()])
    ]
    last_line = rest.splitlines()[-1].strip() if rest else None
    return last_boxed(rest) or (stated[-1].strip() if stated else last_line)


def unwrapped(text: str) -> str:
    """What a gold answer or a prediction says, stripped of what it is wrapped in; "" where that holds nothing.

    Wrappings are thinking and the answer block; `\\boxed{…}`; "The answer is", or all before `####`, as in GSM8K; and
    around the rest `$…$`, `\\(…\\)`, `\\text{…}`.

    Example: unwrapped("<think>Two.</think><answer>$\\\\boxed{2}$</answer>") == "2"
    """
    block = find_answer_block(text)
    said = after_thinking(text) if block is None else block
    said = last_boxed(said) or said
    if stated := _STATED_ALONE.fullmatch(said):
        said = (stated[1] or stated[2] or stated[3]).strip()
    while whole := _MATH.fullmatch(said):
        said = "".join(filter(None, whole.groups())).strip()
    return said


def golds(solution: Solution) -> tuple[str, ...]:
    """The gold answers of a solution, each unwrapped. A slash parts nothing: "TCP/IP" is one answer."""
    given = (solution,) if isinstance(solution, str) else solution
    return tuple(unwrapped(gold) or gold for gold in given)


def answers_match(prediction: str | None, solution: Solution) -> bool:
    """Whether an extracted answer is right by rules: whether it says the same as one of the gold answers.

    Both are unwrapped first; then `judging/verdict.py` decides by the kind of the gold answer (docs/answers.md has
    examples). An answer of more than 1,000 characters is wrong, and one to a gold answer that long.
    """
    if prediction is None or len(prediction) > MAX_ANSWER_CHARS:
        return False
    prediction = unwrapped(prediction) or prediction
    return any(len(gold) <= MAX_ANSWER_CHARS and says_the_same(prediction, gold) for gold in golds(solution))


def answers_right(text: str, solution: Solution) -> bool:
    """Whether the answer of a completion is right by rules, see `extract_answer` and `answers_match`."""
    return answers_match(extract_answer(text), solution)


def last_boxed(text: str) -> str | None:
    """Content of the last closed `\\boxed{…}` or `\\fbox{…}`, nested braces included."""
    *_, last = [None, *_BOXED.finditer(text)]
    if last is None:
        return None
    depth = 0
    for end in range(last.start(), len(text)):
        depth += (text[end] == "{") - (text[end] == "}")
        if depth == 0 and text[end] == "}":
            return text[last.end() : end].strip() or None
    return None
