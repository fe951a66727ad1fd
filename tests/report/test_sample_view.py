"""Samples as the model sees them: read off the Example itself, token by token, picture by picture."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from looktwice.config import ShowConfig
from looktwice.data.examples import encode_sample
from looktwice.data.sample import Sample
from looktwice.errors import DataError
from looktwice.formats.sample_file import SampleFile
from looktwice.geometry import Box, PixelPolicy, Size
from looktwice.messages import Conversation, Message, TextPart, assistant, system, user
from looktwice.processing.images import patchify, resize
from looktwice.processing.processor import Ovis2_5Processor
from looktwice.report.sample_view import (
    ImageView,
    Piece,
    SampleView,
    image_of,
    parts_of,
    pieces_of,
    view_file,
    view_sample,
)
from looktwice.rollout.episode import EpisodeRules, start_episodes

CALL = "<tool_call>[0, 0, 48, 60]</tool_call>"
MakeSample = Callable[..., Sample]


@pytest.fixture
def make_sample(tmp_path: Path, image: Image.Image) -> MakeSample:
    """A sample of these messages after a question about the picture."""
    image.save(tmp_path / "a.png")

    def make(*messages: Message, **fields: object) -> Sample:
        question = user("What?", tmp_path / "a.png")
        conversation = Conversation(messages=(question, *messages))
        return Sample(conversation=conversation, where="a.jsonl:3", field="QnA[0].A3", **fields)  # type: ignore[arg-type]

    return make


def pieces(view: SampleView) -> list[Piece]:
    return [part for turn in view.turns for part in turn.parts if isinstance(part, Piece)]


def images(view: SampleView) -> list[ImageView]:
    return [image for turn in view.turns for image in turn.images]


# -- tokens


def test_a_character_of_several_tokens_is_one_piece(processor: Ovis2_5Processor) -> None:
    ids = processor.template.encode("ab谢")
    assert len(ids) == 5
    found = list(pieces_of(ids, [True] * 5, processor))
    assert [(piece.text, len(piece.ids)) for piece in found] == [("a", 1), ("b", 1), ("谢", 3)]


def test_a_replacement_character_that_was_written_is_its_own_piece(processor: Ovis2_5Processor) -> None:
    ids = processor.template.encode("\ufffda")
    assert [piece.text for piece in pieces_of(ids, [False] * len(ids), processor)] == ["\ufffd", "a"]


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=40))
def test_pieces_joined_are_the_text_and_hold_all_ids(text: str, processor: Ovis2_5Processor) -> None:
    ids = processor.template.encode(text)
    found = list(pieces_of(ids, [True] * len(ids), processor))
    assert "".join(piece.text for piece in found) == processor.decode(ids)
    assert [token for piece in found for token in piece.ids] == ids
    assert all("\ufffd" not in piece.text for piece in found) or "\ufffd" in text


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_ids_that_are_no_text_still_give_what_decode_gives(data: st.DataObject, processor: Ovis2_5Processor) -> None:
    text_ids = set(range(len(processor.tokenizer))) - set(processor.config.visual_token_ids)
    ids = data.draw(st.lists(st.sampled_from(sorted(text_ids)), max_size=20))
    found = pieces_of(ids, [False] * len(ids), processor)
    assert "".join(piece.text for piece in found) == processor.decode(ids)


def test_lines_and_control_characters_are_made_visible() -> None:
    piece = Piece(text="a\n\x1b[31m\x00\tb\x7f\x9b", ids=(1,), is_trained=True)
    assert piece.shown == "a↵\n␛[31m␀\tb␡\ufffd"


# -- one sample


def test_a_view_holds_the_ids_and_marks_of_the_example(make_sample: MakeSample, processor: Ovis2_5Processor) -> None:
    sample = make_sample(assistant(f"<think>Look: {CALL} Grün.</think><answer>grün</answer>"))
    example = encode_sample(sample, processor, max_length=1000)
    view = view_sample(sample, processor, ShowConfig())
    assert "".join(piece.text for piece in pieces(view)) == processor.decode(example.input_ids)
    assert view.num_tokens == len(example)
    assert view.num_trained == sum(example.loss_mask)
    trained = [token for piece in pieces(view) if piece.is_trained for token in piece.ids]
    assert trained == [token for token, is_trained in zip(example.input_ids, example.loss_mask) if is_trained]


def test_turns_have_their_roles_and_tokens_by_kind(make_sample: MakeSample, processor: Ovis2_5Processor) -> None:
    sample = make_sample(assistant(f"{CALL}{CALL}"), user("Sure?"), assistant("Yes."))
    view = view_sample(sample, processor, ShowConfig())
    assert [turn.role for turn in view.turns] == ["user", "assistant", "user", "assistant"]
    tokens = {image.name: image.num_tokens for image in images(view)}
    assert [turn.num_image_tokens for turn in view.turns] == [tokens["picture 1"], 0, 0, 0]
    assert [turn.num_crop_tokens for turn in view.turns] == [0, tokens["crop 1"] + tokens["crop 2"], 0, 0]


def test_a_system_turn_comes_first(make_sample: MakeSample, processor: Ovis2_5Processor) -> None:
    sample = make_sample(assistant("Yes."))
    messages = (system("Be brief."), *sample.conversation.messages)
    view = view_sample(
        Sample(conversation=Conversation(messages=messages), where="a", field="b"), processor, ShowConfig()
    )
    assert [turn.role for turn in view.turns] == ["system", "user", "assistant"]
    assert view.turns[0].num_trained == 0


def test_an_assistant_turn_that_is_not_trained_has_no_marks(
    make_sample: MakeSample, processor: Ovis2_5Processor
) -> None:
    quiet = Message(role="assistant", parts=(TextPart(text=f"No. {CALL}"),), is_trained=False)
    view = view_sample(make_sample(quiet, user("Sure?"), assistant("Yes.")), processor, ShowConfig())
    assert [turn.num_trained > 0 for turn in view.turns] == [False, False, False, True]
    assert [image.name for image in images(view)] == ["picture 1", "crop 1"]


def test_in_stage_2_the_prompt_is_shown_that_rollouts_start_from(
    make_sample: MakeSample, processor: Ovis2_5Processor
) -> None:
    sample = make_sample(assistant(f"{CALL} <answer>a</answer>"), user("Sure?"), assistant("<answer>b</answer>"))
    sample = replace(sample, solution="b")
    view = view_sample(sample, processor, ShowConfig(stage="grpo"))
    [episode] = start_episodes(sample.prompt, processor, EpisodeRules(), count=1)
    assert [token for piece in pieces(view) for token in piece.ids] == [
        token for part in parts_of(episode.example, processor) if isinstance(part, Piece) for token in part.ids
    ]
    assert [turn.role for turn in view.turns] == ["user", "assistant", "user", "assistant"]
    assert (view.num_trained, len(view.crops), view.solution) == (0, 1, "b")
    unjudged = view_sample(replace(sample, solution=""), processor, ShowConfig(stage="grpo"))
    assert "no <answer> block and no field" in unjudged.problem


# -- pictures


def test_a_crop_says_what_was_cut_and_shows_what_the_model_sees(
    make_sample: MakeSample, processor: Ovis2_5Processor, image: Image.Image
) -> None:
    sample = make_sample(assistant(f"a {CALL} b"), gold_box=Box(1, 2, 3, 4), more_gold_boxes=(Box(5, 6, 7, 8),))
    view = view_sample(sample, processor, ShowConfig())
    whole, crop = images(view)
    assert whole.caption == f"picture 1 {sample.image_paths[0]} 160x120, seen as 96x80: 30 tokens"
    assert crop.rectangle == (0, 0, 48, 60)
    assert crop.caption == "crop 1 0,0-48,60 → 48x60, seen as 48x48: 9 tokens"
    expected = resize(image, Size(48, 48), (0, 0, 48, 60))
    assert np.array_equal(np.asarray(crop.image), np.asarray(expected))
    assert view.gold_boxes == (Box(1, 2, 3, 4), Box(5, 6, 7, 8))


def test_boxes_in_another_frame_are_shown_in_original_pixels(
    make_sample: MakeSample, processor: Ovis2_5Processor
) -> None:
    sample = make_sample(assistant("<tool_call>[0, 0, 300, 500]</tool_call>"), box_frame="norm1000")
    assert view_sample(sample, processor, ShowConfig()).crops[0].rectangle == (0, 0, 48, 60)


def test_an_image_that_a_user_shows_after_the_words_of_a_call_is_no_crop(
    make_sample: MakeSample, processor: Ovis2_5Processor, image: Image.Image
) -> None:
    sample = make_sample(assistant("Yes."))
    shown, answer = sample.conversation.messages
    turn = Message(role="user", parts=(shown.parts[0], TextPart(text=CALL), shown.parts[0]))
    view = view_sample(
        Sample(conversation=Conversation(messages=(turn, answer)), where="a", field="b"), processor, ShowConfig()
    )
    assert [one.name for one in images(view)] == ["picture 1", "picture 2"]


def test_patches_are_put_back_where_they_were(image: Image.Image) -> None:
    patched = patchify(image.resize((96, 64)), patch_size=8, stride=2)
    assert np.array_equal(np.asarray(image_of(patched, 8, 2)), np.asarray(image.resize((96, 64))))


# -- what cannot be trained, and length policies


@pytest.mark.parametrize(
    ("answer", "problem"),
    [("<tool_call>[900, 900, 990, 990]</tool_call>", "outside the picture"), ("a" * 2000, "more than max_length 1000")],
)
def test_a_sample_that_cannot_be_trained_is_shown_with_the_reason(
    answer: str, problem: str, make_sample: MakeSample, processor: Ovis2_5Processor
) -> None:
    view = view_sample(make_sample(assistant(answer)), processor, ShowConfig(max_length=1000))
    assert problem in view.problem and view.where == "a.jsonl:3"
    assert view.turns == () and view.trained_share == 0


def test_images_are_shown_as_small_as_the_length_policy_makes_them(
    make_sample: MakeSample, processor: Ovis2_5Processor
) -> None:
    sample = make_sample(assistant("Yes."))
    wide = processor.at(PixelPolicy(image_min_pixels=16 * 16, image_max_pixels=160 * 160))
    full = view_sample(sample, wide, ShowConfig())
    config = ShowConfig(max_length=full.num_tokens - 1, length_policy="shrink_images")
    view = view_sample(sample, wide, config)
    assert view.num_tokens < full.num_tokens
    assert view.note.startswith(f"{full.num_tokens} tokens, more than max_length {config.max_length}: pictures shrunk")
    dropped = view_sample(sample, wide, config.model_copy(update={"length_policy": "drop"}))
    assert dropped.problem.endswith("left out")


# -- files


@pytest.fixture
def file(tmp_path: Path, image: Image.Image) -> SampleFile:
    """Twelve rows on lines 1 to 13, a blank one between; the third is broken."""
    image.save(tmp_path / "a.png")
    lines = [json.dumps({"image_path": "a.png", "QnA": [{"Q": f"{n}?", "A": f"{n}."}]}) for n in range(12)]
    lines[2] = "{"
    lines.insert(4, "")
    (tmp_path / "a.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return SampleFile(tmp_path / "a.jsonl", tmp_path)


def lines_shown(file: SampleFile, processor: Ovis2_5Processor, **settings: object) -> list[int]:
    return [int(view.where.rpartition(":")[2]) for view in view_file(file, processor, ShowConfig(**settings))]


def test_the_first_samples_are_shown_and_a_broken_row_among_them(file: SampleFile, processor: Ovis2_5Processor) -> None:
    views = list(view_file(file, processor, ShowConfig(num_samples=4)))
    assert [bool(view.problem) for view in views] == [False, False, True, False]
    assert lines_shown(file, processor) == [1, 2, 3]


def test_a_row_is_named_by_its_line(file: SampleFile, processor: Ovis2_5Processor) -> None:
    assert lines_shown(file, processor, row=6) == [6]


def test_a_row_that_is_not_there_is_an_error(file: SampleFile, processor: Ovis2_5Processor) -> None:
    for row in (5, 14):
        with pytest.raises(DataError, match=rf"no row {row}; the last is .*:13$"):
            lines_shown(file, processor, row=row)


def test_rows_picked_at_random_are_a_function_of_the_seed(file: SampleFile, processor: Ovis2_5Processor) -> None:
    first = lines_shown(file, processor, seed=1, num_samples=6)
    assert first == lines_shown(file, processor, seed=1, num_samples=6) != sorted(first)
    assert len(set(first)) == 6
    assert len(lines_shown(file, processor, seed=1, num_samples=50)) == 12
