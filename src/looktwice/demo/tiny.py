"""The tiny model: the exact Ovis2.5 architecture at about one and a half million parameters, and its tokenizer."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

from looktwice.demo import task
from looktwice.model.configuration import Ovis2_5Config
from looktwice.model.modeling import Ovis2_5ForConditionalGeneration
from looktwice.processing.chat_template import EARLY_STOP
from looktwice.processing.processor import VISUAL_TOKENS, Ovis2_5Processor

NUM_MERGES = 320
SKILL_SENTENCES = (
    "List the tiles.",
    "Where is the red tile? The picture is 768 x 768.",
    "Give the box of cell A. The picture is 768 x 768.",
    "Which digit is this?",
    "Answer in tags.",
    "No box found. Write four numbers in square brackets.",
    "The box lies outside the picture.",
)
"""Sentence forms beside those of the task, for the merges."""
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Qwen's pre-tokenizer: every digit is a token of its own."""
CHAT_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TAG_TOKENS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")
VISUAL_VOCAB_SIZE = 260
VISUAL_TABLE_STD = 15.0
"""About 0.06 times the visual vocabulary: small differences of probability then move the embedding."""
ROPE_THETA = 1000.0
BRANCH_STD = 0.02
"""Of what attention and MLP add to the stream: small beside the embeddings' 1, so that tokens keep their identity."""
CONSTANT = 8.0
"""First entry of every embedding, of text and of pictures: what heads that look by place alone can hold on to."""
NUM_PLACE_PAIRS = 6
PLACE_GAIN = 3.0


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE trained on the task's own sentences; any other text falls back to bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=256 + NUM_MERGES,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in CHAT_TOKENS])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in TAG_TOKENS])
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in VISUAL_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )


def build_config(tokenizer: PreTrainedTokenizerFast) -> Ovis2_5Config:
    ids = tokenizer.get_vocab()
    return Ovis2_5Config(
        llm_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "max_position_embeddings": 1024,
            "rope_parameters": {"rope_type": "default", "rope_theta": ROPE_THETA},
            # 0.02, usual at larger widths, does not train at this one
            "initializer_range": 0.08,
            "tie_word_embeddings": False,
            "bos_token_id": None,
            "eos_token_id": tokenizer.convert_tokens_to_ids("<|im_end|>"),
            "pad_token_id": tokenizer.convert_tokens_to_ids("<|endoftext|>"),
        },
        vit_config={
            "hidden_size": 96,
            "intermediate_size": 288,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "patch_size": 8,
            "image_size": 96,
            "hidden_stride": 2,
            "initializer_range": 0.08,
        },
        visual_vocab_size=VISUAL_VOCAB_SIZE,
        image_placeholder_id=ids["<image>"],
        video_placeholder_id=ids["<video>"],
        image_token_id=ids["<ovis_visual_atom>"],
        image_start_token_id=ids["<ovis_image_start>"],
        image_end_token_id=ids["<ovis_image_end>"],
        video_start_token_id=ids["<ovis_video_start>"],
        video_end_token_id=ids["<ovis_video_end>"],
    )


def build_model(config: Ovis2_5Config, *, seed: int) -> Ovis2_5ForConditionalGeneration:
    """A fresh model in float32, drawn so that a tower and a decoder this small learn within minutes."""
    torch.manual_seed(seed)
    model = Ovis2_5ForConditionalGeneration(config)
    decoder = model.model.language_model
    with torch.no_grad():
        model.model.vte.weight.normal_(0.0, VISUAL_TABLE_STD)
        decoder.embed_tokens.weight.normal_(0.0, 1.0)
        for layer in decoder.layers[1:]:
            layer.self_attn.o_proj.weight.normal_(0.0, BRANCH_STD)
        for layer in decoder.layers:
            layer.mlp.down_proj.weight.normal_(0.0, BRANCH_STD)
        model.model.vte.weight[:, 0] = CONSTANT
        decoder.embed_tokens.weight[:, 0] = CONSTANT
        _look_back(decoder.layers[0].self_attn)
    return model


def _look_back(attention: Qwen3Attention) -> None:
    """Let the first two heads, which share a key head, start by attending one and two places back.

    A decoder learns to copy from a list once it knows what stands before each token. Left to itself this one finds
    such heads only after a thousand steps and more at chance; with them copying is learned in about a hundred.
    """
    width, half = attention.head_dim, attention.head_dim // 2
    pairs = torch.arange(NUM_PLACE_PAIRS)
    frequencies = ROPE_THETA ** (-pairs / half)
    query, key = attention.q_proj.weight, attention.k_proj.weight
    query[: 2 * width] *= 0.1
    key[:width] *= 0.1
    key[pairs, 0] = 1.0
    for head, places_back in enumerate((1, 2)):
        query[head * width + pairs, 0] = (frequencies * places_back).cos()
        query[head * width + half + pairs, 0] = -(frequencies * places_back).sin()
    attention.q_norm.weight[pairs] = PLACE_GAIN
    attention.q_norm.weight[half + pairs] = PLACE_GAIN


def build_processor(tokenizer: PreTrainedTokenizerFast, config: Ovis2_5Config) -> Ovis2_5Processor:
    return Ovis2_5Processor(tokenizer, config, task.PIXEL_POLICY)


def _corpus() -> Iterator[str]:
    """Every sentence form of the task often enough to make its words single tokens."""
    rng = np.random.default_rng(0)
    for _ in range(300):
        board = task.sample_board(rng)
        colour = str(rng.choice(board.colours))
        yield "user\nassistant\nsystem\n"
        yield task.question(board, colour)
        # tags are tokens of their own, so the text between them is what the merges see
        yield from task.rationale(board, colour).replace("</think>", "<think>").split("<think>")
        yield from SKILL_SENTENCES
        yield EARLY_STOP
