"""Conversations to examples: the released ids and labels, and what a model folder keeps."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
from PIL import Image

from looktwice.errors import CheckpointError, ConfigError, ImageError
from looktwice.geometry import PixelPolicy, Size
from looktwice.messages import Conversation, ImagePart, Message, TextPart, assistant, user
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


def picture(width: int = 448, height: int = 448) -> Image.Image:
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
def test_a_prompt_with_a_picture_has_the_golden_ids(released: Ovis2_5Processor) -> None:
    conversation = Conversation(messages=(user("Describe this image.", picture()),))
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
        user("Q1", picture()),
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
def test_text_before_a_picture_is_tokenised_with_its_newline(released: Ovis2_5Processor) -> None:
    ids = prompt_ids(released, TextPart(text="Look at this."), ImagePart(source=picture()))
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


def test_a_picture_is_start_atoms_end_and_untrained(processor: Ovis2_5Processor) -> None:
    example = Example()
    processor.append_image(example, processor.patch(picture(48, 32)))
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


def test_pictures_are_kept_in_the_order_they_are_shown(processor: Ovis2_5Processor) -> None:
    conversation = Conversation(messages=(user("Q", picture(1000, 100), picture(100, 1000)),))
    first, second = processor.encode(conversation, purpose="prompt").images
    assert first.size.width > first.size.height
    assert second.size.width < second.size.height


def test_the_overview_has_the_size_of_the_policy(processor: Ovis2_5Processor) -> None:
    policy = PixelPolicy(image_min_pixels=64 * 64, image_max_pixels=64 * 64)
    limited = Ovis2_5Processor(processor.tokenizer, processor.config, policy)
    assert limited.overview_size(Size(600, 600)) == limited.patch_image(picture(600, 600)).size == Size(64, 64)


def test_decoding_keeps_tags_and_leaves_visual_tokens_out(processor: Ovis2_5Processor) -> None:
    config, template = processor.config, processor.template
    ids = [config.image_start_token_id, config.image_token_id, config.image_end_token_id]
    text = "<think>\nred <tool_call>[1]</tool_call>"
    assert processor.decode(ids + template.encode(text) + ids + [template.turn_close_id]) == f"{text}<|im_end|>"


def test_a_copy_of_an_example_grows_alone() -> None:
    example = Example(input_ids=[1], loss_mask=[True])
    example.copy().append([2, 3], is_trained=False)
    assert (example.input_ids, example.loss_mask) == ([1], [True])


def test_a_missing_picture_is_named(processor: Ovis2_5Processor, tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"gone\.png"):
        processor.encode(Conversation(messages=(user("Q", tmp_path / "gone.png"),)), purpose="prompt")


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
