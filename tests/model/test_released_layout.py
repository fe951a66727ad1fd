"""The released checkpoints, tensor by tensor: names, shapes and counts of 2B and 9B, built without memory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from looktwice.model.configuration import Ovis2_5Config
from looktwice.model.modeling import Ovis2_5ForConditionalGeneration
from looktwice.model.weights import released_state

RELEASED_9B = Path(__file__).parents[3] / "shared" / "ovis2_5_9b"
VISION_WIDTH, VISION_MLP, NUM_VISION_LAYERS, NUM_WORDS = 1152, 4304, 27, 65532
VOCABULARY = 151936

Shape = tuple[int, ...]


def llm_config(width: int, mlp: int, layers: int, heads: int, **others: object) -> dict[str, object]:
    return {
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": VOCABULARY,
        "rope_theta": 1000000,
        **others,
    }


SIZES = {
    # as in the released files: the field is absent for 9B, and at top level for both
    "9B": llm_config(4096, 12288, 36, 32),
    "2B": llm_config(2048, 6144, 28, 16, tie_word_embeddings=True),
}


def released_shapes(llm: dict[str, object]) -> dict[str, Shape]:
    """The table of the released files (names and shapes)."""
    width, mlp, heads = int(llm["hidden_size"]), int(llm["intermediate_size"]), int(llm["num_attention_heads"])
    shapes: dict[str, Shape] = {"llm.model.embed_tokens.weight": (VOCABULARY, width), "llm.model.norm.weight": (width,)}
    if not llm.get("tie_word_embeddings"):
        shapes["llm.lm_head.weight"] = (VOCABULARY, width)
    for number in range(int(llm["num_hidden_layers"])):
        layer = f"llm.model.layers.{number}"
        shapes |= {
            f"{layer}.self_attn.q_proj.weight": (heads * 128, width),
            f"{layer}.self_attn.k_proj.weight": (8 * 128, width),
            f"{layer}.self_attn.v_proj.weight": (8 * 128, width),
            f"{layer}.self_attn.o_proj.weight": (width, heads * 128),
            f"{layer}.self_attn.q_norm.weight": (128,),
            f"{layer}.self_attn.k_norm.weight": (128,),
            f"{layer}.mlp.gate_proj.weight": (mlp, width),
            f"{layer}.mlp.up_proj.weight": (mlp, width),
            f"{layer}.mlp.down_proj.weight": (width, mlp),
            f"{layer}.input_layernorm.weight": (width,),
            f"{layer}.post_attention_layernorm.weight": (width,),
        }
    tower = "visual_tokenizer.vit.vision_model"
    shapes |= {
        f"{tower}.embeddings.patch_embedding.weight": (VISION_WIDTH, 3, 16, 16),
        f"{tower}.embeddings.patch_embedding.bias": (VISION_WIDTH,),
        f"{tower}.embeddings.position_embedding.weight": (1024, VISION_WIDTH),
        f"{tower}.post_layernorm.weight": (VISION_WIDTH,),
        f"{tower}.post_layernorm.bias": (VISION_WIDTH,),
        "visual_tokenizer.head.0.weight": (NUM_WORDS, 4 * VISION_WIDTH),
        "visual_tokenizer.head.1.weight": (NUM_WORDS,),
        "visual_tokenizer.head.1.bias": (NUM_WORDS,),
        "vte.weight": (65536, width),
    }
    linears = {f"self_attn.{name}_proj": (VISION_WIDTH, VISION_WIDTH) for name in ("q", "k", "v", "out")}
    linears |= {"mlp.fc1": (VISION_MLP, VISION_WIDTH), "mlp.fc2": (VISION_WIDTH, VISION_MLP)}
    for number in range(NUM_VISION_LAYERS):
        layer = f"{tower}.encoder.layers.{number}"
        for name, shape in linears.items():
            shapes |= {f"{layer}.{name}.weight": shape, f"{layer}.{name}.bias": shape[:1]}
        for norm in ("layer_norm1", "layer_norm2"):
            shapes |= {f"{layer}.{norm}.weight": (VISION_WIDTH,), f"{layer}.{norm}.bias": (VISION_WIDTH,)}
    return shapes


def build(llm: dict[str, object]) -> Ovis2_5ForConditionalGeneration:
    with torch.device("meta"):
        return Ovis2_5ForConditionalGeneration(Ovis2_5Config(llm_config=llm)).to(torch.bfloat16)


@pytest.mark.parametrize("size", ["9B", "2B"])
def test_names_and_shapes_on_disk_are_those_of_the_released_files(size: str) -> None:
    written = {name: tuple(tensor.shape) for name, tensor in released_state(build(SIZES[size])).items()}
    assert written == released_shapes(SIZES[size])


@pytest.mark.parametrize(
    ("size", "num_tensors", "num_parameters"), [("9B", 840, 9_174_807_784), ("2B", 751, 2_570_429_672)]
)
def test_the_counts_are_the_published_ones(size: str, num_tensors: int, num_parameters: int) -> None:
    state = released_state(build(SIZES[size]))
    assert (len(state), sum(tensor.numel() for tensor in state.values())) == (num_tensors, num_parameters)
    assert {tensor.dtype for tensor in state.values()} == {torch.bfloat16}


@pytest.mark.skipif(not RELEASED_9B.is_dir(), reason="needs the released 9B files")
def test_the_released_config_builds_the_tensors_of_the_released_index() -> None:
    with torch.device("meta"):
        model = Ovis2_5ForConditionalGeneration(Ovis2_5Config.from_pretrained(RELEASED_9B))
    index = json.loads((RELEASED_9B / "model.safetensors.index.json").read_text(encoding="utf-8"))
    assert set(released_state(model)) == set(index["weight_map"])
