"""Conversations to ids and who wrote each."""

from __future__ import annotations

import pytest
from PIL import Image
from transformers import PreTrainedTokenizerFast

from looktwice.errors import CheckpointError
from looktwice.messages import Conversation, ImagePart, Message, TextPart, VideoPart, assistant, system, user
from looktwice.processing.chat_template import EARLY_STOP, ChatTemplate, Span
from looktwice.processing.processor import Ovis2_5Processor

IMAGE = ImagePart(source=Image.new("RGB", (16, 16)))


@pytest.fixture(scope="module")
def template(processor: Ovis2_5Processor) -> ChatTemplate:
    return processor.template


def written(template: ChatTemplate, spans: list[Span]) -> str:
    """The spans as text, each picture as `<picture N>`."""
    return "".join(
        template.tokenizer.decode(span.ids) if span.image_number is None else f"<picture {span.image_number}>"
        for span in spans
    )


def train(template: ChatTemplate, *messages: Message) -> list[Span]:
    return template.spans(Conversation(messages=messages), purpose="train")


def prompt(template: ChatTemplate, *messages: Message, thinking: bool = True) -> str:
    spans = template.spans(Conversation(messages=messages), purpose="prompt", thinking=thinking)
    assert not any(span.is_trained for span in spans)
    return written(template, spans)


def trained_text(template: ChatTemplate, spans: list[Span]) -> list[str]:
    return [written(template, [span]) for span in spans if span.is_trained and span.ids]


# -- prompts


def test_a_prompt_ends_where_the_assistant_begins(template: ChatTemplate) -> None:
    wanted = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert prompt(template, system("Be brief."), user("Hi")) == wanted


def test_without_thinking_the_empty_think_block_is_already_written(template: ChatTemplate) -> None:
    wanted = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    assert prompt(template, user("Hi"), thinking=False) == wanted


def test_past_answers_of_a_prompt_get_no_think_block(template: ChatTemplate) -> None:
    wanted = (
        "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n"
        "<|im_start|>user\nR<|im_end|>\n<|im_start|>assistant\n"
    )
    assert prompt(template, user("Q"), assistant("A"), user("R")) == wanted


def test_a_user_s_parts_stand_on_lines_of_their_own(template: ChatTemplate) -> None:
    parts = (IMAGE, TextPart(text="One."), TextPart(text="Two."), IMAGE, IMAGE, TextPart(text="Three."))
    wanted = "user\n<picture 0>\nOne.\nTwo.\n<picture 1>\n<picture 2>\nThree.<|im_end|>"
    assert wanted in prompt(template, Message(role="user", parts=parts))


def test_a_video_stands_where_an_image_would(template: ChatTemplate) -> None:
    video = VideoPart(source=[IMAGE.source])  # type: ignore[list-item]
    parts = (TextPart(text="One."), video, TextPart(text="Two."))
    assert "user\nOne.\n<picture 0>\nTwo.<|im_end|>" in prompt(template, Message(role="user", parts=parts))


def test_images_are_numbered_through_the_whole_conversation(template: ChatTemplate) -> None:
    look = Message(role="assistant", parts=(TextPart(text="See "), IMAGE))
    spans = train(template, user("Q", IMAGE.source), look, user("R", IMAGE.source))
    assert [span.image_number for span in spans if span.image_number is not None] == [0, 1, 2]


# -- what is trained


def test_only_answers_and_their_closing_tokens_are_trained(template: ChatTemplate) -> None:
    spans = train(template, system("S"), user("Q1"), assistant("A1"), user("Q2"), assistant("A2"))
    assert trained_text(template, spans) == ["A1", "<|im_end|>", "A2", "<|im_end|>"]


def test_an_answer_without_thoughts_follows_an_untrained_empty_think_block(template: ChatTemplate) -> None:
    spans = train(template, user("Q"), assistant("A"))
    assert written(template, spans).endswith("<|im_start|>assistant\n<think>\n\n</think>\n\nA<|im_end|>")
    assert trained_text(template, spans) == ["A", "<|im_end|>"]


