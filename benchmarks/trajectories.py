"""The work that all ways of rolling out are given: 64 trajectories with set turns and crops, whatever is sampled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
from PIL import Image

from looktwice.calls import format_call
from looktwice.demo.task import Board, draw_board, question, sample_board
from looktwice.engine.interface import Continuation, Request, Segment
from looktwice.messages import Conversation, user
from looktwice.processing.images import PatchedImage
from looktwice.processing.processor import Example, Ovis2_5Processor
from looktwice.rollout.crop_tool import CropTool, observed

NUM_PROMPTS, GROUP = 8, 8
SHORTEST, LONGEST, MAX_CROPS = 10, 120, 3
"""Tokens sampled by a trajectory in all its turns, and crops between them."""
BOXES_PER_PROMPT = 5
"""Siblings choose among as many, so some of their crops are equal."""

Inserted = tuple[list[int], list[PatchedImage]]


class Plan(NamedTuple):
    """What a trajectory does: ids to sample in each turn, and the tile of the board it looks at after each but the
    last."""

    prompt: int
    turns: tuple[int, ...]
    tiles: tuple[str, ...]

    @property
    def num_sampled(self) -> int:
        return sum(self.turns)


class Script:
    """The Driver of a trajectory whose turns are set. `example` and `logprobs` are what came of it."""

    def __init__(self, prompt: Example, turns: Sequence[int], insertions: Sequence[Callable[[], Inserted]]) -> None:
        self.example = prompt.sibling()
        self.logprobs: list[float] = []
        self.num_heard = 0
        self.error: Exception | None = None
        self.num_left, *self.turns = turns
        self.insertions = list(insertions)

    def hear(self, token: int, logprob: float) -> None:
        self.num_heard += 1

    def respond(self, segment: Segment) -> Continuation | None:
        self.example.append(segment.ids, is_trained=True)
        self.logprobs += segment.logprobs
        self.num_left -= len(segment.ids)
        if self.num_left:  # siblings are cut where the shortest first turn ends
            return Continuation(max_new_tokens=self.num_left)
        if not self.turns:
            return None
        self.num_left = self.turns.pop(0)
        ids, images = self.insertions.pop(0)()
        self.example.append(ids, is_trained=False)
        self.example.images += images
        return Continuation(ids=ids, images=images, max_new_tokens=self.num_left)

    def fail(self, error: Exception) -> None:
        self.error = error

    def check(self) -> None:
        """Raise what ended it early; it must have sampled all it was to."""
        if self.error:
            raise self.error
        assert not self.num_left and not self.turns


class Work:
    """Boards of the demo task, a question about each, and plans: the same in every run."""

    def __init__(self, processor: Ovis2_5Processor) -> None:
        rng = np.random.default_rng(0)
        self.processor = processor
        self.tool = CropTool(processor)
        self.boards = [sample_board(rng) for _ in range(NUM_PROMPTS)]
        self.pictures = [draw_board(board, rng) for board in self.boards]
        self.prompts = [self._prompt(board, picture) for board, picture in zip(self.boards, self.pictures)]
        self.plans = draw_plans(self.boards, rng)

    def _prompt(self, board: Board, picture: Image.Image) -> Example:
        conversation = Conversation(messages=(user(question(board, board.colours[0]), picture),))
        return self.processor.encode(conversation, purpose="prompt")

    def scripts(self, plans: Sequence[Plan]) -> list[Script]:
        """Fresh drivers. Crops are cut anew by each, as an episode does."""
        return [
            Script(
                self.prompts[plan.prompt], plan.turns, [partial(self._look, plan.prompt, tile) for tile in plan.tiles]
            )
            for plan in plans
        ]

    def _look(self, prompt: int, tile: str) -> Inserted:
        call = format_call(str(side) for side in self.boards[prompt].box_of(tile))
        return observed(self.tool.look(call, [self.pictures[prompt]]), self.processor)

    def num_distinct_pictures(self, plans: Sequence[Plan]) -> int:
        crops = {(plan.prompt, tile) for plan in plans for tile in plan.tiles}
        return len({plan.prompt for plan in plans}) + len(crops)

    def requests(self, plans: Sequence[Plan], scripts: Sequence[Script]) -> list[Request]:
        """Siblings in one request; its segments end with the shortest first turn among them."""
        groups: dict[int, list[Script]] = {}
        for plan, script in zip(plans, scripts):
            groups.setdefault(plan.prompt, []).append(script)
        return [
            Request(
                prompt=self.prompts[prompt],
                drivers=drivers,
                max_new_tokens=min(driver.num_left for driver in drivers),
                seed=prompt,
            )
            for prompt, drivers in groups.items()
        ]


def draw_plans(boards: Sequence[Board], rng: np.random.Generator) -> list[Plan]:
    """Evenly from 10 to 120 tokens and from 0 to 3 crops, in an order that mixes both; cut into turns at random."""
    num_rollouts = NUM_PROMPTS * GROUP
    lengths = rng.permutation(np.linspace(SHORTEST, LONGEST, num_rollouts).round().astype(int))
    num_crops = rng.permutation(np.arange(num_rollouts) % (MAX_CROPS + 1))
    plans = []
    for number, (length, count) in enumerate(zip(lengths.tolist(), num_crops.tolist())):
        ends = sorted(rng.choice(np.arange(1, length), count, replace=False).tolist())
        turns = tuple(end - start for start, end in zip([0, *ends], [*ends, length]))
        tiles = rng.permutation(boards[number // GROUP].colours[:BOXES_PER_PROMPT])[:count]
        plans.append(Plan(number // GROUP, turns, tuple(tiles.tolist())))
    return plans
