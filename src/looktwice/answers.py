"""Answers: finding the thinking and the answer in a completion, and judging an answer by rules. Pure text.

Sources: R-GRPO's answer routing and the multiple-choice order shared by the public harnesses (HR-Bench, V*Bench,
MathVista). No model judges here; what the rules cannot decide is wrong.
"""

from __future__ import annotations

import html
import re
import string
import unicodedata
from collections.abc import Sequence
from fractions import Fraction

from looktwice.calls import TOOL_CALL_CLOSE, TOOL_CALL_OPEN, TOOL_RESPONSE_CLOSE, TOOL_RESPONSE_OPEN
from looktwice.messages import ANSWER_OPEN, THINK_CLOSE, THINK_OPEN

MAX_ANSWER_CHARS = 1000
"""A longer answer is never right: it could list every candidate (the guard of DeepEyes)."""

_ANSWER_BLOCK = re.compile(r"<answer>((?:(?!</?answer>).)*)</answer>", re.DOTALL | re.IGNORECASE)
_TOOL_TEXT = re.compile(
    rf"{TOOL_CALL_OPEN}(?:(?!{TOOL_CALL_OPEN}).)*?{TOOL_CALL_CLOSE}"
    rf"|{TOOL_RESPONSE_OPEN}(?:(?!{TOOL_RESPONSE_OPEN}).)*?{TOOL_RESPONSE_CLOSE}",
    re.DOTALL,
)
_STATED_ALONE = re.compile(
    r"(?:.*\n|[^\n]* )?####\s*(\S[^\n]*)"
    r"|(?:(?:so|thus|hence|therefore),? )?(?:the )?(?:final |correct )?answer(?: is\b:?|:)\s*(\S[^\n]*)",
    re.IGNORECASE | re.DOTALL,
)
"""A text that ends in "#### 7", as the answers of GSM8K do, or is no more than "The answer is 7"."""
_STATED_ANSWER = re.compile(r"\banswer(?:\s+is\b\s*:?|\s*:)\s*(\S.*)", re.IGNORECASE)

_MATH = re.compile(
    r"\$\$\s*([^$\s][^$]*)\$\$|\$\s*([^$\s][^$]*)\$|\\\(((?:(?!\\\)).)+)\\\)|\\\[((?:(?!\\\]).)+)\\\]"
    r"|\\(?:text|mathrm|mathbf)\{([^{}]+)\}|\\boxed\{()\s*\}",
    re.DOTALL,
)
"""A whole text in the delimiters or a command of LaTeX."""
_LATEX = ((re.compile(r"\\[dt]?frac\{(\d+)\}\{(\d+)\}"), r"\1/\2"), (re.compile(r"\\([$%&#_])"), r"\1"))
_FULL_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}
"""Letters, digits and signs as wide as Chinese ones, to the plain ones."""
_BOXED = re.compile(r"\\(?:boxed|fbox)\{")
_QUOTES = str.maketrans("\u2018\u2019\u201c\u201d\u2212", "''\"\"-")
_ARTICLE = re.compile(r"\b(?:a|an|the)\s+(?=[^\W\d_]{2})")
_NUMBER = re.compile(
    r"([$€£]?) ?([+-]?(?:[0-9]{1,3}(?:\{?,\}?[0-9]{3})+|[0-9]+)(?:\.[0-9]*)?|[+-]?\.[0-9]+)"
    r"(?:e([+-]?[0-9]{1,3})| ?(?:x|\*|×|·|\\times|\\cdot) ?10\^\{?([+-]?[0-9]{1,3})\}?)? ?(%?)"
)
_STORED_NUMBER = re.compile(r"(?=(?:\D*\d){9})[^.]*\.\d{7,}\D*(?:e[+-]?\d+)?")
"""Nine digits and more, seven of them decimals: what a table holds of a number that somebody wrote shorter."""
_STORED_ERROR = Fraction(1, 2**24)
"""By which share a float32 is off at the most."""
_FRACTION = re.compile(r"([+-]?[0-9]+) ?/ ?([0-9]+)")
_NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_MAX_YES_NO_CHARS = 48

