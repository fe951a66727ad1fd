"""Features of frozen weights: kept by content up to a cap, in memory or on disk, and as good as computed again."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.model.mixer import Mixer

from looktwice.errors import ConfigError
from looktwice.model.exact import ExactMode
from looktwice.model.modeling import Ovis2_5ForConditionalGeneration
from looktwice.model.vision_cache import VisionCache
from looktwice.processing.packing import PackedBatch, pack


@pytest.fixture
def frozen(model: Ovis2_5ForConditionalGeneration) -> Ovis2_5ForConditionalGeneration:
    model = copy.deepcopy(model)
    model.model.visual_tokenizer.requires_grad_(False)
    model.model.vte.requires_grad_(False)
    return model


@pytest.fixture
def batch(model: Ovis2_5ForConditionalGeneration) -> PackedBatch:
    mixer = Mixer(model.config, 0)
    return pack([mixer.example(2), mixer.example(1)])


def run(cache: VisionCache, batch: PackedBatch) -> torch.Tensor:
    inputs = batch.model_inputs()
    given = cache.inputs(inputs.pop("pixel_values"), batch.image_grid_thw)
    assert not any(value.requires_grad for value in given.values())
    return cache.model(**inputs, **given).logprobs


@pytest.mark.parametrize(("trained", "kind"), [("", "image_features"), ("model.vte.weight", "tower_features")])
def test_logprobs_are_those_without_a_cache_and_the_tower_runs_once(frozen, batch, trained: str, kind: str) -> None:
    if trained:
        frozen.get_parameter(trained).requires_grad_(True)
    cache = VisionCache(frozen, max_bytes=10**9)
    wanted = frozen(**batch.model_inputs()).logprobs
    assert cache.kind == kind
    for _ in range(2):
        torch.testing.assert_close(run(cache, batch), wanted, atol=1e-5, rtol=1e-5)
    assert cache.num_encoded == 3
    for found, expected in zip(gradients(frozen, run(cache, batch)), gradients(frozen, wanted), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-4 * float(expected.abs().max()), rtol=1e-4)


def gradients(model: torch.nn.Module, logprobs: torch.Tensor) -> list[torch.Tensor]:
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    return [each for each in torch.autograd.grad(logprobs.sum(), trained, allow_unused=True) if each is not None]


def test_a_full_cache_keeps_what_it_has_and_computes_the_rest(frozen, batch) -> None:
    wanted = run(VisionCache(frozen, max_bytes=10**9), batch)
    sizes = [grid[1] * grid[2] // 4 * 4 * frozen.config.hidden_size for grid in batch.image_grid_thw.tolist()]
    cache = VisionCache(frozen, max_bytes=sizes[0])
    for _ in range(2):
        torch.testing.assert_close(run(cache, batch), wanted, atol=1e-5, rtol=1e-5)
    assert (cache.num_bytes, cache.num_encoded) == (sizes[0], 5)


def test_a_folder_serves_the_next_run_and_only_the_same_weights_and_precision(frozen, batch, tmp_path: Path) -> None:
    def encoded(change: Callable[[], object] = lambda: None) -> int:
        change()
        cache = VisionCache(frozen, max_bytes=10**9, folder=tmp_path)
        torch.testing.assert_close(run(cache, batch), frozen(**batch.model_inputs()).logprobs, atol=1e-5, rtol=1e-5)
        return cache.num_encoded

    assert (encoded(), encoded()) == (3, 0)
    assert len(list(tmp_path.rglob("*.safetensors"))) == 3
    cache = VisionCache(frozen, max_bytes=10**9, folder=tmp_path)
    with torch.autocast("cpu", torch.bfloat16):
        run(cache, batch)
    assert cache.num_encoded == 3
    weight = frozen.model.visual_tokenizer.vit.encoder.layers[0].mlp.fc1.weight
    assert encoded(lambda: weight.data.mul_(1.5)) == 3


def test_features_of_exact_mode_are_kept_apart(frozen, batch) -> None:
    """They differ in the last bits."""
    cache = VisionCache(frozen, max_bytes=10**9)
    run(cache, batch)
    with torch.no_grad(), ExactMode():
        run(cache, batch)
    assert cache.num_encoded == 6


def test_it_says_how_many_pictures_it_had_since_it_was_asked_last(frozen, batch) -> None:
    cache = VisionCache(frozen, max_bytes=10**9)
    run(cache, batch)
    size = {"memory/vision_cache_gb": cache.num_bytes / 1e9}
    assert cache.take_metrics() == {**size, "perf/vision_cache_hits": 0}
    run(cache, batch)
    assert cache.take_metrics() == {**size, "perf/vision_cache_hits": 1}
    assert cache.take_metrics() == size


def test_a_broken_file_is_computed_anew(frozen, batch, tmp_path: Path, capsys) -> None:
    expected = run(VisionCache(frozen, max_bytes=10**9, folder=tmp_path), batch)
    for path in tmp_path.rglob("*.safetensors"):
        path.write_bytes(b"cut")
        path.with_name("notes.safetensors").write_text("of somebody else")
    torch.testing.assert_close(run(VisionCache(frozen, max_bytes=10**9, folder=tmp_path), batch), expected)
    assert capsys.readouterr().out.count("a broken file of the vision cache") == 3
    again = VisionCache(frozen, max_bytes=10**9, folder=tmp_path)
    run(again, batch)
    assert again.num_encoded == 0


def test_a_full_disk_ends_the_cache_and_not_the_run(frozen, batch, tmp_path: Path, monkeypatch, capsys) -> None:
    def full(tensors: object, path: Path) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("looktwice.model.vision_cache.save_file", full)
    cache = VisionCache(frozen, max_bytes=10**9, folder=tmp_path)
    torch.testing.assert_close(run(cache, batch), frozen(**batch.model_inputs()).logprobs, atol=1e-5, rtol=1e-5)
    assert capsys.readouterr().out.count("keeps nothing more") == 1


def test_a_tower_that_is_trained_is_refused(model: Ovis2_5ForConditionalGeneration) -> None:
    with pytest.raises(ConfigError, match="vision_cache: the vision tower is trained"):
        VisionCache(model, max_bytes=1)
