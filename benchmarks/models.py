"""The models that rollouts are measured on, and what one decode pass of each must read.

All share the tiny model's tokenizer and pixel policy, whose ids lie inside every vocabulary, so that all see the same
pictures and the same prompts. All but `tiny` have random weights.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import GenerationConfig

from looktwice.model.adapters import base_of
from looktwice.model.configuration import Ovis2_5Config
from looktwice.model.modeling import Ovis2_5ForConditionalGeneration
from looktwice.model.weights import TINY, load_model, locate

REAL_VOCABULARY, REAL_VISUAL_VOCABULARY = 151_936, 65_536
LONGEST = 4096


def layers(num: int, width: int, mlp: int, heads: int, key_heads: int, head_dim: int) -> dict[str, int]:
    return {
        "num_hidden_layers": num,
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        "head_dim": head_dim,
    }


DECODERS: dict[str, dict[str, Any]] = {
    "vocab": layers(4, 128, 384, 4, 2, 32) | {"vocab_size": REAL_VOCABULARY},
    "body": layers(16, 512, 1920, 8, 4, 64),
    "2B": layers(28, 2048, 6144, 16, 8, 128) | {"vocab_size": REAL_VOCABULARY, "tie_word_embeddings": True},
    "9B": layers(36, 4096, 12288, 32, 8, 128) | {"vocab_size": REAL_VOCABULARY},
}
"""`vocab`: 65M parameters, nearly all in the real vocabularies. `body`: 60M in the layers. Then the released shapes."""
TOWERS: dict[str, dict[str, int]] = {"vocab": {"hidden_size": 64, "intermediate_size": 192}}
"""What differs from the tiny model's vision tower, whose patches all have."""
REAL_TOWER = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}


def build(name: str, device: str) -> Ovis2_5ForConditionalGeneration:
    """In eval mode; float32 on a CPU, and 2B and 9B bfloat16. `generate` samples from the whole distribution, and no
    id ends what it writes."""
    if name == TINY:
        model = base_of(load_model(TINY, device=device))
        model.config.llm_config.max_position_embeddings = LONGEST  # rotary places go on; the long row needs them
    else:
        torch.manual_seed(0)
        with torch.device(device):
            dtype = torch.bfloat16 if name in ("2B", "9B") else torch.float32
            model = Ovis2_5ForConditionalGeneration._from_config(config_of(name), dtype=dtype)
    model.generation_config = GenerationConfig(do_sample=True, top_k=0, pad_token_id=0)
    return model.eval()


def config_of(name: str) -> Ovis2_5Config:
    """The tiny model's config with other sizes: its visual ids and patches stay."""
    fields = Ovis2_5Config.from_pretrained(locate(TINY)).to_dict()
    fields["llm_config"] |= {"initializer_range": 0.02, "max_position_embeddings": LONGEST, "layer_types": None}
    fields["llm_config"] |= DECODERS[name]
    fields["vit_config"] |= REAL_TOWER if name in ("2B", "9B") else TOWERS.get(name, {})
    if fields["llm_config"]["vocab_size"] == REAL_VOCABULARY:
        fields["visual_vocab_size"] = REAL_VISUAL_VOCABULARY
    return Ovis2_5Config(**fields)


def bytes_of_pass(model: Ovis2_5ForConditionalGeneration, num_rows: int, length: float) -> float:
    """What a decode pass cannot but read: layers and head once for all rows, and each row's own keys and values.

    layers + head + rows * length * num_layers * 2 * key_heads * head_dim * bytes of a number

    Sampling, activations and what is written are left out, so no engine reaches the bound. It counts every row's cache
    in full, which an engine that reads a shared prompt once per group may undercut.
    """
    decoder, config = model.model.language_model, model.config.llm_config
    weights = sum(weight.nbytes for weight in decoder.parameters()) - decoder.embed_tokens.weight.nbytes
    numbers_of_token = config.num_hidden_layers * 2 * config.num_key_value_heads * config.head_dim
    return weights + model.lm_head.weight.nbytes + num_rows * length * numbers_of_token * model.dtype.itemsize
