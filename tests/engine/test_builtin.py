"""The built-in engine against plain forwards: same ids and logprobs, whatever is admitted, inserted or stopped."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import pytest
import torch
from PIL import Image

from looktwice.engine import reading, runner
from looktwice.engine.builtin import BuiltinEngine
from looktwice.engine.interface import Continuation, Request, Segment
from looktwice.engine.sampling import Sampling
from looktwice.errors import ConfigError
from looktwice.messages import question_about
from looktwice.model.modeling import Ovis2_5ForConditionalGeneration
from looktwice.processing.packing import pack
from looktwice.processing.processor import Example, Ovis2_5Processor
from looktwice.rollout.crop_tool import CropTool, Observation, observed
from looktwice.rollout.episode import Episode, EpisodeRules, play, start_episodes

GREEDY = Sampling(temperature=0)
INSERTS = ("[0, 0, 48, 48]", "[40, 20, 160, 110]", "[5, 5, 2, 2]")
"""Two crops of different size and a refusal."""


@dataclass(kw_only=True)
class Plan:
    """What a test inserts into one rollout: budgets of its segments, and a call to answer between two of them."""

    budgets: list[int]
    calls: list[str]
    prompt: Example
    processor: Ovis2_5Processor
    image: Image.Image
    example: Example = field(init=False)
    logprobs: list[float] = field(default_factory=list)
    segments: list[Segment] = field(default_factory=list)
    heard: list[int] = field(default_factory=list)
    error: Exception | None = None

    def __post_init__(self) -> None:
        self.example = self.prompt.copy()

    def hear(self, token: int, logprob: float) -> None:
        self.heard.append(token)

    def respond(self, segment: Segment) -> Continuation | None:
        self.example.append(segment.ids, is_trained=True)
        self.logprobs += segment.logprobs
        self.segments.append(segment)
        number = len(self.segments)
        if number == len(self.budgets):
            return None
        observation = CropTool(self.processor).look(self.calls[number - 1], [self.image])
        ids, images = observed(observation, self.processor)
        self.example.append(ids, is_trained=False)
        self.example.images += images
        return Continuation(ids=ids, images=images, max_new_tokens=self.budgets[number])

    def fail(self, error: Exception) -> None:
        self.error = error

    @property
    def sampled(self) -> list[int]:
        return [token for token, flag in zip(self.example.input_ids, self.example.loss_mask) if flag]


@pytest.fixture
def prompts(processor, image) -> list[Example]:
    """Ragged: a picture, another with a longer question, none."""
    asked = [
        question_about("What is it?", image),
        question_about("Which digit is on the red tile?", image.crop((0, 0, 60, 120))),
        question_about("Hm?"),
    ]
    return [start_episodes(prompt, processor, EpisodeRules())[0].prompt for prompt in asked]


@pytest.fixture
def roll(model, processor, image, prompts):
    """Plays groups of 1, 5 and 2 rollouts with their own plans through the engine."""

    def run(
        sampling: Sampling,
        *,
        groups: tuple[int, ...] = (1, 5, 2),
        stop_ids: tuple[int, ...] = (),
        seed: int = 0,
        **settings: int,
    ) -> list[Plan]:
        plans, requests = [], []
        for place, (prompt, size) in enumerate(zip(prompts, groups)):
            siblings = [
                Plan(
                    budgets=[4 + place, 4, 2 + number % 3][: 1 + number % 3],
                    calls=rotated(number),
                    prompt=prompt,
                    processor=processor,
                    image=image,
                )
                for number in range(len(plans), len(plans) + size)
            ]
            plans += siblings
            requests.append(
                Request(
                    prompt=prompt,
                    drivers=siblings,
                    max_new_tokens=4 + place,
                    sampling=sampling,
                    seed=seed + place,
                    stop_ids=frozenset(stop_ids),
                )
            )
        BuiltinEngine(model, **settings).run([request for request in requests if request.drivers])
        assert not any(plan.error for plan in plans)
        return plans

    return run


def rotated(number: int) -> list[str]:
    return [*INSERTS[number % 3 :], *INSERTS[: number % 3]]


def recomputed(model: Ovis2_5ForConditionalGeneration, example: Example, forbidden: tuple[int, ...]) -> list[int]:
    """The greedy id at each sampled place, each from a full forward over everything before it."""
    ids = []
    for place in range(len(example)):
        if not example.loss_mask[place]:
            continue
        atoms, shown, images = example.input_ids[:place].count(model.config.image_token_id), 0, []
        for image in example.images:
            shown += image.num_tokens
            images += [image] if shown <= atoms else []
        before = Example(input_ids=example.input_ids[:place], loss_mask=example.loss_mask[:place], images=images)
        inputs = pack([before]).model_inputs()
        del inputs["loss_mask"]
        with torch.no_grad():
            logits = model(**inputs).logits[0, -1]
        logits[list(forbidden)] = -torch.inf
        ids.append(int(logits.argmax()))
    return ids


SCHEDULES = [
    {"max_rows": 64},
    {"max_rows": 1},
    {"max_rows": 3, "page_size": 1},
    {"max_rows": 5, "page_size": 7, "max_pass_tokens": 13},
    {"max_rows": 8, "page_size": 4, "cache_tokens": 200},
    {"max_rows": 8, "num_threads": 2},
]
"""All together, one at a time, odd pages, prompts and crops in chunks, preemptions, drivers in threads."""


@pytest.mark.parametrize("schedule", SCHEDULES[::2])
def test_greedy_ids_equal_those_of_a_full_forward_at_each_step(schedule, roll, model, processor) -> None:
    for plan in roll(GREEDY, **schedule):
        assert plan.sampled == recomputed(model, plan.example, processor.config.visual_token_ids)


@pytest.mark.parametrize("schedule", SCHEDULES[1:])
@pytest.mark.parametrize("sampling", [GREEDY, Sampling(), Sampling(temperature=0.8, top_p=0.9, top_k=40)])
def test_a_rollout_is_its_own_whatever_the_schedule(schedule, sampling, roll) -> None:
    expected = [plan.example.input_ids for plan in roll(sampling, **SCHEDULES[0])]
    assert [plan.example.input_ids for plan in roll(sampling, **schedule)] == expected


@pytest.mark.parametrize(("shared_tokens", "padded_pages"), [(0, 64), (0, 0), (10**9, 0)])
def test_a_rollout_is_its_own_however_its_pages_are_read(
    shared_tokens, padded_pages, roll, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shared prompt once for its siblings, or each row by itself."""
    expected = roll(Sampling())
    monkeypatch.setattr(reading, "SHARED_TOKENS", shared_tokens)
    monkeypatch.setattr(reading, "PADDED_PAGES", padded_pages)
    found = roll(Sampling())
    assert [plan.example.input_ids for plan in found] == [plan.example.input_ids for plan in expected]
    for plan, other in zip(found, expected):
        assert plan.logprobs == pytest.approx(other.logprobs, abs=1e-5)


