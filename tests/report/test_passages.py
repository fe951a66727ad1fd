"""Answers as people read them: no tags, calls by themselves."""

from __future__ import annotations

import pytest

from looktwice.report.passages import passages_of

CALL = "<tool_call>[1, 2, 30, 40]</tool_call>"


@pytest.mark.parametrize(
    ("text", "passages"),
    [
        ("Yes.", [("text", "Yes.")]),
        ("", []),
        ("<think>\n\n</think>\n\nYes.", [("text", "Yes.")]),
        ("<think>\na\n</think>\n\nso <answer>b</answer>.",
         [("thinking", "a"), ("text", "so"), ("answer", "b"), ("text", ".")]),
        (f"<think>look {CALL}\nread</think><answer>3</answer>",
         [("thinking", "look"), ("call", "[1, 2, 30, 40]"), ("thinking", "read"), ("answer", "3")]),
        (f"{CALL}{CALL}", [("call", "[1, 2, 30, 40]")] * 2),
        # the tag that opens may be in the prompt; one that closes may be missing
        ("a</think>b", [("thinking", "a"), ("text", "b")]),
        ("<think>a", [("thinking", "a")]),
        ("<answer>a", [("answer", "a")]),
        ("<ANSWER>a</Answer>", [("answer", "a")]),
        # the tool's own words, in the middle of thinking and outside
        ("<think>a <tool_call>x</tool_call><tool_response>No box.</tool_response> b",
         [("thinking", "a"), ("call", "x"), ("tool", "No box."), ("thinking", "b")]),
        ("<tool_response>No box.</tool_response>b", [("tool", "No box."), ("text", "b")]),
        # calls that the tool refuses are calls all the same
        ("a</tool_call>b", [("text", "a"), ("call", ""), ("text", "b")]),
        ("a <tool_call>b <tool_call>[1]</tool_call>", [("text", "a <tool_call>b"), ("call", "[1]")]),
    ],
)  # fmt: skip
def test_tags_become_kinds(text: str, passages: list[tuple[str, str]]) -> None:
    assert list(passages_of(text)) == passages
