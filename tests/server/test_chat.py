"""Chat completions through OpenAI's own client: whole and streamed, with thinking, crops and the trace."""

from __future__ import annotations

import pytest

from looktwice.server.letters import Trimmer

CALL = "<tool_call>red tile [20, 30, 100, 90]</tool_call>"
LOOKS = f"<think>\nLeft. {CALL}It says 3.\n</think>\n\n<answer>3</answer><|im_end|>"


def test_an_answer_has_its_crop_thinking_and_usage_apart(play, question) -> None:
    with play(LOOKS) as running:
        told = running.client.chat.completions.create(
            model="tiny", messages=question, extra_body={"return_token_ids": True, "crop_images": True}
        )
    [choice] = told.choices
    assert choice.message.content == "3" and choice.finish_reason == "stop"
    assert choice.message.reasoning == choice.message.reasoning_content == "Left. It says 3."
    [crop] = choice.looktwice["crops"]
    assert crop["box"] == [20, 30, 100, 90] and crop["image"] == 1 and crop["label"] == "red tile"
    assert crop["image_url"].startswith("data:image/png;base64,")
    assert choice.looktwice["stop_reason"] == "answered" and choice.looktwice["parsed"]["answer_content"] == "3"
    tokens = choice.looktwice["tokens"]
    assert (
        told.usage.completion_tokens == tokens["written"] == sum(i >= 0 for i in choice.token_ids) - tokens["crops"] - 2
    )
    assert (
        told.usage.prompt_tokens == tokens["prompt"] + tokens["crops"] == len(told.prompt_token_ids) + tokens["crops"]
    )
    assert 0 < told.usage.completion_tokens_details.reasoning_tokens < tokens["written"]


def test_a_stream_tells_the_same_as_the_whole(play, question) -> None:
    with play(LOOKS) as running:
        whole = running.client.chat.completions.create(model="tiny", messages=question, n=2)
        chunks = [
            *running.client.chat.completions.create(
                model="tiny", messages=question, n=2, stream=True, stream_options={"include_usage": True}
            )
        ]
    *chunks, usage = chunks
    assert usage.choices == [] and usage.usage.completion_tokens == whole.usage.completion_tokens
    assert all(chunk.usage is None for chunk in chunks)
    for number, choice in enumerate(whole.choices):
        own = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == number]
        assert own[0].delta.role == "assistant"
        assert "".join(one.delta.content or "" for one in own) == choice.message.content
        thought = "".join(getattr(one.delta, "reasoning", None) or "" for one in own)
        assert thought == choice.message.reasoning
        events = [one.looktwice for one in own if getattr(one, "looktwice", None)]
        assert [event["type"] for event in events] == ["crop", "trace"]
        assert events[0]["box"] == [20, 30, 100, 90] and events[0]["number"] == 1
        assert events[1]["response"] == choice.looktwice["response"]
        assert [one.finish_reason for one in own if one.finish_reason] == ["stop"]


def test_the_crop_comes_between_the_thinking_before_and_after_it(play, question) -> None:
    with play(LOOKS) as running:
        stream = running.client.chat.completions.create(model="tiny", messages=question, stream=True)
        choices = [chunk.choices[0] for chunk in stream]
    place = next(i for i, one in enumerate(choices) if (getattr(one, "looktwice", None) or {}).get("type") == "crop")
    before = "".join(getattr(one.delta, "reasoning", None) or "" for one in choices[:place])
    assert before.strip() == "Left."


def test_thinking_and_crops_can_be_off(play, question) -> None:
    with play(LOOKS) as running:
        told = running.client.chat.completions.create(model="tiny", messages=question, extra_body={"crops": False})
        assert [crop["error"] for crop in told.choices[0].looktwice["crops"]] == ["switched_off"]
    with play("Three.<|im_end|>") as running:
        told = running.client.chat.completions.create(
            model="tiny", messages=question, extra_body={"thinking": False, "return_token_ids": True}
        )
    closed = running.service.models.default.processor.template.token_id("</think>")
    assert closed in told.prompt_token_ids
    assert told.choices[0].message.content == "Three." and told.choices[0].message.reasoning is None


