"""The tiny model's tokenizer and configuration."""

import pytest
import torch

from looktwice.demo import task, tiny
from looktwice.messages import Conversation, user
from looktwice.processing.packing import pack
from looktwice.processing.processor import VISUAL_TOKENS


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.build_tokenizer()


def test_colours_cells_and_digits_are_single_tokens(tokenizer) -> None:
    for word in [f" {colour}" for colour in task.COLOURS] + [f" {cell}" for cell in task.CELLS] + list("0123456789"):
        assert len(tokenizer.encode(word)) == 1, word


def test_every_digit_of_a_box_is_its_own_token(tokenizer) -> None:
    assert tokenizer.tokenize("[624, 112]") == ["[", "6", "2", "4", ",", "Ġ", "1", "1", "2", "]"]


def test_any_text_survives_a_round_trip(tokenizer) -> None:
    for text in ("Grüße, 世界! 🙂\n\n\ttab", "<think>\nx\n</think>\n\n<answer>7</answer>", "a  b\r\n"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_tags_are_tokens_but_not_special_and_chat_tokens_are_special(tokenizer) -> None:
    for tag in (*tiny.TAG_TOKENS, *tiny.CHAT_TOKENS, *VISUAL_TOKENS):
        assert len(tokenizer.encode(tag)) == 1
    assert set(tokenizer.all_special_ids).isdisjoint(tokenizer.convert_tokens_to_ids(list(tiny.TAG_TOKENS)))
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.pad_token == "<|endoftext|>"


def test_building_the_tokenizer_twice_gives_the_same_vocabulary(tokenizer) -> None:
    assert tiny.build_tokenizer().get_vocab() == tokenizer.get_vocab()


def test_visual_ids_are_the_last_seven_of_the_vocabulary(tokenizer) -> None:
    config = tiny.build_config(tokenizer)
    assert config.visual_token_ids == tuple(range(len(tokenizer) - 7, len(tokenizer)))
    assert config.vocab_size == len(tokenizer)


def test_the_model_is_tiny_and_runs_on_a_prompt(tokenizer) -> None:
    config = tiny.build_config(tokenizer)
    model = tiny.build_model(config, seed=0)
    assert 1_000_000 < sum(weight.numel() for weight in model.parameters()) < 2_500_000
    processor = tiny.build_processor(tokenizer, config)
    board = task.Board(size=task.SIZES[0], colours=tuple(task.COLOURS), digits=tuple(range(9)))
    image = task.draw_board(board, tiny.np.random.default_rng(0))
    conversation = Conversation(messages=(user(task.question(board, "red"), image),))
    inputs = pack([processor.encode(conversation, purpose="prompt")]).model_inputs()
    inputs.pop("loss_mask")
    with torch.no_grad():
        logits = model(**inputs).logits
    assert logits.shape[-1] == len(tokenizer) and logits.isfinite().all()


def test_the_same_seed_gives_the_same_model(tokenizer) -> None:
    config = tiny.build_config(tokenizer)
    first, again = tiny.build_model(config, seed=1), tiny.build_model(config, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters()))
