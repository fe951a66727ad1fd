"""One vLLM server: who is refused, how pictures travel, and the arithmetic of the two logprobs."""

from __future__ import annotations

import math
import sys
from base64 import b64decode
from collections.abc import Iterator
from threading import Thread

import msgpack
import numpy as np
import pytest
import torch
from tests.engine.fake_vllm import FakeVllm, serving

from looktwice.engine.sampling import Sampling
from looktwice.engine.vllm_server import Prompt, VllmServer, both_logprobs, encode_image, image_key, piece_of
from looktwice.errors import ConfigError
from looktwice.processing.images import PatchedImage
from looktwice.processing.processor import Ovis2_5Processor


@pytest.fixture
def fake() -> Iterator[FakeVllm]:
    with serving(FakeVllm()) as server:
        yield server


def prompt_with(sampling: Sampling, *, banned: tuple[int, ...] = (3,)) -> Prompt:
    return Prompt(
        ids=[1],
        images=[],
        max_new_tokens=1,
        sampling=sampling,
        seed=0,
        stop_ids=frozenset(),
        stop_texts=(),
        banned_ids=frozenset(banned),
    )


# -- who is refused


@pytest.mark.parametrize("version", ["0.10.1.1", "0.16.0", "0.31.0rc1"])
def test_a_version_with_the_towers_last_norm_or_never_tried_is_refused(fake, processor, version) -> None:
    fake.version = version
    with pytest.raises(ConfigError, match=f"vLLM {version} is older than 0.32, .* apply the vision tower's last norm"):
        VllmServer(fake.address, processor.config)


@pytest.mark.parametrize("version", ["0.32.0", "0.33.1+cpu", "1.0"])
def test_newer_versions_are_taken(fake, processor, version) -> None:
    fake.version = version
    assert VllmServer(fake.address, processor.config).max_length == 1024


def test_a_server_that_tells_other_logprobs_is_refused(fake, processor) -> None:
    fake.has_processed_logprobs = False
    with pytest.raises(ConfigError, match="start it with --enable-scale-out --logprobs-mode processed_logprobs"):
        VllmServer(fake.address, processor.config)


def test_an_address_where_nobody_answers_is_named(processor) -> None:
    with pytest.raises(ConfigError, match="http://127.0.0.1:1: no vLLM server that can be used .* start one:"):
        VllmServer("127.0.0.1:1", processor.config)


def test_the_extra_that_is_not_installed_is_named(processor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "msgpack", None)
    with pytest.raises(ConfigError, match=r"install looktwice\[vllm\]"):
        VllmServer("127.0.0.1:1", processor.config)


# -- the two logprobs

SCORES = torch.tensor([2.0, 1.0, 0.5, 1.5, -3.0])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("banned", [(3,), (3, 4)])
def test_the_plain_logprob_follows_from_the_one_drawn_and_the_banned_ids(temperature, banned) -> None:
    biased = SCORES.double().clone()
    biased[list(banned)] -= 100
    told = (biased / temperature).log_softmax(-1).tolist()
    others = [{"token_id": token, "logprob": told[token]} for token in (1, *banned)]
    sampling = Sampling(temperature=temperature)
    plain, drawn = both_logprobs({"logprob": told[1], "top_logprobs": others}, prompt_with(sampling, banned=banned))
    assert drawn == told[1]
    assert plain == pytest.approx(float((SCORES / temperature).log_softmax(-1)[1]), abs=1e-6)


def test_a_banned_id_so_unlikely_that_it_is_not_told_has_no_share() -> None:
    entry = {"logprob": -0.7, "top_logprobs": [{"token_id": 3, "logprob": -9999.0}]}
    assert both_logprobs(entry, prompt_with(Sampling(temperature=0.01))) == (-0.7, -0.7)


def test_greedy_draws_its_id_for_sure() -> None:
    entry = {"logprob": -0.7, "top_logprobs": [{"token_id": 3, "logprob": -101.0}]}
    plain, drawn = both_logprobs(entry, prompt_with(Sampling(temperature=0)))
    assert drawn == 0
    assert plain == pytest.approx(-0.7 - math.log1p(math.exp(-1.0)))


@pytest.mark.parametrize("field", [{"top_p": 0.9}, {"top_k": 3}, {"min_p": 0.1}, {"repetition_penalty": 1.1}])
def test_under_truncation_and_penalties_the_plain_logprob_is_not_known(field) -> None:
    entry = {"logprob": -0.7, "top_logprobs": [{"token_id": 3, "logprob": -9999.0}]}
    plain, drawn = both_logprobs(entry, prompt_with(Sampling(**field)))
    assert math.isnan(plain) and drawn == -0.7


