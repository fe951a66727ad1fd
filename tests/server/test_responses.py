"""The responses endpoint through OpenAI's own client."""

from __future__ import annotations

import openai
import pytest
from tests.server.conftest import url_of
from tests.server.test_chat import LOOKS

SCHEMA = {
    "type": "object",
    "properties": {"digit": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["digit"],
    "additionalProperties": False,
}


@pytest.fixture
def asked(image) -> list[dict]:  # type: ignore[no-untyped-def]
    shown = {"type": "input_image", "image_url": url_of(image), "detail": "auto"}
    return [{"role": "user", "content": [shown, {"type": "input_text", "text": "What does it say?"}]}]


def test_a_response_has_reasoning_message_and_trace(play, asked) -> None:
    with play(LOOKS) as running:
        told = running.client.responses.create(model="tiny", input=asked, instructions="Be brief.")
    assert told.output_text == "3" and told.status == "completed"
    assert [item.type for item in told.output] == ["reasoning", "message"]
    assert told.output[0].content[0].text == "Left. It says 3."
    assert told.looktwice["crops"][0]["box"] == [20, 30, 100, 90]
    assert told.usage.total_tokens == told.usage.input_tokens + told.usage.output_tokens


def test_its_items_may_be_sent_back(play, asked) -> None:
    with play(LOOKS) as running:
        first = running.client.responses.create(model="tiny", input=asked)
        history = [*asked, *(item.model_dump(exclude_unset=True) for item in first.output)]
        second = running.client.responses.create(
            model="tiny",
            input=[*history, {"role": "user", "content": "Sure?"}],
            extra_body={"return_token_ids": True},
        )
        written = running.service.models.default.processor.decode(second.prompt_token_ids)
    assert "It says 3" not in written and "assistant\n3<|im_end|>" in written


def test_a_stream_of_events_tells_the_same(play, asked) -> None:
    with play(LOOKS) as running:
        events = [*running.client.responses.create(model="tiny", input=asked, stream=True)]
    kinds = [event.type for event in events]
    assert kinds[:2] == ["response.created", "response.in_progress"] and kinds[-1] == "response.completed"
    assert [event.sequence_number for event in events] == [*range(len(events))]
    for kind, text in (("reasoning_text", "Left. It says 3."), ("output_text", "3")):
        assert "".join(event.delta for event in events if event.type == f"response.{kind}.delta") == text
        assert [event.text for event in events if event.type == f"response.{kind}.done"] == [text]
    [crop] = [event for event in events if event.type == "response.looktwice_crop"]
    assert crop.looktwice["box"] == [20, 30, 100, 90]
    added = [event for event in events if event.type == "response.output_item.added"]
    assert [(event.output_index, event.item.type) for event in added] == [(0, "reasoning"), (1, "message")]
    assert events[-1].response.output_text == "3"


def test_a_limit_and_an_error_are_told(play, asked) -> None:
    with play(LOOKS) as running:
        told = running.client.responses.create(model="tiny", input=asked, max_output_tokens=3)
        assert told.status == "incomplete" and told.incomplete_details.reason == "max_output_tokens"
        with pytest.raises(openai.BadRequestError, match="no message"):
            running.client.responses.create(model="tiny", input=[{"type": "reasoning", "id": "a", "summary": []}])
        with pytest.raises(openai.BadRequestError):
            running.client.responses.create(model="tiny", input="Hi", previous_response_id="resp_1")


def test_its_text_may_keep_to_a_schema(tiny, asked) -> None:
    form = {"format": {"type": "json_schema", "name": "answer", "schema": SCHEMA}}
    told = tiny.client.responses.create(model="tiny", input=asked, text=form, extra_body={"thinking": False})
    assert told.output_text.replace(" ", "").startswith('{"digit":') and told.status == "completed"
