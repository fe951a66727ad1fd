"""/v1/responses: its requests as tasks, and answers as its bodies and events. Nothing is stored."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from looktwice.asking.events import Cropped
from looktwice.config import ServeConfig
from looktwice.server.chat import Texts
from looktwice.server.refusal import Refusal
from looktwice.server.schema import InputMessage, ReasoningItem, ResponsesRequest
from looktwice.server.service import Reply
from looktwice.server.task import Task, Turn, check_turns, generation_of, turn_of
from looktwice.server.trace import crop_event, finish_reason, trace_of, usage_of

PLACE = "input"
CROP_EVENT = "response.looktwice_crop"
"""Our own event, between OpenAI's."""


def task_of(request: ResponsesRequest, config: ServeConfig) -> Task:
    """What a request asks for. Raises Refusal for what cannot be done."""
    items = (
        [InputMessage.model_validate({"role": "user", "content": request.input})]
        if isinstance(request.input, str)
        else request.input
    )
    turns = tuple(
        turn_of(item, f"{PLACE}.{number}") for number, item in enumerate(items) if not isinstance(item, ReasoningItem)
    )
    if request.instructions:
        turns = (Turn(role="system", parts=(request.instructions,)), *turns)
    if not turns:
        raise Refusal("input: there is no message; write one of the user", param=PLACE)
    check_turns(turns, config, PLACE)
    effort = request.reasoning.effort if request.reasoning is not None else None
    thinking = {} if effort is None else {"enable_thinking": effort != "none"}
    generation = generation_of(request, config, max_new_tokens=request.max_output_tokens, **thinking)
    return Task(
        turns=turns,
        generation=generation,
        model=request.model,
        min_pixels=request.min_pixels,
        max_pixels=request.max_pixels,
        schema=schema_of(request),
        stop_texts=generation.stop_texts,
        crop_images=bool(request.crop_images),
        with_ids=bool(request.return_token_ids),
        is_streamed=bool(request.stream),
    )


def schema_of(request: ResponsesRequest) -> dict[str, Any] | bool | None:
    """The schema of the JSON that is asked for; None where any text is."""
    form = request.text.format if request.text is not None else None
    if form is None or form.type == "text":
        return None
    if form.type == "json_object":
        return True
    if form.json_schema is None:
        raise Refusal("text.format.schema is missing; give one", param="text")
    return form.json_schema


async def whole(reply: Reply) -> dict[str, Any]:
    """The body of a response that is not streamed."""
    text = Texts(reply.task.stop_texts)
    async for told in reply:
        text.add(told.event)
    return finished(reply, text)


def begun(reply: Reply) -> dict[str, Any]:
    """The body while nothing is written yet."""
    generation = reply.task.generation
    return {
        "id": f"resp_{reply.id}",
        "object": "response",
        "created_at": reply.created,
        "status": "in_progress",
        "background": False,
        "error": None,
        "incomplete_details": None,
        "instructions": None,
        "max_output_tokens": generation.max_new_tokens,
        "model": reply.model.name,
        "output": [],
        "parallel_tool_calls": False,
        "previous_response_id": None,
        "reasoning": {"effort": None, "summary": None},
        "store": False,
        "temperature": generation.sampling_temperature,
        "text": {"format": {"type": "text"}},
        "tool_choice": "none",
        "tools": [],
        "top_p": generation.top_p,
        "truncation": "disabled",
        "usage": None,
        "metadata": {},
    }


def finished(reply: Reply, text: Texts) -> dict[str, Any]:
    """The body of an answer that is whole, or that a limit ended."""
    [asked] = reply.asked
    assert asked.answer is not None
    is_cut = finish_reason(asked.answer.stop_reason) == "length"
    items = [_message_item(reply, text.content, "incomplete" if is_cut else "completed")]
    if text.reasoning:
        items.insert(0, _reasoning_item(reply, text.reasoning, "completed"))
    usage = usage_of([asked])
    told: dict[str, Any] = {
        "status": "incomplete" if is_cut else "completed",
        "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
        "output": items,
        "usage": {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": usage["prompt_tokens_details"],
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": usage["completion_tokens_details"],
            "total_tokens": usage["total_tokens"],
        },
        "looktwice": trace_of(asked.answer, reply.crop_images, is_json=reply.task.schema is not None),
    }
    if reply.task.with_ids:
        ids = asked.episode.trajectory
        told |= {"prompt_token_ids": ids.prompt_ids, "token_ids": ids.completion_ids}
    return {**begun(reply), **told}


