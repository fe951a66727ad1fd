"""Conversations to examples: the released ids and labels, and what a model folder keeps."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jinja2 import TemplateError
from PIL import Image
from transformers import AutoProcessor, AutoTokenizer, ProcessorMixin

from looktwice.errors import CheckpointError, ConfigError, DataError, ImageError
from looktwice.geometry import PixelPolicy, Size
from looktwice.messages import Conversation, ImagePart, Message, TextPart, assistant, system, user
from looktwice.processing.chat_template import EARLY_STOP
from looktwice.processing.processor import VISUAL_TOKENS, Example, Ovis2_5Processor, add_visual_tokens

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
CASES = json.loads((GOLDEN / "cases.json").read_text(encoding="utf-8"))
RELEASED = Path(__file__).parents[3] / "shared" / "ovis2_5_9b"

needs_released_files = pytest.mark.skipif(not RELEASED.is_dir(), reason="the released tokenizer is not here")

# the released code counts visual positions below zero
OUR_IDS = {-300: 151671, -301: 151672, -302: 151673}
ATOM, START, END = OUR_IDS.values()


@pytest.fixture(scope="module")
def released() -> Ovis2_5Processor:
    """The processor of the 9B checkpoint, every picture at 448 x 448 pixels."""
    processor = Ovis2_5Processor.from_pretrained(RELEASED)
    processor.policy = PixelPolicy(image_min_pixels=448**2, image_max_pixels=448**2)
    return processor


def prompt_ids(processor: Ovis2_5Processor, *parts: TextPart | ImagePart) -> list[int]:
    conversation = Conversation(messages=(Message(role="user", parts=parts),))
    return processor.encode(conversation, purpose="prompt").input_ids


def grey_image(width: int = 448, height: int = 448) -> Image.Image:
    return Image.new("RGB", (width, height), "gray")


# -- the released ids


def golden_conversation(case: dict[str, Any]) -> Conversation:
    """Pictures stand where `<image>` does; a user's newline after one is written by the template."""
    images = iter(case["images"])
    messages = []
    for turn in case["conversation"]:
        parts: list[TextPart | ImagePart] = []
        for number, text in enumerate(turn["value"].split("<image>")):
            if number:
                parts.append(ImagePart(source=GOLDEN / next(images)))
            text = text.removeprefix("\n") if number and turn["from"] == "human" else text
            if text:
                parts.append(TextPart(text=text))
        role = {"human": "user", "gpt": "assistant", "system": "system"}[turn["from"]]
        messages.append(Message(role=role, parts=tuple(parts)))
    return Conversation(messages=tuple(messages))


@needs_released_files
@pytest.mark.parametrize("case", CASES, ids=["picture", "crop", "text"])
def test_conversations_become_the_golden_ids_and_labels(released: Ovis2_5Processor, case: dict[str, Any]) -> None:
    policy = PixelPolicy(image_min_pixels=case["min_pixels"], image_max_pixels=max(1, case["max_pixels"]))
    processor = Ovis2_5Processor(released.tokenizer, released.config, policy)
    example = processor.encode(golden_conversation(case), purpose="train")
    assert example.input_ids == [OUR_IDS.get(token, token) for token in case["qwen_input_ids"]]
    labels = [token if flag else -100 for token, flag in zip(example.input_ids, example.loss_mask)]
    assert labels == case["qwen_labels"]


@needs_released_files
def test_a_prompt_with_an_image_has_the_golden_ids(released: Ovis2_5Processor) -> None:
    conversation = Conversation(messages=(user("Describe this image.", grey_image()),))
    example = released.encode(conversation, purpose="prompt", thinking=False)
    question = [198, 74785, 419, 2168, 13, 151645, 198]
    assistant_opener = [151644, 77091, 198]
    wanted = [151644, 872, 198, START, *[ATOM] * 196, END, *question, *assistant_opener, 151667, 271, 151668, 271]
    assert example.input_ids == wanted
    thinking = released.encode(conversation, purpose="prompt", thinking=True)
    assert thinking.input_ids == wanted[:-4]