@pytest.mark.parametrize("groups", [(1, 0, 0), (0, 3, 0), (1, 1, 1), (1, 5, 1)])
def test_a_rollout_is_its_own_whoever_stands_beside_it(groups, roll) -> None:
    firsts = (0, 1, 6)
    everyone = roll(Sampling(), max_rows=64)
    found = iter(roll(Sampling(), groups=groups, max_rows=64))
    for first, size in zip(firsts, groups):
        for place in range(size):
            plan, other = next(found), everyone[first + place]
            assert plan.segments[0].ids == other.segments[0].ids


def test_a_small_cache_really_preempts(model, prompts, processor, image) -> None:
    engine = BuiltinEngine(model, max_rows=8, page_size=4, cache_tokens=200)
    plans = [Plan(budgets=[40], calls=[], prompt=prompts[1], processor=processor, image=image) for _ in range(6)]
    engine.run([Request(prompt=prompts[1], drivers=plans, max_new_tokens=40)])
    assert engine.stats.num_preemptions > 0
    assert engine.stats.cache_bytes_held_peak <= 200 * 2 * 4 * 2 * 32 * 4  # keys, values: layers, heads, width, bytes


def test_a_stop_id_ends_a_segment_and_stays_in_it(roll) -> None:
    free = roll(GREEDY, max_rows=64)
    stop_id = free[3].segments[0].ids[2]
    assert not any(segment.is_stopped for plan in free for segment in plan.segments)
    stopped = roll(GREEDY, max_rows=64, stop_ids=(stop_id,))
    for plan, other in zip(free, stopped):
        ids = plan.segments[0].ids
        expected = ids[: ids.index(stop_id) + 1] if stop_id in ids else ids
        assert (other.segments[0].ids, other.segments[0].is_stopped) == (expected, stop_id in ids)
    assert all(segment.ids.count(stop_id) == segment.is_stopped for plan in stopped for segment in plan.segments)


