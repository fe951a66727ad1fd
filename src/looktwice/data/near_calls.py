"""Near-calls: four numbers in the wrapping of a call that are no call, and so train as text that no crop follows."""

from __future__ import annotations

import html
import re
import unicodedata
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import accumulate

from looktwice.calls import NUMBER, WRITTEN_CALL

_BEFORE, _AFTER = 240, 120
"""Characters before and after the numbers that are looked at."""
_BRACKETS = str.maketrans("【】〔〕「」《》〈〉⟨⟩«»", "[][][]<><><><>")

_NUMBER = rf"{NUMBER.pattern}(?: ?(?:%|px))?"
_GAP = (
    r"(?:[\s\"')\]}]{0,24}[,;|][\s(\[{\"']{0,24}|[\"']?\s{1,8}|[)\]}]{1,3}\s?[(\[{]{1,3}\s?|</\w{1,8}>\s{0,8}<\w{1,8}>)"
)
_LABEL = r"(?:[\"']?[A-Za-z]\w{0,15}[\"']?\s{0,2}[:=]\s{0,2}[\"']?)?"
_NUMBERS = re.compile(rf"(?<![\w.]){_NUMBER}(?:{_GAP}{_LABEL}{_NUMBER}){{3,}}")
"""Four numbers and more, in brackets or bare, with names or without: `[1, 2, 3, 4]`, `(1,2),(3,4)`, `x1="1" …`."""
_CLOSERS = re.compile(r"[\s\"')\]}`]{0,8}(?:</?\|?\w[^<>]{0,40}>)?")

_PLAIN_TAG = re.compile(
    r"box|ref|point|quad|answer|think|image|img|video|audio|tool_response"
    r"|a|b|i|u|p|s|em|strong|code|pre|br|hr|t[dhr]|table|thead|tbody|[uod]l|li|d[dt]|h[1-6]|span|div|sub|sup|mark|html|body"
    r"|math|m(?:row|t[dr]|table|[nio]|frac|sup|sub)|svg|g|rect|path|line|polygon|polyline|circle|ellipse|area",
    re.IGNORECASE,
)
"""Tags in which four numbers are an answer, or the words of a page: the model's own grounding, and HTML."""

_VERB = r"(?:\w{0,30}(?:crop(?!p)|zoom(?!ed|ing))\w{0,30})"
_ACT = rf"(?:{_VERB}|\w{{0,30}}(?:tool|function)[ _-]?call\w{{0,30}})"
_OPEN = r"[\s(\[{\"'`]{0,6}"
_LABELLED = rf"{_OPEN}{_LABEL}{_OPEN}"
_TAG = re.compile(
    rf"<(?:<?\|?|\s(?={_ACT}))(?P<name>[A-Za-z][\w.:-]*)[^<>]{{0,100}}>{{1,2}}(?P<words>[^<>]{{0,80}})\Z", re.IGNORECASE
)
_IN_TAG = re.compile(r"<\|?(?P<name>[A-Za-z][\w.:-]*)\b[^<>]{0,100}\Z")
_OPENERS = re.compile(_LABELLED)
_TAG_CLOSES = re.compile(r"[^<>]{0,80}<[/|]")
_IN_TAG_CLOSES = re.compile(r"[\s\"')\]}/|]{0,8}>")
_COMMAND = re.compile(r"\{\s*[A-Za-z][^{}\[\]:=]{0,80}[\[(]{1,3}\s?\Z")
_CALL_KEY = re.compile(
    r"crop(?!p)|zoom(?!ed|ing)|bbox|tool|\b(?:box|region|rect\w*|roi|coord\w*|arguments|parameters|x_?1|x_?min|left)\b",
    re.IGNORECASE,
)
_LATEX_COMMAND = re.compile(r"\\[A-Za-z]+(?:\{[^{}]*\})?\Z")
_WRAPPINGS = tuple(
    re.compile(pattern + r"\Z", re.IGNORECASE)
    for pattern in (
        # crop(1, 2, 3, 4), image.crop((1, 2, 3, 4)), look_at(label="cup", bbox=[1, 2, 3, 4])
        r"\b[\w.]*(?:crop|zoom|bbox|magnif|enlarg|region|focus|look|inspect|cut_?out|(?<![a-z])(?:box|tool))[\w.]*"
        r"\([^()<>]{0,100}" + _OPEN,
        # crop[1, 2, 3, 4], crop = [1, 2, 3, 4], "bbox_2d": [1, 2, 3, 4], @crop 1 2 3 4
        rf"\b{_VERB}(?:[\[|#<]|\s?[={{]\s?){_LABELLED}",
        rf"\bbbox_2d[\"']?\s?[:=]\s?{_OPEN}",
        rf"[@/!#\\`§](?:{_ACT}|tool)[\s:={{]{{0,3}}{_LABELLED}",
        # [Crop tile [1, 2, 3, 4]], (zoom: 1, 2, 3, 4), [tool_call] [1, 2, 3, 4]
        rf"[\[(]\s?{_ACT}\b[^\[\]()<>]{{0,80}}{_OPEN}",
        rf"\[/?\s?(?:{_ACT}|\w*(?:tool|action|function)\w*)[^\[\]]{{0,40}}\]{{1,2}}[^<>\[\]{{}}]{{0,40}}{_OPEN}",
        # Action: crop, Action Input: [1, 2, 3, 4]; at the start of a line
        r"(?:\A|\n)[\s>*#-]{0,8}(?:action|tool|function)(?:[ _-]?(?:input|calls?|args?|arguments?|parameters?|use))?"
        rf"\*{{0,2}}\s?[:=][\w\s`*.,:\"'=-]{{0,60}}{_OPEN}",
        # crop: 1, 2, 3, 4; at the start of a line
        rf"(?:\A|[\n`>])[\s*#-]{{0,8}}{_VERB}\*{{0,2}}[\s:]{{1,3}}{_LABELLED}",
        # Crop cup 1 [1, 2, 3, 4]; at the start of a sentence
        rf"(?:\A|[\n`>'\"\u2018\u201c]|[.!?:]\s)[\s*#-]{{0,8}}(?:[0-9]{{1,2}}[.)]\s?)?\*{{0,2}}{_VERB}\b"
        r"[^.!?\[\](){}<>\n]{0,80}\[{1,3}\s?",
    )
)
_LOOSE = re.compile(
    rf"<\|?{_ACT}\b[^<>]{{0,40}}>[^<>]{{0,160}}</|\{{\s?{_VERB}\b[^{{}}]{{0,160}}\}}|\b{_VERB}\([^()]{{0,160}}\)"
    r"|(?:<\|?(?:(?:loc|bin|coord|box|[xy])[_-]?)?[0-9]{1,4}\|?>\s?){4}",
    re.IGNORECASE,
)
"""A wrapping that none but a call has, in which four numbers may be written in any way: `<crop>1-2 to 3-4</crop>`."""
_BOX_TAG = re.compile(r"<(/?)box>", re.IGNORECASE)
_SPEAKS_OF_CALL = re.compile("crop|zoom|tool", re.IGNORECASE)
_ANY_NUMBER = re.compile(r"[0-9]+(?:\.[0-9]+)?")
_ANSWER = re.compile(r"<answer>(?:(?!</?answer>).)*</answer>", re.IGNORECASE | re.DOTALL)