@needs_released_files
def test_a_conversation_of_two_turns_has_the_golden_ids_and_labels(released: Ovis2_5Processor) -> None:
    messages = (
        user("Q1", grey_image()),
        assistant("A1"),
        user("Q2"),
        assistant("<think>\nx\n</think>\n\nA2"),
    )
    example = released.encode(Conversation(messages=messages), purpose="train")
    empty_think = [151667, 271, 151668, 271]
    thoughts = [151667, 198, 87, 198, 151668, 271]
    # ids, and whether they are trained
    wanted = [
        ([151644, 872, 198, START, *[ATOM] * 196, END, 198, 48, 16, 151645, 198], False),
        ([151644, 77091, 198, *empty_think], False),
        ([32, 16, 151645], True),
        ([198, 151644, 872, 198, 48, 17, 151645, 198, 151644, 77091, 198], False),
        ([*thoughts, 32, 17, 151645], True),
    ]
    assert example.input_ids == [token for ids, _ in wanted for token in ids]
    assert example.loss_mask == [is_trained for ids, is_trained in wanted for _ in ids]


@needs_released_files
def test_text_before_an_image_is_tokenised_with_its_newline(released: Ovis2_5Processor) -> None:
    ids = prompt_ids(released, TextPart(text="Look at this."), ImagePart(source=grey_image()))
    # 624 is the full stop with the newline
    assert ids[: ids.index(START)] == [151644, 872, 198, 10380, 518, 419, 624]


@needs_released_files
def test_two_texts_are_tokenised_as_one(released: Ovis2_5Processor) -> None:
    ids = prompt_ids(released, TextPart(text="Look at this."), TextPart(text="Q1"))
    assert ids[3:9] == [10380, 518, 419, 624, 48, 16]


@needs_released_files
def test_a_question_s_leading_newline_is_tokenised_with_the_role_s(released: Ovis2_5Processor) -> None:
    assert prompt_ids(released, TextPart(text="\nQ1"))[:5] == [151644, 872, 271, 48, 16]


@needs_released_files
def test_the_early_stop_text_has_the_released_ids(released: Ovis2_5Processor) -> None:
    ids = "271 82796 279 7199 882 553 279 1196 11 358 614 311 2968 279 6291 3118 389 279 7274 5961 1431 624 151668 271"
    assert released.template.encode(EARLY_STOP) == [int(token) for token in ids.split()]


@needs_released_files
def test_visual_tokens_follow_the_released_vocabulary(released: Ovis2_5Processor) -> None:
    ids = released.tokenizer.convert_tokens_to_ids(list(VISUAL_TOKENS))
    assert ids == list(range(151669, 151676)) == list(released.config.visual_token_ids)


@needs_released_files
def test_grounding_tags_are_ordinary_text_to_the_released_tokenizer(released: Ovis2_5Processor) -> None:
    assert released.template.encode("<box>") == [27, 2011, 29]
    assert released.template.encode("<image>") == [27, 1805, 29]


@needs_released_files
def test_end_of_turn_and_end_of_text_end_a_completion(released: Ovis2_5Processor) -> None:
    assert released.end_ids == [151645, 151643]


# -- examples


def test_an_image_is_start_atoms_end_and_untrained(processor: Ovis2_5Processor) -> None:
    example = Example()
    processor.append_image(example, processor.patch(grey_image(48, 32)))
    config = processor.config
    assert example.input_ids == [
        config.image_start_token_id,
        *[config.image_token_id] * 6,
        config.image_end_token_id,
    ]
    assert example.loss_mask == [False] * 8
    assert len(example.images) == 1


def test_a_text_that_spells_a_visual_token_adds_no_visual_id(processor: Ovis2_5Processor) -> None:
    ids = prompt_ids(processor, TextPart(text="<ovis_visual_atom><image><ovis_image_start>"))
    assert set(ids).isdisjoint(processor.config.visual_token_ids)


