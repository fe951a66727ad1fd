"""The built-in engine against plain forwards: same ids and logprobs, whatever is admitted, inserted or stopped."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import pytest
import torch
from PIL import Image

from looktwice.messages import question_about
from looktwice.model.modeling import Ovis2_5ForConditionalGeneration
from looktwice.processing.packing import pack
from looktwice.processing.processor import Example, Ovis2_5Processor
from looktwice.rollout.builtin_engine import BuiltinEngine, RowCache
from looktwice.rollout.crop_tool import CropTool, Observation, observed
from looktwice.rollout.engine import Continuation, Request, Segment
from looktwice.rollout.episode import Episode, EpisodeRules, play, start_episodes
from looktwice.rollout.sampling import Sampling

GREEDY = Sampling(temperature=0)
INSERTS = ("[0, 0, 48, 48]", "[40, 20, 160, 110]", "[5, 5, 2, 2]")
"""Two crops of different size and a refusal."""


@dataclass(kw_only=True)
class Plan:
    """What a test inserts into one rollout: budgets of its segments, and a call to answer between two of them."""

    budgets: list[int]
    calls: list[str]
    prompt: Example
    example: Example = field(init=False)
    logprobs: list[float] = field(default_factory=list)
    segments: list[Segment] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.example = self.prompt.copy()

    def respond(self, segment: Segment, processor: Ovis2_5Processor, image: Image.Image) -> Continuation | None:
        self.example.append(segment.ids, is_trained=True)
        self.logprobs += segment.logprobs
        self.segments.append(segment)
        number = len(self.segments)
        if number == len(self.budgets):
            return None
        ids, images = observed(CropTool(processor).look(self.calls[number - 1], image), processor)
        self.example.append(ids, is_trained=False)
        self.example.images += images
        return Continuation(ids=ids, images=images, max_new_tokens=self.budgets[number])


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

    def run(sampling: Sampling, *, max_rows: int, stop_ids: tuple[int, ...] = (), seed: int = 0) -> list[Plan]:
        groups = [(prompts[0], 1), (prompts[1], 5), (prompts[2], 2)]
        plans = [
            Plan(budgets=[3 + number, 4, 2 + number % 3][: 1 + number % 3], calls=rotated(number), prompt=prompt)
            for number, prompt in enumerate(prompt for prompt, size in groups for _ in range(size))
        ]
        requests = []
        for prompt, size in groups:
            first = sum(request.num_rollouts for request in requests)
            budgets = {plan.budgets[0] for plan in plans[first : first + size]}
            requests.append(Request(prompt=prompt, num_rollouts=size, max_new_tokens=max(budgets)))
        engine = BuiltinEngine(
            model,
            sampling=sampling,
            stop_ids=stop_ids,
            forbidden_ids=processor.config.visual_token_ids,
            max_rows=max_rows,
            generator=torch.Generator().manual_seed(seed),
        )
        engine.run(requests, lambda number, segment: plans[number].respond(segment, processor, image))
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


@pytest.mark.parametrize("max_rows", [2, 64])
def test_greedy_ids_equal_those_of_a_full_forward_at_each_step(max_rows, roll, model, processor) -> None:
    for plan in roll(GREEDY, max_rows=max_rows):
        sampled = [token for token, flag in zip(plan.example.input_ids, plan.example.loss_mask) if flag]
        assert sampled == recomputed(model, plan.example, processor.config.visual_token_ids)


def test_greedy_rollouts_do_not_depend_on_how_many_advance_together(roll) -> None:
    expected = [plan.example.input_ids for plan in roll(GREEDY, max_rows=64)]
    for max_rows in (1, 3, 5):
        assert [plan.example.input_ids for plan in roll(GREEDY, max_rows=max_rows)] == expected


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
    lengths = [[len(segment.ids) for segment in plan.segments] for plan in plans]
    groups = [plans[:1], plans[1:6], plans[6:]]
    first = [max(plan.budgets[0] for plan in group) for group in groups for _ in group]
    assert lengths == [[longest, *plan.budgets[1:]] for longest, plan in zip(first, plans)]


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


def test_a_prompt_is_computed_once_for_its_siblings_and_a_crop_alone(
    model, processor, prompts, image, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_patches: list[int] = []
    plain = model.get_image_features
    monkeypatch.setattr(
        model, "get_image_features", lambda pixels, grids: num_patches.append(len(pixels)) or plain(pixels, grids)
    )
    plans = [Plan(budgets=[2, 2], calls=[INSERTS[0]], prompt=prompts[0]) for _ in range(4)]
    engine = BuiltinEngine(model, sampling=GREEDY, stop_ids=[], forbidden_ids=[])
    request = Request(prompt=prompts[0], num_rollouts=4, max_new_tokens=2)
    engine.run([request], lambda number, segment: plans[number].respond(segment, processor, image))
    overview, crop = (len(one.pixel_values) for one in plans[0].example.images)
    assert num_patches == [overview, 4 * crop]


def test_a_row_can_be_copied_when_it_fills_the_cache() -> None:
    cache = RowCache(1, num_rows=3)
    keys = torch.arange(6.0).view(2, 1, 3, 1)
    cache.capacity = 3
    cache.aim([1, 2], torch.arange(3).expand(2, -1), 3)
    cache.update(keys, -keys, 0)
    cache.copy_row(2, [0, 1], 3)
    assert cache.keys[0].flatten().tolist() == [3, 4, 5] * 3
    assert cache.values[0].flatten().tolist() == [-3, -4, -5] * 3


def test_an_engine_for_answers_stops_at_calls_and_turn_ends_and_samples_no_visual_id(model, processor) -> None:
    engine = BuiltinEngine.for_answers(model, processor, GREEDY, max_rows=4, seed=0)
    tokens = processor.tokenizer.convert_ids_to_tokens(sorted(engine.stop_ids))
    assert sorted(tokens) == ["</tool_call>", "<|endoftext|>", "<|im_end|>"]
    assert tuple(engine.forbidden.tolist()) == processor.config.visual_token_ids


def test_no_requests_are_no_work(model) -> None:
    engine = BuiltinEngine(model, sampling=GREEDY, stop_ids=[], forbidden_ids=[])
    engine.run([], lambda number, segment: pytest.fail("nothing was asked"))


@pytest.mark.parametrize("is_training", [True, False])
@pytest.mark.parametrize("raises", [True, False])
def test_mode_and_attention_are_as_before_afterwards(is_training, raises, model, prompts) -> None:
    fresh = copy.deepcopy(model).train(is_training)
    fresh.config.llm_config._attn_implementation = "flash_attention_2"
    engine = BuiltinEngine(fresh, sampling=GREEDY, stop_ids=[], forbidden_ids=[])
    during: list[tuple[bool, str]] = []

    def respond(number: int, segment: Segment) -> None:
        during.append((fresh.training, fresh.config.llm_config._attn_implementation))
        if raises:
            raise ZeroDivisionError

    request = Request(prompt=prompts[2], num_rollouts=1, max_new_tokens=1)
    if raises:
        with pytest.raises(ZeroDivisionError):
            engine.run([request], respond)
    else:
        engine.run([request], respond)
    assert during == [(False, "packed_sdpa")]
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

    def look(call_text: str, shown: Image.Image | None) -> Observation:
        return tool.look(INSERTS[len(call_text) % 3], shown)

    rules = EpisodeRules(max_turns=4, max_new_tokens=40)
    asked = [question_about(text, image) for text in ("What?", "Who?")]
    groups = [start_episodes(prompt, processor, rules, count=4, look=look) for prompt in asked]
    engine = BuiltinEngine.for_answers(chatty, processor, Sampling(), max_rows=5, seed=0)
    play(engine, groups)
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
