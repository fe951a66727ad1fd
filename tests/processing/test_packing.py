"""Rows of examples without padding."""

from __future__ import annotations

import operator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.model.mixer import Mixer

from looktwice.geometry import Size
from looktwice.processing.images import PatchedImage
from looktwice.processing.packing import collate_packed, pack, pack_rows, split_by_tokens, split_rows
from looktwice.processing.processor import Example


def image(value: int, rows: int, columns: int) -> PatchedImage:
    return PatchedImage(
        pixel_values=torch.full((rows * columns, 12), value, dtype=torch.uint8),
        grid_thw=(1, rows, columns),
        size=Size(columns * 2, rows * 2),
        num_tokens=rows * columns // 4,
    )


def example(ids: list[int], trained: list[int], *images: PatchedImage) -> Example:
    return Example(input_ids=ids, loss_mask=[bool(flag) for flag in trained], images=list(images))


def test_examples_stand_one_after_the_other() -> None:
    batch = pack([example([5, 6, 7], [0, 1, 1]), example([8, 9], [0, 1])])
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9]]
    assert batch.loss_mask.tolist() == [[False, True, True, False, True]]
    assert batch.cu_seqlens.tolist() == [0, 3, 5]
    assert batch.cu_seqlens.dtype == torch.int32


def test_positions_start_anew_in_every_sequence() -> None:
    batch = pack([example([5, 6, 7], [0, 0, 0]), example([8, 9], [0, 0])])
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1]]


def test_a_pack_counts_its_tokens_and_those_with_loss() -> None:
    batch = pack([example([5, 6, 7], [0, 1, 1]), example([8, 9], [0, 1])])
    assert (batch.num_tokens, batch.num_loss_tokens) == (5, 3)


def test_every_trained_token_knows_its_sequence() -> None:
    batch = pack([example([1, 2, 3], [0, 1, 1]), example([4, 5], [0, 0]), example([6, 7], [0, 1])])
    assert batch.loss_sequence().tolist() == [0, 0, 2]


def test_text_alone_has_no_images() -> None:
    batch = pack([example([1], [0])])
    assert (batch.pixel_values, batch.image_grid_thw, batch.image_index) == (None, None, None)


def test_the_images_of_all_examples_are_one_matrix() -> None:
    first, second = image(1, 2, 2), image(2, 2, 4)
    batch = pack([example([1], [0], first), example([2], [0]), example([3], [0], second)])
    assert batch.pixel_values is not None and batch.image_grid_thw is not None and batch.image_index is not None
    assert batch.pixel_values[:, 0].tolist() == [1] * 4 + [2] * 8
    assert batch.image_grid_thw.tolist() == [[1, 2, 2], [1, 2, 4]]
    assert batch.image_index.tolist() == [0, 1]


def test_packed_images_stay_bytes() -> None:
    inputs = pack([example([1], [0], image(1, 2, 2), image(2, 2, 4))]).model_inputs()
    assert inputs["pixel_values"].dtype == torch.uint8


def test_a_shared_image_is_stored_once_and_shown_wherever_it_belongs() -> None:
    shared, own = image(1, 2, 2), image(2, 2, 4)
    batch = pack([example([1], [0], shared, own), example([2], [0], shared)])
    assert batch.image_grid_thw is not None and batch.image_index is not None
    assert batch.image_grid_thw.tolist() == [[1, 2, 2], [1, 2, 4]]
    assert batch.image_index.tolist() == [0, 1, 0]


def test_two_images_that_look_alike_are_both_stored() -> None:
    batch = pack([example([1], [0], image(1, 2, 2)), example([2], [0], image(1, 2, 2))])
    assert batch.image_index is not None
    assert batch.image_index.tolist() == [0, 1]


def siblings(ids: list[int], *completions: list[int], images: list[PatchedImage] | None = None) -> list[Example]:
    prompt = example(ids, [0] * len(ids), *(images or []))
    found = [prompt.sibling() for _ in completions]
    for one, completion in zip(found, completions):
        one.append(completion, is_trained=True)
    return found


def test_siblings_have_their_prompt_in_a_row_once_but_for_its_last_id() -> None:
    batch = pack([*siblings([1, 2, 3], [4, 5], [6]), example([7, 8], [0, 1])], share_prompts=True)
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 5, 3, 6, 7, 8]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 2, 3, 0, 1]]
    assert batch.cu_seqlens.tolist() == [0, 2, 5, 7, 9]
    assert batch.parents.tolist() == [-1, 0, 0, -1]
    assert batch.loss_sequence().tolist() == [0, 0, 1, 2]


def test_the_pictures_of_a_shared_prompt_are_shown_once_and_those_of_its_siblings_after_them() -> None:
    board, crop = image(0, 4, 4), image(1, 2, 2)
    first, second = siblings([1, 9, 2], [3], [4], images=[board])
    first.images.append(crop)
    batch = pack([first, second], share_prompts=True)
    assert (batch.image_index.tolist(), len(batch.image_grid_thw)) == ([0, 1], 2)


