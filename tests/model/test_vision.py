"""The tower: order of patches, windows, frames and pictures that do not see each other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from looktwice.model.configuration import Siglip2NavitConfig
from looktwice.model.vision import VisionTower, block_order

GRIDS = [(1, 8, 14), (2, 4, 8), (1, 2, 2)]


def make_tower(fullatt_block_indexes: str | None = None, **fields: Any) -> VisionTower:
    """Random weights with a spread that makes attention matter; windows of 6 x 6 patches."""
    config = Siglip2NavitConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=64,
        patch_size=16,
        window_size=112,
        fullatt_block_indexes=fullatt_block_indexes,
        **fields,
    )
    torch.manual_seed(0)
    tower = VisionTower(config).eval()
    with torch.no_grad():
        for weight in tower.parameters():
            weight.normal_(0, 0.2)
    return tower


def make_pixels(grids: list[tuple[int, int, int]]) -> Tensor:
    num_patches = sum(t * h * w for t, h, w in grids)
    return torch.randn(num_patches, 3 * 16 * 16, generator=torch.Generator().manual_seed(1))


def places(grids: list[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """Frame number, row and column of each patch in the order the tower takes them."""
    found, frame = [], 0
    for t, h, w in grids:
        for _ in range(t):
            for block_row in range(0, h, 2):
                for block_column in range(0, w, 2):
                    for i in range(2):
                        for j in range(2):
                            found.append((frame, block_row + i, block_column + j))
            frame += 1
    return found


def reference(tower: VisionTower, pixels: Tensor, grids: list[tuple[int, int, int]]) -> Tensor:
    """The same tower with every attention as one masked product over all patches."""
    patches = places(grids)
    frequencies = [10000 ** (-j / 4) for j in range(4)]
    angles = torch.tensor([[r * f for f in frequencies] + [c * f for f in frequencies] for _, r, c in patches])

    def rotated(x: Tensor) -> Tensor:
        first, second = x[..., :8], x[..., 8:]
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).transpose(0, 1)

    window_of = [(frame, row // 6, column // 6) for frame, row, column in patches]
    in_frame = torch.tensor([[a[0] == b[0] for b in patches] for a in patches])
    in_window = torch.tensor([[a == b for b in window_of] for a in window_of])
    hidden = tower.embeddings(pixels, grids)
    for index, layer in enumerate(tower.encoder.layers):
        normed, attention = layer.layer_norm1(hidden), layer.self_attn
        query, key, value = (
            projection(normed).view(-1, 2, 16) for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        mask = in_frame if index in tower.config.full_attention_layers else in_window
        out = F.scaled_dot_product_attention(rotated(query), rotated(key), value.transpose(0, 1), attn_mask=mask)
        hidden = hidden + attention.out_proj(out.transpose(0, 1).flatten(1))
        hidden = hidden + layer.mlp(layer.layer_norm2(hidden))
    return hidden.view(-1, 4 * 32)


@pytest.mark.parametrize("fullatt_block_indexes", [None, "0", "0|2", "0|1|7"])
@torch.no_grad()
def test_attention_reaches_the_frame_in_full_layers_and_the_window_in_others(fullatt_block_indexes: str | None) -> None:
    tower, pixels = make_tower(fullatt_block_indexes), make_pixels(GRIDS)
    features = tower(pixels, torch.tensor(GRIDS))
    torch.testing.assert_close(features, reference(tower, pixels, GRIDS), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_an_image_wider_than_a_window_comes_out_otherwise_with_windows() -> None:
    pixels, grid = make_pixels([(1, 8, 14)]), torch.tensor([(1, 8, 14)])
    assert not torch.allclose(make_tower("0")(pixels, grid), make_tower(None)(pixels, grid), atol=1e-2)


@torch.no_grad()
def test_images_together_give_the_features_they_give_alone() -> None:
    tower, pixels = make_tower(), make_pixels(GRIDS)
    sizes = [t * h * w for t, h, w in GRIDS]
    alone = [tower(part, torch.tensor([grid])) for part, grid in zip(pixels.split(sizes), GRIDS)]
    torch.testing.assert_close(tower(pixels, torch.tensor(GRIDS)), torch.cat(alone), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("fullatt_block_indexes", [None, "0"])
@torch.no_grad()
def test_the_frames_of_a_video_are_seen_as_separate_images(fullatt_block_indexes: str | None) -> None:
    tower, pixels = make_tower(fullatt_block_indexes), make_pixels([(2, 4, 8)])
    as_video = tower(pixels, torch.tensor([(2, 4, 8)]))
    as_images = tower(pixels, torch.tensor([(1, 4, 8), (1, 4, 8)]))
    torch.testing.assert_close(as_video, as_images, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_the_final_norm_of_the_checkpoint_is_not_applied() -> None:
    tower, pixels = make_tower(), make_pixels([(1, 4, 4)])
    before = tower(pixels, torch.tensor([(1, 4, 4)]))
    tower.post_layernorm.weight.zero_()
    assert torch.equal(tower(pixels, torch.tensor([(1, 4, 4)])), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_bytes_and_normalised_floats_give_the_same_features(dtype: torch.dtype) -> None:
    tower, grids = make_tower().to(dtype), torch.tensor([(1, 4, 4)])
    pixels = torch.randint(0, 256, (16, 768), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(tower(pixels, grids), tower(pixels / 127.5 - 1, grids))


def test_patches_come_in_blocks_of_four_from_top_left_to_bottom_right() -> None:
    assert block_order(4, 6, 2).tolist() == [0, 1, 6, 7, 2, 3, 8, 9, 4, 5, 10, 11] + [
        12, 13, 18, 19, 14, 15, 20, 21, 16, 17, 22, 23
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["position_embedding.weight", "patch_embedding.weight"])
def test_the_config_decides_what_the_embeddings_are(name: str) -> None:
    released = make_tower().embeddings.state_dict()
    other = make_tower(preserve_original_pe=False, num_patches=9).embeddings.state_dict()
    shapes = {"position_embedding.weight": ((16, 32), None), "patch_embedding.weight": ((32, 3, 16, 16), (32, 768))}
    found = tuple(tuple(state[name].shape) if name in state else None for state in (released, other))
    assert found == shapes[name]


@torch.no_grad()
def test_without_a_position_table_and_rotation_patches_of_one_kind_are_all_alike() -> None:
    tower = make_tower(preserve_original_pe=False, use_rope=False)
    features = tower(torch.ones(16, 768), torch.tensor([(1, 4, 4)]))
    torch.testing.assert_close(features, features[:1].expand_as(features))


def test_attention_of_the_tower_can_be_set_alone() -> None:
    tower, pixels, grid = make_tower("0"), make_pixels(GRIDS), torch.tensor(GRIDS)
    with torch.no_grad():
        wanted = tower(pixels, grid)
        tower.set_attn_implementation("eager")
        assert tower.config._attn_implementation == "eager"
        torch.testing.assert_close(tower(pixels, grid), wanted, atol=1e-4, rtol=1e-4)