_CHOICE_SOLUTION = re.compile(r"(?:\(([a-z])\)|([a-z])[.):])(?:\s+(.+))?|([a-z])", re.IGNORECASE | re.DOTALL)
_STATED_LETTER = re.compile(
    r"\banswer(?:\s+is\b\s*:?|\s*:)\s*(?:option\s+|choice\s+)?[(\[*\"']*([a-z])(?![\w'-])", re.IGNORECASE
)
_LETTER_IN_PARENTHESES = re.compile(r"(?<!\w)\(([a-z])\)", re.IGNORECASE)
_LETTER_AT_START = re.compile(r"[\s*\"']*([a-z])[.):](?:\s|$)", re.IGNORECASE)
_LONE_LETTER = re.compile(r"(?<![\w'\u2019.-])([a-z])(?![\w'\u2019-]|\.\w)", re.IGNORECASE)
_WORD_FOLLOWS = re.compile(r"\s+(?!(?:or|and)\b)[a-z]{2}", re.IGNORECASE)


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


def find_answer_block(text: str) -> str | None:
    """The stripped content of the last complete `<answer>…</answer>`, or None."""
    blocks = _ANSWER_BLOCK.findall(text)
    return blocks[-1].strip() if blocks else None


def extract_answer(text: str) -> str | None:
    """The short answer to judge in a completion, or None when it holds none.

    From the last complete answer block; without one, from the text after the thinking. There, in this order: the last
    `\\boxed{…}`; in a text without a block what follows "answer is" or "answer:"; then the block, or the last line of
    the text (as R-GRPO does). An answer block that was opened and cut off is no answer.
    """
    block = find_answer_block(text)
    if block is not None:
        return _last_boxed(block) or block or None
    _, rest = split_thinking(text)
    if ANSWER_OPEN in rest:
        return None
    rest = strip_tool_text(rest).strip()
    stated = _STATED_ANSWER.findall(rest)
    last_line = rest.splitlines()[-1].strip() if rest else None
    return _last_boxed(rest) or (stated[-1].strip() if stated else last_line)


def unwrapped(text: str) -> str:
    """What a gold answer or a prediction says, stripped of what it is wrapped in; "" where that holds nothing.

    Wrappings are thinking and the answer block; `\\boxed{…}`; "The answer is", or all before `####`, as in GSM8K; and
    around the rest `$…$`, `\\(…\\)`, `\\text{…}`.

    Example: unwrapped("<think>Two.</think><answer>$\\\\boxed{2}$</answer>") == "2"
    """
    block = find_answer_block(text)
    said = split_thinking(text)[1] if block is None else block
    said = _last_boxed(said) or said
    if stated := _STATED_ALONE.fullmatch(said):
        said = (stated[1] or stated[2]).strip()
    while whole := _MATH.fullmatch(said):
        said = "".join(filter(None, whole.groups())).strip()
    return said


def alternatives(solution: str) -> list[str]:
    """The gold answer unwrapped, and where it names several, split at `/`, each of them."""
    solution = unwrapped(solution) or solution
    parts = [part.strip() for part in re.split("(?<!<)/", solution)]
    is_one_thing = re.search(r"[0-9]\s*/\s*[0-9]", solution) or any(
        not part or (len(part) == 1 and part.isalpha()) for part in parts
    )
    return [solution] if is_one_thing or len(parts) == 1 else [solution, *parts]


def extract_choice(text: str, options: Sequence[str] = ()) -> str | None:
    """The letter ("A", "B", …) a response to a multiple-choice question picks, or None when none or several.

    `options` are the option texts in order; without them every letter counts as an option. Looked for in the answer
    block, else in the text after the thinking: boxed content; "answer is X"; a letter in parentheses; letter and
    period at the start; a lone letter (not the article "a" or the pronoun "I"); the only option text contained.
    """
    block = find_answer_block(text)
    scope = block if block is not None else split_thinking(text)[1]
    scope = (_last_boxed(scope) or scope).strip()
    letters = string.ascii_uppercase[: len(options) or 26]

    stated = [m[1].upper() for m in _STATED_LETTER.finditer(scope) if m[1] != "a" or not _is_word(m)]
    stated = [letter for letter in stated if letter in letters]
    if stated:
        return stated[-1]
    enclosed = {letter.upper() for letter in _LETTER_IN_PARENTHESES.findall(scope)} & set(letters)
    if enclosed:
        return enclosed.pop() if len(enclosed) == 1 else None
    start = _LETTER_AT_START.match(scope)
    if start and start[1].upper() in letters:
        return start[1].upper()
    lone = {m[1].upper() for m in _LONE_LETTER.finditer(scope) if not _is_word(m)} & set(letters)
    if lone:
        return lone.pop() if len(lone) == 1 else None
    return _contained_option(scope, options)