@pytest.mark.parametrize("ids", [[1, 2, 3], [3]])
def test_nothing_is_shared_where_there_is_nothing_to_share(ids) -> None:
    lone, *_ = siblings(ids, [4])
    assert pack([lone, example([7, 8], [0, 1])], share_prompts=True).parents is None
    assert pack(siblings([3], [4], [5]), share_prompts=True).parents is None
    assert pack(siblings(ids, [4], [5])).parents is None


@pytest.mark.parametrize(("max_tokens", "rows"), [(100, [3]), (9, [2, 1]), (6, [1, 1, 1]), (1, [1, 1, 1])])
def test_siblings_stay_together_as_many_as_a_row_has_room_for(max_tokens, rows) -> None:
    examples = siblings([1, 2, 3, 4], [5, 6], [7, 8], [9, 9])
    batches = pack_rows(examples, 1, sibling_tokens=max_tokens)
    assert sorted((len(batch.examples) for batch in batches), reverse=True) == rows
    assert {id(one) for batch in batches for one in batch.examples} == set(map(id, examples))
    assert all(batch.num_tokens <= max_tokens for batch in batches if len(batch.examples) > 1)


def test_model_inputs_leave_out_what_is_no_input() -> None:
    inputs = pack([example([1, 2], [0, 1])]).model_inputs()
    assert set(inputs) == {
        "input_ids", "position_ids", "loss_mask", "cu_seqlens", "parents",
        "pixel_values", "image_grid_thw", "image_index",
    }  # fmt: skip


def test_a_collated_row_is_the_pack_with_labels_for_its_marks() -> None:
    examples = [example([5, 6, 7], [0, 1, 1], image(1, 2, 2)), example([8, 9], [0, 1])]
    inputs, batch = collate_packed(examples), pack(examples)
    assert inputs["labels"].tolist() == [[-100, 6, 7, -100, 9]]
    assert inputs.keys() - {"labels"} == batch.model_inputs().keys() - {"loss_mask", "parents"}
    assert inputs["cu_seqlens"].tolist() == [0, 3, 5]


def test_a_collated_row_of_text_names_no_images() -> None:
    assert set(collate_packed([example([1, 2], [0, 1])])) == {"input_ids", "position_ids", "cu_seqlens", "labels"}


def test_no_label_stands_at_the_start_of_a_sequence() -> None:
    """The token before it belongs to another sequence, and would be asked to predict it."""
    inputs = collate_packed([example([5, 6], [1, 1]), example([8, 9], [1, 1])])
    assert inputs["labels"].tolist() == [[-100, 6, -100, 9]]


@pytest.mark.parametrize(
    ("lengths", "max_tokens", "rows"),
    [
        ([3, 5, 2, 4], 8, [[0, 1], [2, 3]]),
        ([4, 4, 4], 8, [[0, 1], [2]]),
        ([2, 3, 5, 6], 8, [[0, 3], [1, 2]]),
        ([2, 4, 4, 2, 4], 8, [[1, 2], [0, 3, 4]]),
        ([1, 9, 1], 8, [[1], [0, 2]]),
        ([2, 3, 7], 5, [[2], [0, 1]]),
        ([], 8, []),
    ],
)
def test_the_longest_is_placed_first_and_each_goes_into_the_first_row_with_room(
    lengths: list[int], max_tokens: int, rows: list[list[int]]
) -> None:
    assert split_by_tokens(lengths, max_tokens) == rows


@given(st.lists(st.integers(1, 30)), st.integers(1, 20))
def test_every_length_is_in_one_row_and_rows_keep_the_limit_and_shrink(lengths: list[int], max_tokens: int) -> None:
    rows = split_by_tokens(lengths, max_tokens)
    assert sorted(place for row in rows for place in row) == list(range(len(lengths)))
    totals = [sum(lengths[place] for place in row) for row in rows]
    assert all(len(row) == 1 or total <= max_tokens for row, total in zip(rows, totals))
    assert totals == sorted(totals, reverse=True)


def test_halves_of_a_row_are_the_packs_of_their_sequences(model) -> None:
    mixer = Mixer(model.config, 0)
    examples = [mixer.example(number) for number in (2, 0, 1, 1)]
    examples[3].images[0] = examples[2].images[0]  # shown in two sequences
    examples[3].input_ids = list(examples[2].input_ids)
    examples[3].loss_mask = list(examples[2].loss_mask)
    whole = pack(examples)
    first, second = whole.halves()
    cut = len(first.examples)
    for found, wanted in ((first, pack(examples[:cut])), (second, pack(examples[cut:]))):
        assert vars(found).keys() == vars(wanted).keys()
        for name, value in vars(wanted).items():
            same = torch.equal if isinstance(value, torch.Tensor) else operator.eq
            assert same(getattr(found, name), value), name


def test_rows_are_split_until_they_are_short_enough_or_one_sequence(model) -> None:
    mixer = Mixer(model.config, 0)
    examples = [mixer.example(0) for _ in range(5)]
    row = pack(examples)
    assert split_rows([row], None) == [row] and split_rows([row], row.num_tokens) == [row]
    apart = split_rows([row], 1)
    assert [len(part.examples) for part in apart] == [1] * 5
    assert torch.equal(torch.cat([part.input_ids for part in apart], 1), row.input_ids)