def test_a_choice_as_a_real_server_streamed_it() -> None:
    """Recorded from vLLM 0.32.0."""
    others = [{"token_id": 220, "logprob": -9.5e-7, "rank": 1}, {"token_id": 3, "logprob": -121.8, "rank": 8}]
    choice = {
        "index": 0,
        "finish_reason": "stop",
        "stop_reason": 220,
        "token_ids": [220],
        "routed_experts": None,
        "sampling_mask": None,
        "weight_versions": [{"version": "default", "start": 0, "end": 3}],
        "logprobs": {"content": [{"token_id": 220, "logprob": -9.5e-7, "rank": 1, "top_logprobs": others}]},
    }
    piece = piece_of(choice, prompt_with(Sampling()))
    assert (piece.ids, piece.stop, piece.weights) == ([220], "stop_id", [("default", 3)])
    assert piece.drawn_logprobs == [-9.5e-7]


# -- pictures


def a_picture(*, value: int = 0, is_video: bool = False) -> PatchedImage:
    pixels = torch.tensor([[value, 128, 255]], dtype=torch.uint8)
    return PatchedImage(pixel_values=pixels, grid_thw=(1, 1, 1), size=(1, 1), num_tokens=1, is_video=is_video)  # type: ignore[arg-type]


@pytest.mark.parametrize(("is_video", "prefix", "rows"), [(False, "", [6, 7]), (True, "video_", [8, 9])])
def test_pixels_travel_exactly_and_with_their_indicators(is_video, prefix, rows) -> None:
    item = msgpack.unpackb(b64decode(encode_image(a_picture(is_video=is_video), visual_vocab_size=10)))
    read = {}
    for name, part in item.items():
        dtype, shape, data = part["data"]
        assert part["field"] == ["batched", {"keep_on_cpu": False}] and data.code == 3
        read[name] = (dtype, np.frombuffer(data.data, dtype=dtype).reshape(shape).tolist())
    assert read[f"{prefix}pixel_values"] == ("float32", [[-1.0, float(np.float32(128) / np.float32(127.5) - 1), 1.0]])
    assert read[f"{prefix}grids"] == ("int64", [[1, 1, 1]])
    assert read[f"{prefix}indicator_tokens"] == ("int64", rows)


def test_pictures_are_known_by_pixels_and_kind() -> None:
    assert image_key(a_picture()) == image_key(a_picture())
    assert image_key(a_picture()) != image_key(a_picture(is_video=True))


def test_pictures_stand_from_their_start_to_their_end(fake, processor: Ovis2_5Processor) -> None:
    first = a_picture()
    ids = [5, *processor.image_ids(first), 6, *processor.image_ids(first)]
    server = VllmServer(fake.address, processor.config)
    prompt = Prompt(**{**vars(prompt_with(Sampling())), "ids": ids, "images": [first, first]})
    sent: list[str] = []
    features = server.features(prompt, sent, is_full=False)
    assert features["mm_placeholders"] == {"image": [{"offset": 1, "length": 3}, {"offset": 5, "length": 3}]}
    assert features["mm_hashes"] == {"image": [image_key(first)] * 2}
    assert [data is None for data in features["kwargs_data"]["image"]] == [False, True]
    assert sent == [image_key(first)]


def sent_for(server: VllmServer, *images: PatchedImage) -> list[PatchedImage]:
    """The pictures whose pixels a request sends; none of them has arrived."""
    ids = [token for _ in images for token in (server.config.image_start_token_id, server.config.image_end_token_id)]
    sent: list[str] = []
    server.features(Prompt(**{**vars(prompt_with(Sampling())), "ids": ids, "images": [*images]}), sent, is_full=False)
    return [image for image in images if image_key(image) in sent]


@pytest.mark.parametrize("has_arrived", [True, False])
def test_who_sends_nothing_waits_for_a_picture_on_its_way(fake, processor, has_arrived) -> None:
    server = VllmServer(fake.address, processor.config)
    first = a_picture()
    assert sent_for(server, first) == [first]
    waiting = Thread(target=sent_for, args=(server, first), daemon=True)
    waiting.start()
    waiting.join(0.05)
    assert waiting.is_alive()
    server.settle([image_key(first)], is_held=has_arrived)
    waiting.join(10)
    assert not waiting.is_alive()
    assert sent_for(server, first) == ([] if has_arrived else [first])


def test_who_sends_a_picture_waits_for_no_other(fake, processor) -> None:
    """Two requests with the same two pictures in other orders would wait for each other."""
    server = VllmServer(fake.address, processor.config)
    first, second = a_picture(), a_picture(value=7)
    assert sent_for(server, first) == [first]
    assert sent_for(server, second, first) == [second, first]