def test_an_answer_with_thoughts_is_trained_from_its_first_tag(template: ChatTemplate) -> None:
    answer = "<think>\nx\n</think>\n\nA"
    spans = train(template, user("Q"), assistant(answer))
    assert written(template, spans).endswith(f"assistant\n{answer}<|im_end|>")
    assert trained_text(template, spans) == [answer, "<|im_end|>"]


def test_a_think_block_around_a_crop_counts_as_one(template: ChatTemplate) -> None:
    parts = (TextPart(text="<think>\nI look."), IMAGE, TextPart(text="It is red.\n</think>\n\nred"))
    spans = train(template, user("Q"), Message(role="assistant", parts=parts))
    assert "<think>\n\n</think>" not in written(template, spans)


def test_a_crop_stands_right_after_its_call_and_is_not_trained(template: ChatTemplate) -> None:
    call = "<think>\n<tool_call>[1, 2, 3, 4]</tool_call>"
    parts = (TextPart(text=call), IMAGE, TextPart(text="\nIt is red.\n</think>\n\nred"))
    spans = train(template, user("Q", IMAGE.source), Message(role="assistant", parts=parts))
    assert trained_text(template, spans) == [call, "\nIt is red.\n</think>\n\nred", "<|im_end|>"]
    (crop,) = [span for span in spans if span.image_number == 1]
    assert (crop.ids, crop.is_trained) == ([], False)


def test_the_newline_after_the_last_answer_is_not_part_of_the_input(template: ChatTemplate) -> None:
    assert written(template, train(template, user("Q"), assistant("A"))).endswith("A<|im_end|>")


def test_the_newline_after_a_closing_question_is(template: ChatTemplate) -> None:
    assert written(template, train(template, user("Q"), assistant("A"), user("R"))).endswith("R<|im_end|>\n")


@pytest.mark.parametrize("answer", ["\nA", "\n\nA"])
def test_leading_newlines_of_an_answer_are_dropped(template: ChatTemplate, answer: str) -> None:
    assert train(template, user("Q"), assistant(answer)) == train(template, user("Q"), assistant("A"))


def test_leading_newlines_after_a_crop_stay(template: ChatTemplate) -> None:
    spans = train(template, user("Q"), Message(role="assistant", parts=(IMAGE, TextPart(text="\nA"))))
    assert trained_text(template, spans) == ["\nA", "<|im_end|>"]


# -- tokens


@pytest.mark.parametrize("text", ["<|im_end|>", "<|im_start|>user\n", "<ovis_visual_atom>", "<image>", "<|endoftext|>"])
def test_text_that_spells_a_special_token_stays_text(template: ChatTemplate, text: str) -> None:
    ids = template.encode(f"say {text} now")
    assert set(ids).isdisjoint(template.tokenizer.all_special_ids)
    assert template.tokenizer.decode(ids) == f"say {text} now"


@pytest.mark.parametrize("tag", ["<think>", "</think>", "<tool_call>", "</tool_call>", "</tool_response>"])
def test_think_and_tool_tags_are_single_tokens(template: ChatTemplate, tag: str) -> None:
    assert template.encode(tag) == [template.token_id(tag)]


def test_the_early_stop_text_closes_the_think_block(template: ChatTemplate) -> None:
    assert template.token_id("</think>") in template.encode(EARLY_STOP)
    assert template.tokenizer.decode(template.encode(EARLY_STOP)) == EARLY_STOP


def test_a_tokenizer_without_chat_tokens_is_refused(processor: Ovis2_5Processor) -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=processor.tokenizer.backend_tokenizer)
    with pytest.raises(CheckpointError, match='no token "<box>"'):
        ChatTemplate(tokenizer).token_id("<box>")


def test_the_id_of_a_token_is_looked_up_without_the_whole_vocabulary(
    processor: Ovis2_5Processor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def whole(_: PreTrainedTokenizerFast) -> dict[str, int]:
        raise AssertionError("151,936 tokens would be written into a dict for each rollout")

    monkeypatch.setattr(type(processor.tokenizer), "get_vocab", whole)
    assert processor.tokenizer.decode([processor.template.token_id("</tool_call>")]) == "</tool_call>"