def test_a_limit_is_told_as_length(play, question) -> None:
    with play(LOOKS) as running:
        told = running.client.chat.completions.create(model="tiny", messages=question, max_tokens=4)
        assert told.choices[0].finish_reason == "length" and told.usage.completion_tokens == 4
        told = running.client.chat.completions.create(
            model="tiny", messages=question, extra_body={"thinking_budget": 3, "max_tokens": 60}
        )
        assert "Considering the limited time" in told.choices[0].message.reasoning


def test_earlier_answers_are_sent_back_without_their_thinking(play, question) -> None:
    content = f"<think>secret two</think>{CALL}3"
    earlier = {"role": "assistant", "content": content, "reasoning": "secret one", "reasoning_content": "secret one"}
    messages = [*question, earlier, {"role": "user", "content": "Sure?"}]
    with play("Yes.<|im_end|>") as running:
        told = running.client.chat.completions.create(
            model="tiny", messages=messages, extra_body={"return_token_ids": True}
        )
        written = running.service.models.default.processor.decode(told.prompt_token_ids)
    assert (
        "secret" not in written and "tool_call" not in written and written.count("assistant\n") == 2 and "3" in written
    )


def test_logprobs_are_those_of_what_is_said(play, question) -> None:
    with play(LOOKS) as running:
        whole = running.client.chat.completions.create(model="tiny", messages=question, logprobs=True)
        entries = whole.choices[0].logprobs.content
        assert "".join(entry.token for entry in entries).strip().endswith("3")
        assert all(entry.logprob == -0.5 and bytes(entry.bytes).decode() == entry.token for entry in entries)
        stream = running.client.chat.completions.create(model="tiny", messages=question, logprobs=True, stream=True)
        told = [chunk.choices[0].logprobs for chunk in stream]
        streamed = [entry for one in told if one is not None for entry in one.content]
    assert [one.token for one in streamed] == [one.token for one in entries]


def test_the_small_model_answers_the_same_alone_and_among_others(tiny, question) -> None:
    alone = tiny.client.chat.completions.create(model="tiny", messages=question, max_tokens=12)
    several = tiny.client.chat.completions.create(model="tiny", messages=question, max_tokens=12, n=3)
    assert {choice.message.content for choice in several.choices} == {alone.choices[0].message.content}
    drawn = [
        tiny.client.chat.completions.create(model="tiny", messages=question, max_tokens=12, temperature=1.5, seed=seed)
        .choices[0]
        .looktwice["response"]
        for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1]


def test_a_stop_text_ends_the_answer_and_is_not_told(tiny, question) -> None:
    asked = {"model": "tiny", "messages": question, "max_tokens": 12}
    plain = tiny.client.chat.completions.create(**asked).choices[0].message.content
    assert " " in plain
    told = tiny.client.chat.completions.create(**asked, stop=[" "])
    assert told.choices[0].message.content == plain.split(" ")[0] and told.choices[0].finish_reason == "stop"
    assert told.choices[0].looktwice["stop_reason"] == "stop_text"


@pytest.mark.parametrize(
    "pieces, stops, told",
    [
        ([" a", " b ", " "], (), ["a", " b", ""]),
        (["ab", "cSTO", "Pd"], ("STOP",), ["ab", "c", ""]),
        (["ab", "cSTO", "d"], ("STOP",), ["ab", "c", "STOd"]),
        (["a\n", "\n", "b"], (), ["a", "", "\n\nb"]),
    ],
)
def test_a_trimmer_holds_back_blanks_and_what_may_become_a_stop_text(pieces, stops, told) -> None:
    trimmer = Trimmer(stops)
    assert [trimmer.add(piece) for piece in pieces] == told
    assert trimmer.end() == ""
