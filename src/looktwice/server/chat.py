"""/v1/chat/completions: its requests as tasks, and answers as its bodies and chunks."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from looktwice.asking.events import Cropped, Done, Said, Thinking
from looktwice.config import ServeConfig
from looktwice.server.letters import Trimmer, logprobs_of
from looktwice.server.refusal import Refusal
from looktwice.server.schema import ChatRequest
from looktwice.server.service import Reply
from looktwice.server.task import Task, check_turns, generation_of, turn_of
from looktwice.server.trace import crop_event, finish_reason, trace_of, usage_of

PLACE = "messages"


def task_of(request: ChatRequest, config: ServeConfig) -> Task:
    """What a request asks for. Raises Refusal for what cannot be done."""
    turns = tuple(turn_of(message, f"{PLACE}.{number}") for number, message in enumerate(request.messages))
    check_turns(turns, config, PLACE)
    count = request.n or 1
    if count > config.max_choices:
        raise Refusal(f"n is {count}, and this server gives at most {config.max_choices}", param="n")
    if request.top_logprobs:
        raise Refusal(
            "top_logprobs: the engine tells the logprob of what was drawn alone; ask for logprobs without it",
            param="top_logprobs",
            code="unsupported",
        )
    if request.stream_options is not None and not request.stream:
        raise Refusal("stream_options without stream; leave it out, or set stream", param="stream_options")
    stops = request.stop if isinstance(request.stop, list) else [request.stop] if request.stop else []
    thinking = {} if request.reasoning_effort is None else {"enable_thinking": request.reasoning_effort != "none"}
    generation = generation_of(
        request,
        config,
        max_new_tokens=request.max_completion_tokens or request.max_tokens,
        presence_penalty=request.presence_penalty,
        stop_texts=tuple(stops) or None,
        **thinking,
    )
    return Task(
        turns=turns,
        generation=generation,
        model=request.model,
        count=count,
        min_pixels=request.min_pixels,
        max_pixels=request.max_pixels,
        schema=schema_of(request),
        stop_texts=generation.stop_texts,
        crop_images=bool(request.crop_images),
        with_ids=bool(request.return_token_ids),
        with_logprobs=bool(request.logprobs),
        is_streamed=bool(request.stream),
        with_usage=bool(request.stream_options and request.stream_options.include_usage),
    )


def schema_of(request: ChatRequest) -> dict[str, Any] | bool | None:
    """The schema of the JSON that is asked for; None where any text is."""
    form = request.response_format
    if form is None or form.type == "text":
        return None
    if form.type == "json_object":
        return True
    if form.json_schema is None or form.json_schema.json_schema is None:
        raise Refusal("response_format.json_schema.schema is missing; give one", param="response_format")
    return form.json_schema.json_schema


async def whole(reply: Reply) -> dict[str, Any]:
    """The body of a response that is not streamed."""
    texts = [Texts(reply.task.stop_texts) for _ in range(reply.task.count)]
    async for told in reply:
        texts[told.number].add(told.event)
    choices = [_choice(reply, number, text) for number, text in enumerate(texts)]
    ids = {"prompt_token_ids": reply.asked[0].request.prompt.input_ids} if reply.task.with_ids else {}
    return {**_head(reply, "chat.completion"), "choices": choices, "usage": usage_of([*reply.asked]), **ids}


class Texts:
    """What an answer has said and thought so far; the stop text that ended it, and blanks at its ends, left out."""

    def __init__(self, stop_texts: tuple[str, ...]) -> None:
        self.said, self.thought = Trimmer(stop_texts), Trimmer(stop_texts)
        self.content = self.reasoning = ""
        self.tokens: list[tuple[int, float]] = []

    def add(self, event: Any) -> tuple[str, str]:
        """More of what was thought and of what was said, now that this happened."""
        reasoning = content = ""
        if isinstance(event, Thinking):
            reasoning = self.thought.add(event.text)
        elif isinstance(event, Said):
            content = self.said.add(event.text)
            self.tokens += event.tokens
        elif isinstance(event, Done):
            reasoning, content = self.thought.end(), self.said.end()
        self.reasoning += reasoning
        self.content += content
        return reasoning, content


async def chunks(reply: Reply) -> AsyncIterator[dict[str, Any]]:
    """The chunks of a streamed response."""
    head = _head(reply, "chat.completion.chunk")
    task = reply.task
    if task.with_usage:
        head["usage"] = None
    for number in range(task.count):
        first = {"role": "assistant", "content": ""}
        ids = {"prompt_token_ids": reply.asked[0].request.prompt.input_ids} if task.with_ids and not number else {}
        yield {**head, **ids, "choices": [{"index": number, "delta": first, "logprobs": None, "finish_reason": None}]}
    texts = [Texts(task.stop_texts) for _ in range(task.count)]
    num_crops = [0] * task.count
    async for told in reply:
        number, event, text = told.number, told.event, texts[told.number]
        choice: dict[str, Any] = {"index": number, "delta": {}, "logprobs": None, "finish_reason": None}
        if isinstance(event, Cropped):
            num_crops[number] += 1
            told_crop = crop_event(event.crop, num_crops[number], reply.crop_images)
            yield {**head, "choices": [{**choice, "looktwice": told_crop}]}
            continue
        reasoning, content = text.add(event)
        if reasoning:
            delta = {"reasoning": reasoning, "reasoning_content": reasoning}
            yield {**head, "choices": [{**choice, "delta": delta}]}
        if content:
            logprobs = None
            if task.with_logprobs:
                logprobs, text.tokens = logprobs_of(text.tokens, reply.asked[number].episode.processor.decode), []
            yield {**head, "choices": [{**choice, "delta": {"content": content}, "logprobs": logprobs}]}
        if isinstance(event, Done):
            ids = {"token_ids": reply.asked[number].episode.trajectory.completion_ids} if task.with_ids else {}
            trace = trace_of(event.answer, reply.crop_images, is_json=task.schema is not None)
            reason = finish_reason(event.answer.stop_reason)
            yield {**head, "choices": [{**choice, "finish_reason": reason, "looktwice": trace, **ids}]}
    if task.with_usage:
        yield {**head, "choices": [], "usage": usage_of([*reply.asked])}


def _head(reply: Reply, kind: str) -> dict[str, Any]:
    return {"id": f"chatcmpl-{reply.id}", "object": kind, "created": reply.created, "model": reply.model.name}


def _choice(reply: Reply, number: int, text: Texts) -> dict[str, Any]:
    asked = reply.asked[number]
    assert asked.answer is not None
    reasoning = text.reasoning or None
    message = {"role": "assistant", "content": text.content, "refusal": None}
    message |= {"reasoning": reasoning, "reasoning_content": reasoning}
    logprobs = logprobs_of(text.tokens, asked.episode.processor.decode) if reply.task.with_logprobs else None
    choice = {
        "index": number,
        "message": message,
        "logprobs": logprobs,
        "finish_reason": finish_reason(asked.answer.stop_reason),
        "looktwice": trace_of(asked.answer, reply.crop_images, is_json=reply.task.schema is not None),
    }
    return {**choice, "token_ids": asked.episode.trajectory.completion_ids} if reply.task.with_ids else choice
