"""The vLLM engine: what it sends, and what it does with servers; the contract is in test_contract.py."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from threading import Event

import pytest
from tests.engine.contract import ANSWER, GREEDY, Player, crop, prompt, tiny_processor
from tests.engine.fake_vllm import FakeVllm, serving

from looktwice.engine.interface import Continuation, Request
from looktwice.engine.sampling import Sampling
from looktwice.engine.vllm import ServedSegment, VllmEngine
from looktwice.errors import ConfigError, ServerError

__all__ = ["crop", "prompt", "tiny_processor"]


@pytest.fixture
def fake(tiny_processor) -> Iterator[FakeVllm]:
    with serving(FakeVllm(tiny_processor.decode)) as server:
        yield server


@pytest.fixture
def engine(fake, tiny_processor) -> VllmEngine:
    return VllmEngine([fake.address], tiny_processor.config)


# -- what is sent


def run(engine: VllmEngine, prompt, *players: Player, **fields) -> None:
    engine.run([Request(prompt=prompt, drivers=players, **{"sampling": GREEDY, "max_new_tokens": 6, **fields})])


def test_our_ids_are_sent_and_nothing_is_read_back_but_what_was_sampled(engine, fake, prompt, crop) -> None:
    run(engine, prompt, Player([crop]))
    first, second = (request["token_ids"] for request in fake.requests)
    assert first == prompt.input_ids
    assert second == prompt.input_ids + ANSWER[:6] + crop.ids


def test_a_picture_is_sent_once_to_a_server_for_all_siblings_and_turns(engine, fake, prompt, crop) -> None:
    run(engine, prompt, *(Player([crop]) for _ in range(4)))
    pixels = [pixels for request in fake.requests for pixels in request["features"]["kwargs_data"]["image"]]
    assert (len(pixels), sum(data is not None for data in pixels)) == (12, 2)


def test_a_picture_that_the_server_forgot_is_sent_again(engine, fake, prompt, crop) -> None:
    player = Player([crop])
    player.at_respond = fake.held.clear
    run(engine, prompt, player)
    assert [len(ids) for ids in player.ids] == [6, 4]
    sent = [[data is not None for data in r["features"]["kwargs_data"]["image"]] for r in fake.requests]
    assert sent == [[True], [False, True], [True, True]]


def test_each_sibling_and_each_segment_has_a_seed_of_its_own_that_the_request_decides(
    engine, fake, prompt, crop
) -> None:
    def seeds(seed: int) -> list[int]:
        fake.requests.clear()
        run(engine, prompt, Player([crop]), Player([crop]), seed=seed)
        return sorted(request["sampling_params"]["seed"] for request in fake.requests)

    first = seeds(1)
    assert len(set(first)) == 4 and all(0 <= seed < 2**63 for seed in first)
    assert seeds(1) == first
    assert not set(seeds(2)) & set(first)


def test_text_alone_has_no_pictures_in_its_request(engine, fake, prompt) -> None:
    prompt.images.clear()
    prompt.input_ids[:] = [5, 6, 7]
    player = Player()
    run(engine, prompt, player)
    assert "features" not in fake.requests[0]
    assert len(player.ids[0]) == 6


# -- limits


def test_a_segment_that_ends_where_the_server_has_no_more_room_ends_the_rollout(engine, fake, prompt) -> None:
    engine.servers[0].max_length = len(prompt) + 3
    player = Player([Continuation(max_new_tokens=4)])
    run(engine, prompt, player)
    assert (player.ids, player.stops) == ([ANSWER[:3]], ["no_room"])


def test_a_prompt_that_is_too_long_is_not_sent(engine, fake, prompt) -> None:
    engine.servers[0].max_length = len(prompt)
    player = Player()
    run(engine, prompt, player)
    assert (player.ids, player.stops, fake.requests) == ([[]], ["no_room"], [])


def test_no_more_rollouts_than_allowed_are_on_a_server_at_a_time(fake, prompt, tiny_processor) -> None:
    engine = VllmEngine([fake.address], tiny_processor.config, max_rollouts=2)
    live: list[int] = []
    fake.before = lambda request: live.append(sum(r.answer is not None for r in engine._rollouts.values()))
    players = [Player() for _ in range(5)]
    run(engine, prompt, *players)
    assert [player.ids for player in players] == [[ANSWER[:6]]] * 5
    assert max(live) == 2


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        (Sampling(temperature=0.001), "vLLM has none between 0 and 0.01"),
        (Sampling(presence_penalty=0.5), "would forget at each crop what was written before"),
    ],
)
def test_what_vllm_does_otherwise_is_refused(engine, prompt, sampling, message) -> None:
    with pytest.raises(ConfigError, match=message):
        engine.submit(Request(prompt=prompt, drivers=[Player()], max_new_tokens=1, sampling=sampling))


# -- servers


def test_groups_are_spread_over_servers_and_a_rollout_stays_with_its_own(fake, prompt, crop, tiny_processor) -> None:
    with serving(FakeVllm()) as other:
        engine = VllmEngine([fake.address, other.address], tiny_processor.config)
        groups = [[Player([crop]) for _ in range(2)] for _ in range(2)]
        engine.run([Request(prompt=prompt, drivers=g, sampling=GREEDY, max_new_tokens=6) for g in groups])
        assert [len(server.requests) for server in (fake, other)] == [4, 4]
        assert all(len(player.segments) == 2 for group in groups for player in group)


def test_a_server_that_goes_away_ends_its_rollouts_and_no_others(fake, prompt, tiny_processor) -> None:
    with serving(FakeVllm()) as other:
        other.die_after = 2
        engine = VllmEngine([fake.address, other.address], tiny_processor.config)
        sound, lost = Player(), Player()
        engine.run([Request(prompt=prompt, drivers=[p], sampling=GREEDY, max_new_tokens=6) for p in (sound, lost)])
    assert (sound.ids, sound.errors) == ([ANSWER[:6]], [])
    assert len(lost.heard) == 2 and not lost.segments
    with pytest.raises(ServerError, match=f"{other.address}: the server is gone"):
        raise lost.errors[0]


def test_an_answer_that_the_server_broke_off_is_no_answer(engine, fake, prompt) -> None:
    fake.finish_reason = "abort"
    player = Player()
    run(engine, prompt, player)
    assert not player.segments
    with pytest.raises(ServerError, match="the server broke the answer off"):
        raise player.errors[0]


def test_a_connection_that_is_lost_after_the_last_id_is_no_loss(engine, fake, prompt, crop) -> None:
    def die_after_the_next_answer(request: dict) -> None:
        fake.die_after = request["sampling_params"]["max_tokens"]

    fake.before = die_after_the_next_answer
    player = Player([crop])
    run(engine, prompt, player)
    assert ([len(ids) for ids in player.ids], player.errors) == ([6, 4], [])


def test_a_server_stops_writing_what_was_cancelled(engine, fake, prompt) -> None:
    goes_on = Event()
    fake.between = lambda: goes_on.wait(5) and None
    player = Player()
    (number,) = engine.submit(Request(prompt=prompt, drivers=[player], sampling=GREEDY, max_new_tokens=11))
    while not player.heard:
        engine.step()
    engine.cancel(number)
    assert engine.step() is False
    assert (player.stops, player.ids) == (["cancelled"], [ANSWER[:1]])
    goes_on.set()
    until = time.monotonic() + 10
    while fake.num_left == 0 and time.monotonic() < until:
        time.sleep(0.01)
    assert fake.num_left == 1


def test_no_address_is_refused(tiny_processor) -> None:
    with pytest.raises(ConfigError, match="no vLLM server is named; give one address or more"):
        VllmEngine([], tiny_processor.config)


# -- weights


def test_pushed_weights_are_seen_by_all_servers_and_stand_on_each_id(
    engine, fake, prompt, model, tmp_path: Path
) -> None:
    def versions() -> list[list[str]]:
        player = Player([Continuation(max_new_tokens=2)])
        run(engine, prompt, player)
        return [s.weight_versions for s in player.segments if isinstance(s, ServedSegment)]

    assert versions() == [["default"] * 6, ["default"] * 2]
    engine.push_weights(model, tmp_path / "weights", "7")
    fake.requests.clear()
    assert versions() == [["7"] * 6, ["7"] * 2]
    assert [r["features"]["kwargs_data"]["image"][0] is not None for r in fake.requests] == [True, False]
    assert [path for path, _ in fake.calls] == [
        "/pause?mode=wait",
        "/collective_rpc",
        "/reset_prefix_cache",
        "/update_weight_version",
        "/resume",
    ]
    told = {"method": "reload_weights", "kwargs": {"weights_path": str(tmp_path / "weights")}}
    assert fake.calls[1][1] == told
    assert (tmp_path / "weights" / "model.safetensors").exists()


def test_a_segment_that_was_cut_off_has_the_version_of_its_server(engine, prompt) -> None:
    player = Player()
    player.at_hear = lambda: engine.cancel(numbers[0])
    numbers = engine.submit(Request(prompt=prompt, drivers=[player], sampling=GREEDY, max_new_tokens=6))
    while not player.segments:
        engine.step()
    (segment,) = player.segments
    assert isinstance(segment, ServedSegment)
    assert segment.weight_versions == ["default"] * len(segment.ids)


def test_a_server_that_takes_no_weights_says_how_to_start_it(engine, fake, model, tmp_path: Path) -> None:
    fake.has_dev_mode = False
    with pytest.raises(ServerError, match=r"/pause\?mode=wait: status 404, .*; start it with VLLM_SERVER_DEV_MODE=1"):
        engine.push_weights(model, tmp_path / "weights", "1")