def test_images_are_kept_in_the_order_they_are_shown(processor: Ovis2_5Processor) -> None:
    conversation = Conversation(messages=(user("Q", grey_image(1000, 100), grey_image(100, 1000)),))
    first, second = processor.encode(conversation, purpose="prompt").images
    assert first.size.width > first.size.height
    assert second.size.width < second.size.height


def test_the_overview_has_the_size_of_the_policy(processor: Ovis2_5Processor) -> None:
    policy = PixelPolicy(image_min_pixels=64 * 64, image_max_pixels=64 * 64)
    limited = Ovis2_5Processor(processor.tokenizer, processor.config, policy)
    assert limited.overview_size(Size(600, 600)) == limited.patch_image(grey_image(600, 600)).size == Size(64, 64)


def test_decoding_keeps_tags_and_leaves_visual_tokens_out(processor: Ovis2_5Processor) -> None:
    config, template = processor.config, processor.template
    ids = [config.image_start_token_id, config.image_token_id, config.image_end_token_id]
    text = "<think>\nred <tool_call>[1]</tool_call>"
    assert processor.decode(ids + template.encode(text) + ids + [template.turn_close_id]) == f"{text}<|im_end|>"


def test_a_copy_of_an_example_grows_alone() -> None:
    example = Example(input_ids=[1], loss_mask=[True])
    example.copy().append([2, 3], is_trained=False)
    assert (example.input_ids, example.loss_mask) == ([1], [True])


def test_a_missing_image_is_named(processor: Ovis2_5Processor, tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"gone\.png"):
        processor.encode(Conversation(messages=(user("Q", tmp_path / "gone.png"),)), purpose="prompt")


# -- as Hugging Face calls it


def hub_messages(conversation: Conversation) -> list[dict[str, Any]]:
    """The conversation as Hugging Face writes it."""
    return [
        {
            "role": message.role,
            "content": [
                {"type": "text", "text": part.text}
                if isinstance(part, TextPart)
                else {"type": "image", "image": part.source}
                for part in message.parts
            ],
        }
        for message in conversation.messages
    ]


def assert_same_as_ours(processor: Ovis2_5Processor, conversation: Conversation) -> None:
    """A whole conversation has the ids and the marks of training, its prompts have those of asking."""
    whole = processor.apply_chat_template(
        hub_messages(conversation), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    ours = processor.encode(conversation, purpose="train")
    assert whole["input_ids"] == [ours.input_ids]
    assert whole["assistant_masks"] == [ours.loss_mask]
    assert [tuple(grid) for grid in whole.get("image_grid_thw", [])] == [image.grid_thw for image in ours.images]
    for thinking in (True, False):
        prompt = processor.apply_chat_template(
            hub_messages(conversation), add_generation_prompt=True, enable_thinking=thinking, tokenize=True
        )
        assert prompt == [processor.encode(conversation, purpose="prompt", thinking=thinking).input_ids]


SQUARE = ImagePart(source=Image.new("RGB", (64, 64), "gray"))
# a text that opens with a space and a newline is left out: see ChatTemplate on newlines that merge
TEXTS = st.lists(st.sampled_from(["red", " ", "\n", "<think>", "</think>", "<tool_call>", "é!", "12"]), max_size=5).map(
    lambda words: "".join(words).lstrip(" ")
)
PARTS = st.one_of(TEXTS.map(lambda text: TextPart(text=text)), st.just(SQUARE))
MESSAGES = st.builds(
    Message, role=st.sampled_from(["system", "user", "assistant"]), parts=st.lists(PARTS, max_size=4).map(tuple)
)


@settings(max_examples=40, deadline=None)
@given(messages=st.lists(MESSAGES, min_size=1, max_size=4))
@example(messages=[user("Q"), assistant("\n\nA"), Message(role="assistant", parts=(SQUARE, TextPart(text="\nB")))])
def test_the_hub_s_template_writes_what_ours_does(processor: Ovis2_5Processor, messages: list[Message]) -> None:
    assert_same_as_ours(processor, Conversation(messages=tuple(messages)))


@needs_released_files
def test_the_released_tokenizer_reads_the_same_ids_from_the_hub_s_template(released: Ovis2_5Processor) -> None:
    look = (TextPart(text="<think>\nSee <tool_call>[1]</tool_call>"), ImagePart(source=grey_image(64, 64)))
    answer = Message(role="assistant", parts=(*look, TextPart(text="\n\n It is.\n</think>\n\nred\n")))
    messages = (system("S\n"), user(" Q1\n", grey_image(), grey_image()), answer, user("\nQ2 "), assistant("\n\nA2"))
    assert_same_as_ours(released, Conversation(messages=messages))


def test_a_text_that_is_no_list_of_parts_is_one_text(processor: Ovis2_5Processor) -> None:
    written = processor.apply_chat_template([{"role": "user", "content": "Hi"}], add_generation_prompt=True)
    assert written == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("message", "named"),
    [
        ({"role": "tool", "content": "x"}, "role tool"),
        ({"role": "user", "content": [{"type": "audio", "audio": "x"}]}, "type audio"),
    ],
)
def test_the_hub_s_template_names_what_it_cannot_write(
    processor: Ovis2_5Processor, message: dict[str, Any], named: str
) -> None:
    with pytest.raises(TemplateError, match=named):
        processor.apply_chat_template([message])