def answers_match(prediction: str | None, solution: str) -> bool:
    """Whether an extracted answer is right by rules.

    Both are unwrapped first. The solution counts as a whole and, split at `/`, as alternatives; it stays whole when it
    looks like a date, a fraction or a unit (digits on both sides of a slash, or a part that is empty or one letter).
    One alternative must be equal up to case, whitespace, articles, quotes and closing punctuation; or equal as a number
    ("7", "7.0", "seven", "1,000", "1e-05", and "0.1" where a table made 0.10000000149011612 of it); or be the only one
    of yes and no in an answer below 48 characters; or be the letter picked ("B", "(B)", "B. red").
    """
    if prediction is None or len(prediction) > MAX_ANSWER_CHARS:
        return False
    prediction = unwrapped(prediction) or prediction
    return any(_same_answer(prediction, alternative) for alternative in alternatives(solution))


def normalise_answer(text: str) -> str:
    """Lower case, single spaces, straight quotes; no articles, no enclosing quotes, no closing punctuation.

    What would become empty ("?" read from a sign) keeps its punctuation. Entities of HTML, invisible characters, and
    the LaTeX of fractions and escaped signs are written plainly.
    """
    text = html.unescape(unicodedata.normalize("NFC", text)).translate(_FULL_WIDTH)
    text = "".join(character for character in text if unicodedata.category(character) != "Cf") or text
    for latex, plain in _LATEX:
        text = latex.sub(plain, text)
    text = " ".join(text.translate(_QUOTES).casefold().split())
    bare = text.lstrip("\"'`* ").rstrip("\"'`*.,;:!? ")
    return _ARTICLE.sub("", bare) or text


def _same_answer(prediction: str, solution: str) -> bool:
    predicted, wanted = normalise_answer(prediction), normalise_answer(solution)
    if not predicted or predicted == wanted:
        return bool(predicted)
    number = _as_number(wanted)
    if number is not None:
        return _is_number(predicted, number, is_stored=_STORED_NUMBER.fullmatch(wanted) is not None)
    if wanted in ("yes", "no"):
        said = {"yes", "no"} & set(re.findall(r"\w+", predicted))
        return said == {wanted} and len(predicted) < _MAX_YES_NO_CHARS
    choice = _CHOICE_SOLUTION.fullmatch(solution.strip())
    if choice is None:
        return False
    letter, option = choice[1] or choice[2] or choice[4], choice[3]
    return extract_choice(prediction) == letter.upper() or (
        option is not None and predicted == normalise_answer(option)
    )


def _as_number(text: str) -> tuple[str, Fraction, str] | None:
    """(currency, value, percent sign) of a normalised text that is one number, else None."""
    if text in _NUMBER_WORDS:
        return "", Fraction(_NUMBER_WORDS.index(text)), ""
    fraction = _FRACTION.fullmatch(text)
    if fraction:
        return ("", Fraction(int(fraction[1]), int(fraction[2])), "") if int(fraction[2]) else None
    number = _NUMBER.fullmatch(text)
    if number is None:
        return None
    value = Fraction(re.sub("[{,}]", "", number[2])) * Fraction(10) ** int(number[3] or number[4] or 0)
    return number[1], value, number[5]


def _is_number(text: str, wanted: tuple[str, Fraction, str], *, is_stored: bool) -> bool:
    """Whether a text is the wanted number, up to what storing a number in a table changes."""
    said = _as_number(text)
    if said is None or not is_stored:
        return said == wanted
    return said[::2] == wanted[::2] and abs(said[1] - wanted[1]) <= _STORED_ERROR * abs(wanted[1])


def _last_boxed(text: str) -> str | None:
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


def _is_word(letter: re.Match[str]) -> bool:
    """Whether a matched letter is the article "a" or the pronoun "I": a word follows it, other than "or" and "and"."""
    return letter[1] in "aAiI" and _WORD_FOLLOWS.match(letter.string, letter.end(1)) is not None


def _contained_option(text: str, options: Sequence[str]) -> str | None:
    said = normalise_answer(text)
    wanted = [normalise_answer(option) for option in options]
    if wanted.count(said) == 1:
        return string.ascii_uppercase[wanted.index(said)]
    hits = [i for i, option in enumerate(wanted) if option and re.search(rf"(?<!\w){re.escape(option)}(?!\w)", said)]
    return string.ascii_uppercase[hits[0]] if len(hits) == 1 else None