def test_every_segment_keeps_to_its_budget(roll) -> None:
    plans = roll(GREEDY, max_rows=3)
    assert [[len(segment.ids) for segment in plan.segments] for plan in plans] == [plan.budgets for plan in plans]
    assert [plan.heard for plan in plans] == [plan.sampled for plan in plans]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_recorded_logprobs_equal_those_of_the_packed_training_forward(temperature, roll, model) -> None:
    plans = roll(Sampling(temperature=temperature, top_p=0.9), max_rows=3)
    batch = pack([plan.example for plan in plans])
    with torch.no_grad():
        trained = model(**batch.model_inputs(), temperature=temperature).logprobs
    recorded = torch.tensor([logprob for plan in plans for logprob in plan.logprobs])
    torch.testing.assert_close(recorded, trained, atol=1e-4, rtol=0)


def test_the_same_seed_gives_the_same_rollouts_and_another_seed_others(roll) -> None:
    first, again, other = (
        [plan.example.input_ids for plan in roll(Sampling(), max_rows=64, seed=seed)] for seed in (0, 0, 1)
    )
    assert first == again != other


def test_siblings_sampled_from_one_prompt_differ(roll) -> None:
    siblings = [plan.segments[0].ids for plan in roll(Sampling(), max_rows=64)[1:6]]
    assert len(set(map(tuple, siblings))) == 5


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(), Sampling(temperature=3.0, top_k=2)])
def test_visual_ids_are_never_sampled_even_where_their_logits_are_largest(
    sampling, roll, model, processor, monkeypatch: pytest.MonkeyPatch
) -> None:
    forbidden = list(processor.config.visual_token_ids)
    plain = model.lm_head.forward

    def tempting(hidden: torch.Tensor) -> torch.Tensor:
        logits = plain(hidden)
        logits[..., forbidden] += 100
        return logits

    monkeypatch.setattr(model.lm_head, "forward", tempting)
    plans = roll(sampling, max_rows=64)
    sampled = {token for plan in plans for segment in plan.segments for token in segment.ids}
    assert sampled and sampled.isdisjoint(forbidden)


