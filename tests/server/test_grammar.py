"""Answers by a schema: always JSON that fits, after thinking and crops, whatever the model would rather write."""

from __future__ import annotations

import json

import openai
import pytest
import torch

from looktwice.config import AnswerConfig
from looktwice.processing.processor import Ovis2_5Processor
from looktwice.server.grammar import LONGEST_CALL, Grammars
from looktwice.server.refusal import Refusal

SCHEMA = {
    "type": "object",
    "properties": {"tile": {"enum": ["red", "blue"]}, "digit": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["tile", "digit"],
    "additionalProperties": False,
}
FORM = {"type": "json_schema", "json_schema": {"name": "seen", "schema": SCHEMA}}


@pytest.mark.parametrize("thinking", [False, True])
@pytest.mark.parametrize("temperature", [0.0, 3.0])
def test_a_model_that_writes_anything_still_answers_by_the_schema(tiny, question, thinking, temperature) -> None:
    told = tiny.client.chat.completions.create(
        model="tiny",
        messages=question,
        n=3,
        seed=1,
        temperature=temperature,
        max_tokens=120,
        response_format=FORM,
        extra_body={"thinking": thinking, "thinking_budget": 6, "crops": False},
    )
    for choice in told.choices:
        assert choice.finish_reason == "stop"
        seen = json.loads(choice.message.content)
        assert {*seen} == {"tile", "digit"} and seen["tile"] in ("red", "blue") and 0 <= seen["digit"] <= 9
        assert bool(choice.message.reasoning) == thinking


def test_a_schema_holds_in_a_stream_and_beside_answers_without(tiny, question) -> None:
    asked = {"model": "tiny", "messages": question, "max_tokens": 60, "extra_body": {"thinking": False}}
    plain = tiny.client.chat.completions.create(**asked).choices[0].message.content
    stream = tiny.client.chat.completions.create(**asked, response_format=FORM, stream=True)
    beside = tiny.client.chat.completions.create(**asked).choices[0].message.content
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert {*json.loads(text)} == {"tile", "digit"} and beside == plain


@pytest.mark.parametrize(
    "schema", [{"type": "nonsense"}, {"$ref": "#/none"}, False, {"pattern": "(", "type": "string"}]
)
def test_a_schema_that_cannot_be_followed_is_refused(tiny, question, schema) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    with pytest.raises(openai.BadRequestError, match="schema"):
        tiny.client.chat.completions.create(model="tiny", messages=question, response_format=form)


def test_a_schema_that_is_too_long_is_refused(processor) -> None:
    with pytest.raises(Refusal, match="longer than"):
        Grammars().mask({"enum": ["x" * 200_000]}, processor, AnswerConfig())


def test_a_call_may_stand_before_the_json_until_one_is_refused(processor) -> None:
    template = processor.template
    mask = Grammars().mask(SCHEMA, processor, AnswerConfig(enable_thinking=False))
    opening, closing = template.token_id("<tool_call>"), template.token_id("</tool_call>")
    brace = template.encode("{")[0]

    def may(token: int) -> bool:
        allowed = mask.allowed()
        assert isinstance(allowed, torch.Tensor) and allowed.dtype == torch.bool
        return bool(allowed[token])

    assert may(opening) and may(brace) and not may(template.encode("I")[0])
    mask.take(opening)
    assert may(template.encode("[")[0]) and not may(template.turn_close_id)
    mask.take(closing)
    mask.put_in([processor.config.image_token_id])
    assert may(opening) and may(brace)
    mask.take(opening)
    mask.put_in(template.encode("<tool_response>no more</tool_response>"))
    assert not may(opening) and may(brace)
    mask.take(brace)
    assert not may(opening)


def test_thinking_comes_first_and_is_free(processor) -> None:
    template = processor.template
    mask = Grammars().mask(True, processor, AnswerConfig())
    opened, closed = template.token_id("<think>"), template.token_id("</think>")
    assert mask.allowed().nonzero().flatten().tolist() == [opened]
    mask.take(opened)
    assert mask.allowed().sum() == len(mask.allowed()) - len(processor.end_ids)
    mask.take(closed)
    assert not mask.allowed()[template.encode("a")[0]] and mask.allowed()[template.encode("{")[0]]


def test_a_model_that_has_thought_calls_no_more(processor: Ovis2_5Processor) -> None:
    mask = Grammars().mask(SCHEMA, processor, AnswerConfig(enable_thinking=True))
    mask.take(mask.think_open)
    assert mask.allowed()[mask.call_open]
    mask.take(mask.think_close)
    assert not mask.allowed()[mask.call_open] and mask.allowed().any()


def test_a_call_in_place_of_the_json_holds_no_tags_and_is_closed_in_time(processor: Ovis2_5Processor) -> None:
    mask = Grammars().mask(SCHEMA, processor, AnswerConfig(enable_thinking=False))
    mask.take(mask.call_open)
    for _ in range(LONGEST_CALL):
        allowed = mask.allowed()
        assert allowed[mask.call_close] and not allowed[[mask.think_close, mask.call_open, *mask.end_ids]].any()
        mask.take(5)
    assert mask.allowed().nonzero().tolist() == [[mask.call_close]]
