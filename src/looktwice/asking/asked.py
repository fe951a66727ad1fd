"""A question on its way through an engine: its request, whoever follows it, and at its end its answer.

Whoever runs an engine for many (a loop, a server) submits `request` and steps; events come by `tell`, in the thread
that steps, or in that of a driver where the engine has threads.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from looktwice.asking.answer import Answer, Seconds, answer_of, crop_of, remembered
from looktwice.asking.events import Cropped, Done, Letters, Said, Splitter, Tell, Thinking
from looktwice.config import AnswerConfig
from looktwice.engine.interface import Request
from looktwice.engine.sampling import Sampling
from looktwice.messages import Conversation, assistant, system
from looktwice.processing.processor import Example, Ovis2_5Processor
from looktwice.rollout.conversation import open_images
from looktwice.rollout.episode import Episode, EpisodeRules, Look, Watcher, request_of, start_episodes
from looktwice.rollout.trajectory import ToolCall, Trajectory


def rules_of(generation: AnswerConfig) -> EpisodeRules:
    """The rules of an answer."""
    return EpisodeRules(
        max_turns=generation.allowed_turns,
        max_crops=generation.max_crops,
        max_new_tokens=generation.max_new_tokens,
        thinking=generation.enable_thinking,
        thinking_budget=generation.enforced_budget,
        max_turn_tokens=generation.max_turn_tokens,
        max_visual_tokens=generation.max_visual_tokens,
        max_seconds=generation.max_seconds,
        stop_texts=generation.stop_texts,
    )


def sampling_of(generation: AnswerConfig) -> Sampling:
    """How the ids of an answer are drawn."""
    return Sampling(
        temperature=generation.sampling_temperature,
        top_p=generation.top_p,
        top_k=generation.top_k,
        min_p=generation.min_p,
        repetition_penalty=generation.repetition_penalty,
        presence_penalty=generation.presence_penalty,
    )


def begin(
    conversation: Conversation,
    processor: Ovis2_5Processor,
    generation: AnswerConfig,
    *,
    seed_of: Callable[[Example], int],
    tells: Sequence[Tell | None] = (None,),
    look: Look | None = None,
) -> list[Asked]:
    """A question begun once for each of `tells`: siblings with one request, which share their prompt in an engine.

    The pictures are opened and the prompt is written here, in the caller's thread. Raises ImageError for a picture or
    video that cannot be read.
    """
    messages = conversation.messages
    if generation.system and not any(message.role == "system" for message in messages):
        conversation = Conversation(messages=(system(generation.system), *messages))
    siblings = [Asked(conversation, processor, tell) for tell in tells]
    opened = open_images(conversation, num_frames=generation.num_frames)
    rules = rules_of(generation)
    episodes = start_episodes(opened, processor, rules, count=len(siblings), look=look, watchers=siblings)
    request = request_of(episodes, sampling_of(generation), seed_of(episodes[0].prompt))
    for asked, episode in zip(siblings, episodes):
        asked.episode, asked.request = episode, request
    return siblings


class Asked(Watcher):
    """One question that was begun, by `begin`. `answer` is there when `is_over`; `request` is what an engine takes."""

    episode: Episode
    request: Request

    def __init__(self, conversation: Conversation, processor: Ovis2_5Processor, tell: Tell | None = None) -> None:
        self.conversation = conversation
        self.tell = tell
        self.answer: Answer | None = None
        self.letters, self.splitter = Letters(processor.decode_few), Splitter()
        self.end_ids = frozenset(processor.end_ids)
        self.call_text = ""
        self.untold: list[tuple[int, float]] = []
        self.begun = time.monotonic()
        self.first: float | None = None

    @property
    def is_over(self) -> bool:
        return self.episode.is_over

    def token(self, token: int, logprob: float) -> None:
        if self.first is None:
            self.first = time.monotonic() - self.begun
        if self.tell is not None and token not in self.end_ids:
            self.untold.append((token, logprob))
            self._split(self.letters.add(token))

    def thinking_closed(self, text: str) -> None:
        if self.tell is not None:
            self._split(self.letters.end() + text)

    def crop_begun(self, call_text: str) -> None:
        self.call_text = call_text

    def crop_done(self, call: ToolCall) -> None:
        if self.tell is not None:
            self._split(self.letters.end())
            self.tell(Cropped(crop_of(call, self.call_text, self.episode.images)))

    def finished(self, trajectory: Trajectory) -> None:
        told = assistant(remembered(trajectory.text))
        self.answer = answer_of(
            trajectory,
            history=Conversation(messages=(*self.conversation.messages, told)),
            seen=next(iter(self.episode.prompt.images), None),
            num_crop_tokens=self.episode.num_visual_tokens,
            seconds=Seconds(first=self.first, total=time.monotonic() - self.begun),
        )
        if self.tell is not None:
            self._split(self.letters.end())
            self._tell_all(self.splitter.end())
            self.tell(Done(self.answer))

    def _split(self, text: str) -> None:
        self._tell_all(self.splitter.add(text))

    def _tell_all(self, events: Iterable[Thinking | Said]) -> None:
        """Tell events, the first that says something with the ids since the one before."""
        assert self.tell is not None
        for event in events:
            if isinstance(event, Said):
                event, self.untold = replace(event, tokens=tuple(self.untold)), []
            self.tell(event)
        if not (self.splitter.held or self.letters.held):
            self.untold = []  # of thinking, a call or a tag