def test_each_placeholder_becomes_the_next_image(processor: Ovis2_5Processor) -> None:
    wide, tall = grey_image(160, 64), grey_image(64, 160)
    for images in ([wide, tall, wide], [[wide, tall], [wide]]):
        out = processor(images, ["<image> and <image>", "or <image>"], return_tensors="pt", padding=True)
        shown = [processor.patch_image(image) for image in (wide, tall, wide)]
        ids = processor.image_ids(shown[0]) + processor.template.encode(" and ") + processor.image_ids(shown[1])
        assert out["input_ids"][0].tolist() == ids
        assert torch.equal(out["pixel_values"], torch.cat([image.pixel_values for image in shown]) / 127.5 - 1)


def test_shorter_texts_are_padded_on_the_left(processor: Ovis2_5Processor) -> None:
    out = processor(text=["red", "red red red"], padding=True, return_tensors="pt")
    assert set(out) == {"input_ids", "attention_mask"}
    assert out["attention_mask"][0, 0] == 0
    assert out["attention_mask"][:, -1].tolist() == [1, 1]


def test_images_alone_give_no_ids(processor: Ovis2_5Processor) -> None:
    assert set(processor(grey_image())) == {"pixel_values", "image_grid_thw"}


@pytest.mark.parametrize(
    ("images", "texts", "message"),
    [
        (None, ["<image>"], r'text 0: 1 "<image>" for 0 pictures'),
        ([grey_image()], ["a", "b"], r'2 texts: 0 "<image>" for 1 pictures'),
        (
            [[grey_image(), grey_image()], [grey_image()]],
            ["<image>", "<image><image>"],
            r'text 0: 1 "<image>" for 2 pictures',
        ),
        ([[grey_image()]], ["<image>", "a"], "1 lists of pictures for 2 texts"),
        (None, ["a", "<ovis_visual_atom>"], r'a text spells the visual token "<ovis_visual_atom>"'),
    ],
)
def test_images_that_do_not_fit_their_texts_are_refused(
    processor: Ovis2_5Processor, images: Any, texts: list[str], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        processor(images, texts)


def test_truncation_through_an_image_is_refused(processor: Ovis2_5Processor) -> None:
    with pytest.raises(DataError, match="truncation leaves 3 of 36 visual tokens"):
        processor(grey_image(), "<image>", truncation=True, max_length=4)


def test_a_video_in_the_call_is_refused_with_the_way_that_takes_it(processor: Ovis2_5Processor) -> None:
    with pytest.raises(DataError, match=r"Ovis2_5Processor\.encode"):
        processor(text="<video>", videos=[[grey_image()]])  # type: ignore[arg-type]


def test_a_new_policy_holds_for_both_ways_in(processor: Ovis2_5Processor) -> None:
    limited = Ovis2_5Processor(processor.tokenizer, processor.config)
    limited.policy = PixelPolicy(image_min_pixels=64 * 64, image_max_pixels=64 * 64)
    assert limited.patch_image(grey_image()).grid_thw == (1, 8, 8)
    assert limited(grey_image(), "<image>")["image_grid_thw"].tolist() == [[1, 8, 8]]


def test_ids_of_any_kind_are_decoded(processor: Ovis2_5Processor) -> None:
    ids = [*processor.template.encode("red"), processor.config.image_token_id, processor.template.turn_close_id]
    for form in (ids, np.array(ids), torch.tensor(ids)):
        assert processor.decode(form) == "red<|im_end|>"
    assert processor.batch_decode(torch.tensor([ids, ids]), skip_special_tokens=True) == ["red", "red"]


# -- model folders

POLICY = PixelPolicy(image_min_pixels=1, image_max_pixels=2, crop_min_pixels=3, crop_max_pixels=4)


@pytest.fixture
def folder(processor: Ovis2_5Processor, tmp_path: Path) -> Path:
    """A saved processor with settings that are no defaults."""
    Ovis2_5Processor(processor.tokenizer, processor.config, POLICY, "norm1000").save_pretrained(tmp_path)
    processor.config.save_pretrained(tmp_path)
    return tmp_path


def test_a_folder_keeps_policy_and_box_frame(folder: Path) -> None:
    again = Ovis2_5Processor.from_pretrained(folder)
    assert (again.policy, again.box_frame) == (POLICY, "norm1000")


def test_transformers_finds_the_processor_of_a_folder(folder: Path) -> None:
    again = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
    assert isinstance(again, Ovis2_5Processor) and isinstance(again, ProcessorMixin)
    assert (again.policy, again.box_frame) == (POLICY, "norm1000")
    assert '"processor_class": "Ovis2_5Processor"' in repr(again)


def test_pixel_bounds_given_on_loading_replace_the_folder_s(folder: Path) -> None:
    again = AutoProcessor.from_pretrained(folder, min_pixels=20, max_pixels=30)
    assert again.policy == POLICY.override(image_min_pixels=20, image_max_pixels=30)


def test_pixel_bounds_have_one_home_in_a_folder(folder: Path) -> None:
    homes = [file.name for file in folder.glob("*.json") if "image_max_pixels" in file.read_text(encoding="utf-8")]
    assert homes == ["preprocessor_config.json"]


def test_the_tokenizer_of_a_folder_writes_the_same_prompts(folder: Path) -> None:
    messages = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "<think>\nx\n</think>\n\nA"}]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    wanted = Ovis2_5Processor.from_pretrained(folder).apply_chat_template(messages)
    assert tokenizer.apply_chat_template(messages, tokenize=False) == wanted
    assert "x\n</think>" in wanted, "thoughts of past turns stay"