def test_each_distinct_picture_is_encoded_once(
    model, processor, prompts, image, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_patches: list[int] = []
    plain = model.get_image_features
    monkeypatch.setattr(
        model, "get_image_features", lambda pixels, grids: num_patches.append(len(pixels)) or plain(pixels, grids)
    )
    plans = [
        Plan(budgets=[2, 2], calls=[INSERTS[place % 2]], prompt=prompts[0], processor=processor, image=image)
        for place in range(4)
    ]
    engine = BuiltinEngine(model)
    engine.run([Request(prompt=prompts[0], drivers=plans, max_new_tokens=2, sampling=GREEDY)])
    overview, first = (len(one.pixel_values) for one in plans[0].example.images)
    _, second = (len(one.pixel_values) for one in plans[1].example.images)
    assert num_patches == [overview, first + second]
    assert engine.stats.num_images_encoded == 3


def test_a_prompt_is_fed_once_for_its_siblings(model, prompts, processor, image) -> None:
    engine = BuiltinEngine(model)
    plans = [Plan(budgets=[3], calls=[], prompt=prompts[0], processor=processor, image=image) for _ in range(6)]
    engine.run([Request(prompt=prompts[0], drivers=plans, max_new_tokens=3)])
    assert engine.stats.tokens == {"prefill": len(prompts[0]) - 1, "decode": 6 * 3}


def test_an_error_of_a_driver_ends_its_rollout_alone(model, prompts, processor, image) -> None:
    class Broken(Plan):
        def respond(self, segment: Segment) -> Continuation | None:
            raise ZeroDivisionError("in the tool")

    class Deaf(Plan):
        def hear(self, token: int, logprob: float) -> None:
            raise KeyError("in the callback")

    class Wrong(Plan):
        def respond(self, segment: Segment) -> Continuation | None:
            return Continuation(ids=[self.processor.config.image_token_id], max_new_tokens=3)

    for threads in (0, 2):
        plans = [
            kind(budgets=[3], calls=[], prompt=prompts[0], processor=processor, image=image)
            for kind in (Broken, Deaf, Wrong, Plan)
        ]
        engine = BuiltinEngine(model, num_threads=threads)
        engine.run([Request(prompt=prompts[0], drivers=plans, max_new_tokens=3)])
        assert [type(plan.error) for plan in plans] == [ZeroDivisionError, KeyError, ValueError, type(None)]
        assert len(plans[3].sampled) == 3
        assert not engine.cache.holders


def test_no_requests_are_no_work(model) -> None:
    engine = BuiltinEngine(model)
    engine.run([])
    assert engine.stats.num_passes <= 1 and not engine.stats.tokens


def test_a_picture_that_does_not_fit_the_ids_is_refused_at_once(model, prompts) -> None:
    broken = prompts[0].copy()
    broken.images.clear()
    with pytest.raises(ValueError, match="0 in the pictures"):
        BuiltinEngine(model).submit(Request(prompt=broken, drivers=[], max_new_tokens=1))


def test_a_stop_text_ends_a_segment_where_it_is_complete(model, prompts, processor, image) -> None:
    def play(stop_texts: tuple[str, ...]) -> Plan:
        plan = Plan(budgets=[30], calls=[], prompt=prompts[0], processor=processor, image=image)
        engine = BuiltinEngine(model, decode=processor.decode)
        engine.run([Request(prompt=prompts[0], drivers=[plan], max_new_tokens=30, seed=4, stop_texts=stop_texts)])
        return plan

    free = play(())
    text = processor.decode(free.sampled)
    wanted = text[len(text) // 3 : len(text) // 3 + 4]
    stopped = play(("never in it \u2603", wanted))
    assert stopped.segments[0].stop == "stop_text"
    assert stopped.sampled == free.sampled[: len(stopped.sampled)]
    written = processor.decode(stopped.sampled)
    assert wanted in written and wanted not in processor.decode(stopped.sampled[:-1])


def test_a_stop_text_across_two_segments_is_seen(model, prompts, processor, image) -> None:
    class Cut(Plan):
        def respond(self, segment: Segment) -> Continuation | None:
            self.example.append(segment.ids, is_trained=True)
            self.segments.append(segment)
            return Continuation(max_new_tokens=20) if segment.stop == "length" else None

    engine = BuiltinEngine(model, decode=processor.decode)
    free = Plan(budgets=[12], calls=[], prompt=prompts[0], processor=processor, image=image)
    engine.run([Request(prompt=prompts[0], drivers=[free], max_new_tokens=12, seed=3)])
    wanted = processor.decode(free.sampled[5:7])
    cut = Cut(budgets=[], calls=[], prompt=prompts[0], processor=processor, image=image)
    engine.run([Request(prompt=prompts[0], drivers=[cut], max_new_tokens=6, seed=3, stop_texts=(wanted,))])
    assert [segment.stop for segment in cut.segments][-1] == "stop_text"
    assert len(cut.sampled) <= 7


@pytest.mark.parametrize("size", [1, 3])
def test_a_prompt_may_end_in_a_picture(size, model, prompts, processor, image) -> None:
    end = len(prompts[0]) - prompts[0].input_ids[::-1].index(processor.config.image_token_id)
    cut = Example(input_ids=prompts[0].input_ids[:end], loss_mask=[False] * end, images=prompts[0].images)
    plans = [Plan(budgets=[2], calls=[], prompt=cut, processor=processor, image=image) for _ in range(size)]
    BuiltinEngine(model).run([Request(prompt=cut, drivers=plans, max_new_tokens=2, sampling=GREEDY)])
    assert [plan.sampled for plan in plans] == [
        recomputed(model, plans[0].example, processor.config.visual_token_ids)
    ] * size


def test_forgotten_pictures_leave_no_memory_behind(model, processor, image) -> None:
    features = runner.ImageFeatures(model.get_image_features, max_bytes=5000)
    images = [processor.patch_image(image.rotate(turn)) for turn in range(4)]
    features.of(images)
    kept = list(features._known.values())
    assert sum(one.untyped_storage().nbytes() for one in kept) <= 5000 < 4 * kept[0].nbytes if kept else True


def test_time_that_is_up_ends_a_rollout_with_what_it_has(model, prompts, processor, image) -> None:
    plans = [Plan(budgets=[10_000], calls=[], prompt=prompts[0], processor=processor, image=image) for _ in range(2)]
    engine = BuiltinEngine(model)
    engine.submit(Request(prompt=prompts[0], drivers=plans[:1], max_new_tokens=10_000, max_seconds=0.05))
    engine.submit(Request(prompt=prompts[0], drivers=plans[1:], max_new_tokens=3))
    with engine.ready():
        while engine.step():
            pass
    assert [plan.segments[0].stop for plan in plans] == ["seconds", "length"]
    assert 0 < len(plans[0].sampled) < 10_000


def test_rows_of_different_samplings_keep_their_own(model, prompts, processor, image) -> None:
    def play(samplings: list[Sampling]) -> list[list[int]]:
        plans = [Plan(budgets=[8], calls=[], prompt=prompts[0], processor=processor, image=image) for _ in samplings]
        requests = [
            Request(prompt=prompts[0], drivers=[plan], max_new_tokens=8, sampling=sampling, seed=5)
            for plan, sampling in zip(plans, samplings)
        ]
        BuiltinEngine(model).run(requests)
        return [plan.sampled for plan in plans]

    mixed = [GREEDY, Sampling(), Sampling(repetition_penalty=1.5), Sampling(presence_penalty=2.0, top_k=5)]
    assert play(mixed) == [play([sampling])[0] for sampling in mixed]


@pytest.mark.parametrize("is_training", [True, False])
@pytest.mark.parametrize("raises", [True, False])
def test_mode_and_attention_are_as_before_afterwards(is_training, raises, model, prompts) -> None:
    fresh = copy.deepcopy(model).train(is_training)
    fresh.config.llm_config._attn_implementation = "flash_attention_2"
    engine = BuiltinEngine(fresh)
    during: list[tuple[bool, str]] = []

    class Spy:
        def hear(self, token: int, logprob: float) -> None:
            during.append((fresh.training, fresh.config.llm_config._attn_implementation))
            if raises:
                raise KeyboardInterrupt

        def respond(self, segment: Segment) -> None:
            pass

    request = Request(prompt=prompts[2], drivers=[Spy()], max_new_tokens=1)
    if raises:
        with pytest.raises(KeyboardInterrupt):
            engine.run([request])
    else:
        engine.run([request])
    assert during == [(False, "looktwice_paged")]
    assert fresh.training is is_training
    assert all(module.training is is_training for module in fresh.modules())
    assert fresh.config.llm_config._attn_implementation == "flash_attention_2"


def calls_often(model: Ovis2_5ForConditionalGeneration, processor: Ovis2_5Processor) -> Ovis2_5ForConditionalGeneration:
    """A copy that ends a call about every tenth id, so that it cuts crops by itself."""
    chatty = copy.deepcopy(model)
    ids = torch.tensor([processor.template.encode("What is it? The red tile is in the middle.")])
    with torch.no_grad():
        usual = chatty.model(input_ids=ids).last_hidden_state[0].mean(0)
        chatty.lm_head.weight[processor.template.token_id("</tool_call>")] = 6 * usual / usual.square().sum()
    return chatty


def test_episodes_with_crops_give_the_training_forward_the_logprobs_they_recorded(model, processor, image) -> None:
    chatty, tool = calls_often(model, processor), CropTool(processor)

    def look(call_text: str, shown: list[Image.Image]) -> Observation:
        return tool.look(INSERTS[len(call_text) % 3], shown)

    rules = EpisodeRules(max_turns=4, max_new_tokens=40)
    asked = [question_about(text, image) for text in ("What?", "Who?")]
    groups = [start_episodes(prompt, processor, rules, count=4, look=look) for prompt in asked]
    play(BuiltinEngine(chatty, max_rows=5), groups, Sampling(), seeds=[0, 1])
    episodes: list[Episode] = [episode for group in groups for episode in group]
    num_crops = [sum(call.is_valid for call in episode.trajectory.calls) for episode in episodes]
    assert max(num_crops) >= 2 and len(set(num_crops)) > 1
    assert any(call.error for episode in episodes for call in episode.trajectory.calls)
    with torch.no_grad():
        trained = chatty(**pack([episode.example for episode in episodes]).model_inputs()).logprobs
    recorded = [
        logprob
        for episode in episodes
        for logprob, sampled in zip(episode.trajectory.sampling_logprobs, episode.trajectory.is_sampled)
        if sampled
    ]
    torch.testing.assert_close(torch.tensor(recorded), trained, atol=1e-4, rtol=0)


class OnlyThese:
    """Allows one id after the other; what it is told is noted."""

    def __init__(self, ids: list[int], size: int) -> None:
        self.ids, self.size = ids, size
        self.taken: list[int] = []
        self.put: list[int] = []

    def allowed(self) -> torch.Tensor | None:
        if len(self.taken) == len(self.ids):
            raise IndexError("nothing is left")
        allowed = torch.zeros(self.size, dtype=torch.bool)
        allowed[self.ids[len(self.taken)]] = True
        return allowed

    def take(self, token: int) -> None:
        self.taken.append(token)

    def put_in(self, ids) -> None:
        self.put += ids


def test_a_mask_decides_what_its_own_rollout_may_write(model, prompts, processor, image) -> None:
    ids = [7, 5, 9, 3, 8, 6]
    masks = [OnlyThese(ids, model.config.vocab_size), OnlyThese(ids[:2], model.config.vocab_size)]
    plans = [
        Plan(budgets=[3, 3], calls=[INSERTS[0]], prompt=prompts[0], processor=processor, image=image) for _ in "ab"
    ]
    free = Plan(budgets=[4], calls=[], prompt=prompts[1], processor=processor, image=image)
    alone = copy.deepcopy(free)
    asked = {"max_new_tokens": 3, "sampling": GREEDY}
    engine = BuiltinEngine(model)
    engine.run(
        [
            Request(prompt=prompts[0], drivers=plans, masks=masks, **asked),
            Request(prompt=prompts[1], drivers=[free], **asked),
        ]
    )
    BuiltinEngine(model).run([Request(prompt=prompts[1], drivers=[alone], **asked)])
    assert plans[0].sampled == ids == masks[0].taken and plans[0].logprobs == [0.0] * 6
    put_in = [token for token, flag in zip(plans[0].example.input_ids, plans[0].example.loss_mask) if not flag]
    assert masks[0].put == put_in[len(prompts[0]) :]
    assert isinstance(plans[1].error, IndexError) and masks[1].taken == ids[:2]
    assert free.sampled == alone.sampled and not engine.cache.holders


def test_a_picture_that_breaks_ends_its_own_rollout_alone(model, prompts, processor, image) -> None:
    """As one does that takes more memory than there is; the row that decodes goes on as if nothing had been."""

    def encode(pixels: torch.Tensor, grids: torch.Tensor) -> torch.Tensor:
        if broken:
            raise MemoryError("a large picture")
        return model.get_image_features(pixels, grids)

    broken: list[bool] = []
    first, second, alone = (
        Plan(budgets=[6], calls=[], prompt=prompt, processor=processor, image=image)
        for prompt in (prompts[0], prompts[1], prompts[0])
    )
    asked = {"max_new_tokens": 6, "sampling": GREEDY}
    engine = BuiltinEngine(model, encode=encode)
    engine.submit(Request(prompt=prompts[0], drivers=[first], **asked))
    engine.step()
    broken.append(True)
    engine.submit(Request(prompt=prompts[1], drivers=[second], **asked))
    while engine.step():
        pass
    BuiltinEngine(model).run([Request(prompt=prompts[0], drivers=[alone], **asked)])
    assert isinstance(second.error, MemoryError) and first.error is None
    assert first.sampled == alone.sampled and not engine.cache.holders


def test_an_adapter_that_is_not_there_is_refused_at_once(model, prompts) -> None:
    with pytest.raises(ConfigError, match="no adapter 'a' in the engine"):
        BuiltinEngine(model).submit(Request(prompt=prompts[0], drivers=[], max_new_tokens=1, adapter="a"))
