"""What every engine holds to, as tests: a class of them to inherit from, about the tiny model and greedy answers.

A subclass gives the fixture `engine`, which has the tiny model and decodes by `tiny_processor`. The expected ids and
logprobs are what vLLM 0.32.0 answered.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
from PIL import Image

from looktwice.engine.interface import Continuation, Engine, Request, Segment
from looktwice.engine.sampling import Sampling
from looktwice.model.location import TINY, locate
from looktwice.processing.images import PatchedImage
from looktwice.processing.processor import Example, Ovis2_5Processor

GREEDY = Sampling(temperature=0)
NOISE = np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)


@dataclass
class Player:
    """A driver that plays a list of continuations, and keeps all it is told."""

    replies: Sequence[Continuation] = ()
    heard: list[tuple[int, float]] = field(default_factory=list)
    segments: list[Segment] = field(default_factory=list)
    errors: list[Exception] = field(default_factory=list)
    at_hear: Callable[[], None] = lambda: None
    at_respond: Callable[[], None] = lambda: None

    def hear(self, token: int, logprob: float) -> None:
        self.heard.append((token, logprob))
        self.at_hear()

    def respond(self, segment: Segment) -> Continuation | None:
        self.segments.append(segment)
        self.at_respond()
        number = len(self.segments)
        return self.replies[number - 1] if number <= len(self.replies) else None

    def fail(self, error: Exception) -> None:
        self.errors.append(error)

    @property
    def ids(self) -> list[list[int]]:
        return [segment.ids for segment in self.segments]

    @property
    def stops(self) -> list[str]:
        return [segment.stop for segment in self.segments]


def patched(processor: Ovis2_5Processor, left: int, top: int, width: int, height: int) -> PatchedImage:
    """A rectangle of the noise, at a size that needs no resizing: the same pixels with any version of Pillow."""
    return processor.patch(Image.fromarray(NOISE[top : top + height, left : left + width]))


def crop_of(processor: Ovis2_5Processor, *, max_new_tokens: int = 4) -> Continuation:
    """A crop, as it follows a call."""
    image = patched(processor, 16, 0, 48, 32)
    return Continuation(ids=processor.image_ids(image), images=[image], max_new_tokens=max_new_tokens)


def prompt_of(processor: Ovis2_5Processor) -> Example:
    example = Example()
    example.append(processor.template.encode("user\n"), is_trained=False)
    processor.append_image(example, patched(processor, 0, 0, 64, 48))
    example.append(processor.template.encode("\nWhich digit is on the red tile?\nassistant\n"), is_trained=False)
    return example


@pytest.fixture(scope="session")
def tiny_processor() -> Ovis2_5Processor:
    return Ovis2_5Processor.from_pretrained(locate(TINY))


@pytest.fixture
def prompt(tiny_processor: Ovis2_5Processor) -> Example:
    return prompt_of(tiny_processor)


@pytest.fixture
def crop(tiny_processor: Ovis2_5Processor) -> Continuation:
    return crop_of(tiny_processor)


ANSWER = [362, 423, 220, 24, 13, 462, 20, 19, 18, 11, 220]
"""`It says 9.<|im_end|>543, `, to the prompt."""
LOGPROBS = [-3.9e-05, 0.0, -1e-06, -0.809062, -0.000165, -1e-06]
AFTER_CROP = [198, 362, 423, 220]
"""After six ids of it and the crop."""


class EngineContract:
    """The contract. `play` runs one request to its end."""

    @pytest.fixture
    def play(self, engine: Engine, prompt: Example) -> Callable[..., None]:
        def play(*players: Player, **fields: object) -> None:
            settings = {"prompt": prompt, "sampling": GREEDY, "max_new_tokens": 6, **fields}
            engine.run([Request(drivers=players, **settings)])  # type: ignore[arg-type]

        return play

    def test_greedy_ids_with_a_crop_in_mid_answer_are_the_recorded_ones(self, play, crop) -> None:
        player = Player([crop])
        play(player)
        assert player.ids == [ANSWER[:6], AFTER_CROP]
        assert player.stops == ["length", "length"] and not player.errors

    def test_logprobs_are_of_the_plain_distribution_and_greedy_is_drawn_for_sure(self, play) -> None:
        player = Player()
        play(player)
        assert player.segments[0].logprobs == pytest.approx(LOGPROBS, abs=1e-4)
        assert player.segments[0].drawn_logprobs == [0.0] * 6

    def test_a_driver_hears_each_id_before_it_is_asked(self, play, crop) -> None:
        player = Player([crop])
        told: list[int] = []
        player.at_respond = lambda: told.append(len(player.heard))
        play(player)
        assert told == [6, 10]
        assert player.heard == [
            pair for segment in player.segments for pair in zip(segment.ids, segment.logprobs, strict=True)
        ]

    def test_siblings_answer_alike_whatever_the_others_do(self, play, crop) -> None:
        players = [Player(), Player([crop]), Player([crop])]
        play(*players)
        assert [player.ids for player in players] == [[ANSWER[:6]], *[[ANSWER[:6], AFTER_CROP]] * 2]

    def test_a_segment_cut_by_its_length_goes_on_where_it_stopped(self, play) -> None:
        player = Player([Continuation(max_new_tokens=5)])
        play(player)
        assert [token for token, _ in player.heard] == ANSWER

    def test_a_stop_id_ends_a_segment_and_stays_in_it(self, play) -> None:
        player = Player()
        play(player, stop_ids=frozenset({ANSWER[3], 1}))
        assert (player.ids, player.stops) == ([ANSWER[:4]], ["stop_id"])

    def test_a_stop_text_ends_a_segment_and_stays_in_it(self, play, tiny_processor) -> None:
        player = Player()
        text = tiny_processor.decode(ANSWER[2:4])
        play(player, stop_texts=(text,))
        assert (player.ids, player.stops) == ([ANSWER[:4]], ["stop_text"])

    def test_banned_ids_and_visual_tokens_are_not_drawn(self, play, tiny_processor) -> None:
        player = Player()
        banned = frozenset(ANSWER[:6])
        play(player, banned_ids=banned)
        assert len(player.ids[0]) == 6
        assert not set(player.ids[0]) & {*banned, *tiny_processor.config.visual_token_ids}

    @pytest.mark.parametrize("place", ["at_hear", "at_respond"])
    def test_an_error_of_a_driver_ends_its_rollout_alone(self, play, place) -> None:
        def stumble() -> None:
            raise KeyError("a reward fell over")

        broken, sound = Player(), Player()
        setattr(broken, place, stumble)
        play(broken, sound)
        assert [type(error) for error in broken.errors] == [KeyError]
        assert (sound.ids, sound.errors) == ([ANSWER[:6]], [])

    def test_a_continuation_whose_pictures_do_not_fit_ends_its_rollout_alone(self, play, crop) -> None:
        broken, sound = Player([Continuation(ids=crop.ids, images=[], max_new_tokens=4)]), Player([crop])
        play(broken, sound)
        assert [type(error) for error in broken.errors] == [ValueError]
        assert "visual tokens among the ids, 0 in the pictures" in str(broken.errors[0])
        assert sound.ids == [ANSWER[:6], AFTER_CROP]

    def test_a_prompt_whose_pictures_do_not_fit_is_refused(self, engine, prompt) -> None:
        prompt.images.clear()
        with pytest.raises(ValueError, match="visual tokens among the ids, 0 in the pictures"):
            engine.submit(Request(prompt=prompt, drivers=[Player()], max_new_tokens=1))

    def test_a_cancelled_rollout_is_told_what_it_sampled_so_far(self, engine, prompt) -> None:
        goes, stays = Player([Continuation(max_new_tokens=9)] * 3), Player()
        goes.at_respond = lambda: engine.cancel(numbers[0]) if len(goes.segments) == 1 else None
        request = Request(prompt=prompt, drivers=[goes, stays], sampling=GREEDY, max_new_tokens=2)
        numbers = engine.submit(request)
        engine.run([])
        assert goes.stops == ["length", "cancelled"]
        assert [token for ids in goes.ids for token in ids] == ANSWER[: len(goes.heard)]
        assert len(goes.heard) < 11
        assert stays.stops == ["length"]

    def test_what_is_unknown_or_over_can_be_cancelled(self, engine, prompt) -> None:
        player = Player()
        (number,) = engine.submit(Request(prompt=prompt, drivers=[player], sampling=GREEDY, max_new_tokens=2))
        engine.cancel(number + 7)
        engine.run([])
        engine.cancel(number)
        engine.run([])
        assert player.stops == ["length"]

    def test_requests_may_come_while_others_run(self, engine, prompt, crop) -> None:
        late = Player([crop])
        first = Player()
        first.at_respond = lambda: numbers.extend(
            engine.submit(Request(prompt=prompt, drivers=[late], sampling=GREEDY, max_new_tokens=6))
        )
        numbers = engine.submit(Request(prompt=prompt, drivers=[first], sampling=GREEDY, max_new_tokens=2))
        engine.run([])
        assert late.ids == [ANSWER[:6], AFTER_CROP]
        assert len(set(numbers)) == 2

    def test_a_rollout_whose_time_is_up_is_cut(self, play) -> None:
        player = Player()
        play(player, max_seconds=0.0, max_new_tokens=11)
        assert player.stops == ["seconds"]
        assert player.ids[0] == ANSWER[: len(player.ids[0])]

    def test_an_engine_with_nothing_to_do_is_done_at_once(self, engine) -> None:
        engine.run([])
        assert engine.step() is False
