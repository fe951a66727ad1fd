"""Packed attention against one masked product."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from tests.model.mixer import Mixer
from torch.nn import functional as F

from looktwice.errors import ConfigError
from looktwice.model import attention
from looktwice.model.attention import packed_attention, packed_inputs, pick_attention
from looktwice.processing.packing import pack


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("num_key_heads", [1, 2, 4])
def test_no_sequence_sees_another(is_causal: bool, num_key_heads: int) -> None:
    torch.manual_seed(0)
    query = torch.randn(1, 4, 9, 8)
    key, value = torch.randn(1, num_key_heads, 9, 8), torch.randn(1, num_key_heads, 9, 8)
    owner = torch.tensor([0, 0, 0, 1, 2, 2, 2, 2, 2])
    mask = owner[:, None] == owner[None]
    if is_causal:
        mask = mask.tril()
    wanted = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=0.3, enable_gqa=True)
    cu_seqlens = [0, 3, 4, 9]
    packed = packed_attention(query, key, value, cu_seqlens, scale=0.3, is_causal=is_causal)
    torch.testing.assert_close(packed, wanted)


def test_siblings_see_their_prompt_and_not_each_other() -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(1, 4, 9, 8), torch.randn(1, 2, 9, 8), torch.randn(1, 2, 9, 8)
    cu_seqlens, parents = [0, 3, 5, 7, 9], [-1, 0, 0, -1]
    owner = torch.tensor([0, 0, 0, 1, 1, 2, 2, 3, 3])
    mask = ((owner[:, None] == owner).tril()) | ((owner[:, None] % 3 > 0) & (owner == 0))
    wanted = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=0.3, enable_gqa=True)
    packed = packed_attention(query, key, value, cu_seqlens, scale=0.3, is_causal=True, parents=parents)
    torch.testing.assert_close(packed, wanted)
    masks = [
        packed_inputs(cu_seqlens, kind, is_causal=True, like=query, parents=parents)["attention_mask"]
        for kind in ("eager", "flex_attention")
    ]
    places = torch.arange(9)
    assert torch.equal(masks[0][0, 0] == 0, mask)
    assert torch.equal(masks[1].mask_mod(None, None, places[:, None], places[None]), mask)


def test_an_attention_that_cannot_share_prompts_says_so() -> None:
    with pytest.raises(ValueError, match="flash_attention_2.*cannot share prompts"):
        packed_inputs([0, 2, 4], "flash_attention_2", is_causal=True, like=torch.zeros(1), parents=[-1, 0])


def test_dropout_reaches_the_product() -> None:
    query = torch.ones(1, 1, 4, 8)
    dropped = packed_attention(query, query, query, [0, 4], scale=1.0, is_causal=False, dropout=1.0)
    assert not dropped.any()


@pytest.mark.parametrize("is_causal", [False, True])
def test_the_masks_of_eager_and_flex_attention_show_the_same_tokens(is_causal: bool) -> None:
    like, cu_seqlens = torch.zeros(1), [0, 1, 4, 6]
    additive = packed_inputs(cu_seqlens, "eager", is_causal=is_causal, like=like)["attention_mask"]
    blocks = packed_inputs(cu_seqlens, "flex_attention", is_causal=is_causal, like=like)["attention_mask"]
    places = torch.arange(6)
    flex = blocks.mask_mod(None, None, places[:, None], places[None])
    pairs = {(0, 0), (1, 1), (2, 1), (2, 2), (3, 1), (3, 2), (3, 3), (4, 4), (5, 4), (5, 5)}
    seen = pairs if is_causal else pairs | {(b, a) for a, b in pairs}
    assert {(int(a), int(b)) for a, b in flex.nonzero()} == seen
    assert {(int(a), int(b)) for a, b in (additive[0, 0] == 0).nonzero()} == seen


def test_an_attention_that_would_mix_sequences_is_refused() -> None:
    with pytest.raises(ValueError, match='not "paged|eager"'):
        packed_inputs([0, 2], "paged|eager", is_causal=True, like=torch.zeros(1))


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """GPUs of these compute capabilities, flash-attn installed or not."""

    def give(*capabilities: tuple[int, int], is_installed: bool = True) -> None:
        monkeypatch.setattr(attention, "is_flash_attn_2_available", lambda: is_installed)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(capabilities))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
        # as torch numbers a device: by itself, or by its name, of which `cuda` is the present one
        places = {"cuda": 0} | {f"cuda:{place}": place for place in range(len(capabilities))}
        monkeypatch.setattr(
            torch.cuda, "get_device_capability", lambda device: capabilities[places.get(device, device)]
        )

    return give


@pytest.mark.parametrize(
    ("device", "is_bf16", "is_installed", "capabilities", "picked"),
    [
        ("cuda", True, True, [(9, 0), (9, 0)], "flash_attention_2"),
        ("cuda:1", True, True, [(7, 5), (8, 0)], "flash_attention_2"),
        ("auto", True, True, [(9, 0), (8, 0)], "flash_attention_2"),
        ("cuda", True, False, [(9, 0), (9, 0)], "packed_varlen"),
        ("auto", True, False, [(9, 0), (7, 5)], "sdpa"),
        ("cuda", False, True, [(9, 0), (9, 0)], "sdpa"),
        ("cuda:1", True, True, [(9, 0), (7, 5)], "sdpa"),
        ("auto", True, True, [(9, 0), (7, 5)], "sdpa"),
        ("cpu", True, True, [(9, 0), (9, 0)], "sdpa"),
        ("auto", True, True, [], "sdpa"),
    ],
)
def test_auto_is_flash_attention_where_it_can_run(device, is_bf16, is_installed, capabilities, picked, gpus) -> None:
    gpus(*capabilities, is_installed=is_installed)
    assert pick_attention("auto", device, is_bf16=is_bf16) == picked
    assert pick_attention("eager", device, is_bf16=is_bf16) == "eager"


@pytest.mark.parametrize(
    ("device", "is_bf16", "capability"), [("cpu", True, (9, 0)), ("cuda", False, (9, 0)), ("cuda", True, (7, 5))]
)
def test_flash_attention_is_refused_where_it_was_asked_for_and_cannot_run(device, is_bf16, capability, gpus) -> None:
    gpus(capability)
    with pytest.raises(ConfigError, match="flash_attention_2 runs in bfloat16, on a CUDA GPU .* add --bf16"):
        pick_attention("flash_attention_2", device, is_bf16=is_bf16)


def test_flash_attention_that_can_run_is_what_was_asked_for(gpus) -> None:
    gpus((9, 0))
    assert pick_attention("flash_attention_2", "cuda", is_bf16=True) == "flash_attention_2"


def varlen_by_sdpa(query, key, value, starts, key_starts, longest, longest_key, *, scale, window_size, enable_gqa):
    """What `torch.nn.attention.varlen.varlen_attn` is for half precision on a GPU, by its documentation: causal from
    the end of the keys."""
    lengths, key_lengths = starts.diff().tolist(), key_starts.diff().tolist()
    assert (starts.dtype, key_starts.dtype, longest, longest_key) == (
        *[torch.int32] * 2,
        max(lengths),
        max(key_lengths),
    )
    assert query.dtype == key.dtype == value.dtype == torch.bfloat16
    assert window_size in ((-1, 0), (-1, -1)) and enable_gqa == (query.shape[1] != key.shape[1])
    parts = []
    for q, k, v in zip(query.split(lengths), key.split(key_lengths), value.split(key_lengths)):
        seen = torch.ones(len(q), len(k), dtype=torch.bool)
        if window_size == (-1, 0):
            seen = seen.tril(len(k) - len(q))
        q, k, v = (each.transpose(0, 1)[None] for each in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale, enable_gqa=enable_gqa)
        parts.append(out[0].transpose(0, 1))
    return torch.cat(parts)


def test_varlen_attention_gives_what_the_loop_gives_in_both_towers(model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_by_sdpa)
    mixer = Mixer(model.config, 0)
    prompt, end = mixer.example(1), int(min(model.config.visual_token_ids)) - 1
    prompt.append([end], is_trained=False)
    prompt.loss_mask = [False] * len(prompt)
    siblings = [prompt.sibling(), prompt.sibling()]
    for one, ids in zip(siblings, ([5, 6], [7, 8, 9])):
        one.append(ids, is_trained=True)
    inputs = pack([mixer.example(2), *siblings, mixer.example(0)], share_prompts=True).model_inputs()
    assert inputs["parents"].tolist() == [-1, -1, 1, 1, -1]
    other = copy.deepcopy(model)
    other.set_attn_implementation(attention.PACKED_VARLEN)
    padded = {"input_ids": torch.tensor([[5, 6, 7]]), "attention_mask": torch.tensor([[0, 1, 1]])}
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(other(**inputs).logprobs, model(**inputs).logprobs, atol=0.05, rtol=0.02)
        torch.testing.assert_close(other(**padded).logits, model(**padded).logits)


def test_a_packed_row_is_computed_without_waiting_for_the_device(model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors of the meta device have no values, so whatever reads one fails."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)  # the device has none
    mixer = Mixer(model.config, 0)
    batch = pack([mixer.example(2), mixer.example(1)])
    far = copy.deepcopy(model).to("meta")
    total = far(**batch.model_inputs("meta"), summed=True).logprobs.sum()
    total.backward()
    assert total.device.type == "meta" and far.lm_head.weight.grad is not None