def near_calls(text: str) -> list[str]:
    """The pieces of an assistant's text that look like calls and are none, in order.

    Each holds four numbers in what a call could be wrapped in: a tag or a special token that is not of grounding or of
    HTML, the brackets of a function, a command in braces or brackets, JSON that names a tool or a box. Numbers in
    prose, tables and the model's own `<box>` are none. In an answer block only what speaks of a crop or a tool is.
    """
    text = unicodedata.normalize("NFKC", html.unescape(WRITTEN_CALL.sub("\n", text))).translate(_BRACKETS)
    text = _BOX_TAG.sub(lambda tag: "]" if tag[1] else " [", text)
    found = {start: piece for start, piece in _wrapped(text)}
    starts = sorted(found)
    ends = [*accumulate((start + len(found[start]) for start in starts), max)]
    for loose in _LOOSE.finditer(text):
        num_before = bisect_left(starts, loose.end())
        is_known = num_before and loose.start() < ends[num_before - 1]
        if not is_known and len(_ANY_NUMBER.findall(loose[0])) >= 4:
            found[loose.start()] = loose[0]
    answers = [block.span() for block in _ANSWER.finditer(text)]
    return [
        piece.strip()
        for start, piece in sorted(found.items())
        if _SPEAKS_OF_CALL.search(piece) or not _is_within(start, answers)
    ]


def _is_within(place: int, spans: Sequence[tuple[int, int]]) -> bool:
    """Whether a place lies inside one of several spans, which are in order and apart."""
    number = bisect_left(spans, (place, 0)) - 1
    return number >= 0 and spans[number][0] < place < spans[number][1]


def _wrapped(text: str) -> Iterator[tuple[int, str]]:
    """Where the wrapping of four numbers begins, and all of it; the first of several in one wrapping."""
    known: set[int] = set()
    for numbers in _NUMBERS.finditer(text):
        first = max(0, numbers.start() - _BEFORE)
        before, after = text[first : numbers.start()], text[numbers.end() : numbers.end() + _AFTER]
        start = next(_wrappings(before, after), None)
        if start is not None and first + start not in known:
            known.add(first + start)
            yield first + start, before[start:] + numbers[0] + _CLOSERS.match(after)[0]  # type: ignore[index]


def _wrappings(before: str, after: str) -> Iterator[int]:
    """Where in `before` a wrapping begins that the numbers between the two texts stand in."""
    tag, in_tag = _TAG.search(before), _IN_TAG.search(before)
    if tag and not _PLAIN_TAG.fullmatch(tag["name"]) and (_OPENERS.fullmatch(tag["words"]) or _TAG_CLOSES.match(after)):
        yield tag.start()
    if in_tag and not _PLAIN_TAG.fullmatch(in_tag["name"]) and _IN_TAG_CLOSES.match(after):
        yield in_tag.start()
    yield from _braces(before, after)
    for wrapping in _WRAPPINGS:
        if match := wrapping.search(before):
            yield match.start()


def _braces(before: str, after: str) -> Iterator[int]:
    """Where the outermost brace begins that is open before the numbers, if a command or the JSON of a call is in it."""
    depth, start = 0, None
    for place in range(len(before) - 1, -1, -1):
        depth += (before[place] == "}") - (before[place] == "{")
        if depth < 0:
            depth, start = 0, place
    if start is None or _LATEX_COMMAND.search(before[:start]):
        return
    if _COMMAND.match(before[start:]) or _CALL_KEY.search(before[start:] + after.partition("}")[0]):
        yield start