def test_a_processor_is_pushed_when_asked(
    processor: Ovis2_5Processor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pushed = []
    monkeypatch.setattr(Ovis2_5Processor, "push_to_hub", lambda self, name, **kwargs: pushed.append((name, kwargs)))
    processor.save_pretrained(tmp_path / "mine")
    processor.save_pretrained(tmp_path / "mine", push_to_hub=True, private=True)
    assert pushed == [("mine", {"private": True})]


def test_a_folder_keeps_the_ids_of_a_conversation(processor: Ovis2_5Processor, folder: Path) -> None:
    text = TextPart(text="<think>Grüße, 世界 <|im_end|> <image>")
    assert prompt_ids(Ovis2_5Processor.from_pretrained(folder), text) == prompt_ids(processor, text)


def test_a_model_in_the_hub_s_cache_keeps_policy_and_box_frame(
    processor: Ovis2_5Processor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = tmp_path / "models--someone--model"
    snapshot = repository / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc", encoding="utf-8")
    Ovis2_5Processor(processor.tokenizer, processor.config, POLICY, "norm1000").save_pretrained(snapshot)
    processor.config.save_pretrained(snapshot)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    again = Ovis2_5Processor.from_pretrained("someone/model")
    assert (again.policy, again.box_frame) == (POLICY, "norm1000")


def test_the_released_image_settings_are_kept_for_other_runtimes(folder: Path) -> None:
    settings = json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8"))
    assert (settings["image_processor_type"], settings["resample"]) == ("SiglipImageProcessor", 2)


def test_a_folder_without_our_settings_has_the_defaults(folder: Path) -> None:
    (folder / "preprocessor_config.json").write_text('{"image_processor_type": "x"}', encoding="utf-8")
    again = Ovis2_5Processor.from_pretrained(folder)
    assert (again.policy, again.box_frame) == (PixelPolicy(), "original_px")


def test_a_folder_without_image_settings_has_the_defaults(folder: Path) -> None:
    (folder / "preprocessor_config.json").unlink()
    assert Ovis2_5Processor.from_pretrained(folder).policy == PixelPolicy()


def test_a_folder_without_a_tokenizer_is_refused(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    with pytest.raises(CheckpointError, match="no usable config and tokenizer files"):
        Ovis2_5Processor.from_pretrained(folder)


def test_an_unknown_box_frame_is_refused_with_the_known_ones(folder: Path) -> None:
    spoil(folder, box_frame="yards")
    with pytest.raises(CheckpointError, match=r"box_frame is 'yards'; it must be one of .*norm1000"):
        Ovis2_5Processor.from_pretrained(folder)


def test_a_policy_that_contradicts_itself_is_refused(folder: Path) -> None:
    spoil(folder, pixels={"image_min_pixels": 9, "image_max_pixels": 1})
    with pytest.raises(ConfigError, match="image_min_pixels is 9"):
        Ovis2_5Processor.from_pretrained(folder)


@pytest.mark.parametrize("pixels", [{"image_min_pixel": 9}, [1, 2], "many"])
def test_a_policy_that_cannot_be_read_is_refused(folder: Path, pixels: object) -> None:
    spoil(folder, pixels=pixels)
    with pytest.raises(CheckpointError, match="not readable as image settings"):
        Ovis2_5Processor.from_pretrained(folder)


def test_broken_image_settings_are_refused(folder: Path) -> None:
    (folder / "preprocessor_config.json").write_text("{", encoding="utf-8")
    with pytest.raises(CheckpointError, match="not readable as image settings"):
        Ovis2_5Processor.from_pretrained(folder)


def spoil(folder: Path, **changes: object) -> None:
    file = folder / "preprocessor_config.json"
    settings = json.loads(file.read_text(encoding="utf-8"))
    settings["looktwice"] |= changes
    file.write_text(json.dumps(settings), encoding="utf-8")


def test_a_tokenizer_whose_visual_tokens_have_other_ids_is_refused(processor: Ovis2_5Processor) -> None:
    config = copy.deepcopy(processor.config)
    config.image_token_id = 3
    with pytest.raises(CheckpointError, match=r"in the tokenizer and \[\d+, \d+, 3, "):
        add_visual_tokens(copy.deepcopy(processor.tokenizer), config)


def test_ids_that_come_one_by_one_are_decoded_as_ever(processor) -> None:
    ids = [*range(processor.config.vocab_size)]
    for _ in "ab":  # remembered the second time
        assert [processor.decode_few([token]) for token in ids] == [processor.decode([token]) for token in ids]
    assert processor.decode_few(ids[200:210]) == processor.decode(ids[200:210])