async def events(reply: Reply) -> AsyncIterator[dict[str, Any]]:
    """The events of a streamed response."""
    numbers = iter(range(10**9))

    def event(kind: str, **fields: Any) -> dict[str, Any]:
        return {"type": kind, "sequence_number": next(numbers), **fields}

    yield event("response.created", response=begun(reply))
    yield event("response.in_progress", response=begun(reply))
    text, num_crops = Texts(reply.task.stop_texts), 0
    thinking, saying = _Item(reply, "reasoning"), _Item(reply, "message")
    place = 0
    async for told in reply:
        if isinstance(told.event, Cropped):
            num_crops += 1
            crop = crop_event(told.event.crop, num_crops, reply.crop_images)
            yield event(CROP_EVENT, output_index=place, looktwice=crop)
            continue
        for item, more in zip((thinking, saying), text.add(told.event)):
            if not more or (item is thinking and saying.place is not None):
                continue
            if item is saying and thinking.is_open:
                for fields in thinking.closing():
                    yield event(**fields)
                place += 1
            if item.place is None:
                for fields in item.opening(place):
                    yield event(**fields)
            yield event(**item.delta(more))
    for item in (thinking, saying):
        if item is saying and item.place is None:
            for fields in item.opening(place):
                yield event(**fields)
        if item.is_open:
            for fields in item.closing():
                yield event(**fields)
            place += 1
    body = finished(reply, text)
    yield event(f"response.{body['status']}", response=body)


class _Item:
    """An item of a streamed response: what is told when it begins, goes on and ends."""

    def __init__(self, reply: Reply, kind: str) -> None:
        self.reply = reply
        self.is_message = kind == "message"
        self.place: int | None = None
        self.is_open = False
        self.text = ""
        self.id = f"{'msg' if self.is_message else 'rs'}_{reply.id}"
        self.part_kind = "output_text" if self.is_message else "reasoning_text"

    def opening(self, place: int) -> list[dict[str, Any]]:
        self.place, self.is_open = place, True
        item = {**self._item("in_progress"), "content": []}
        return [
            {"kind": "response.output_item.added", "output_index": place, "item": item},
            {"kind": "response.content_part.added", **self._where(), "part": self._part("")},
        ]

    def delta(self, text: str) -> dict[str, Any]:
        self.text += text
        extra: dict[str, Any] = {"logprobs": []} if self.is_message else {}
        return {"kind": f"response.{self.part_kind}.delta", **self._where(), "delta": text, **extra}

    def closing(self) -> list[dict[str, Any]]:
        self.is_open = False
        extra: dict[str, Any] = {"logprobs": []} if self.is_message else {}
        return [
            {"kind": f"response.{self.part_kind}.done", **self._where(), "text": self.text, **extra},
            {"kind": "response.content_part.done", **self._where(), "part": self._part(self.text)},
            {"kind": "response.output_item.done", "output_index": self.place, "item": self._item("completed")},
        ]

    def _item(self, status: str) -> dict[str, Any]:
        make = _message_item if self.is_message else _reasoning_item
        return make(self.reply, self.text, status)

    def _where(self) -> dict[str, Any]:
        return {"item_id": self.id, "output_index": self.place, "content_index": 0}

    def _part(self, text: str) -> dict[str, Any]:
        return _text_part(text) if self.is_message else {"type": "reasoning_text", "text": text}


def _message_item(reply: Reply, text: str, status: str) -> dict[str, Any]:
    content = [_text_part(text)]
    return {"id": f"msg_{reply.id}", "type": "message", "role": "assistant", "status": status, "content": content}


def _reasoning_item(reply: Reply, text: str, status: str) -> dict[str, Any]:
    content = [{"type": "reasoning_text", "text": text}]
    return {"id": f"rs_{reply.id}", "type": "reasoning", "summary": [], "content": content, "status": status}


def _text_part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
