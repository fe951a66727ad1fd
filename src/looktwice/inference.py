"""Asking a model: one question or many at once, crops run inside, answers with thinking and every crop's box."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice, repeat
from os import PathLike
from typing import Any, get_args

import torch

from looktwice.asking.answer import Answer
from looktwice.asking.asked import Asked, begin
from looktwice.asking.events import Event, Tell
from looktwice.config import AnswerConfig, InferenceConfig
from looktwice.engine.builtin import BuiltinEngine
from looktwice.engine.sampling import mixed_seed
from looktwice.errors import ConfigError, short_path
from looktwice.grounding import GroundingKind, grounding_question
from looktwice.messages import Conversation, VideoPart, VideoSource, check_question, question_about, user
from looktwice.model.adapters import for_inference, merge
from looktwice.model.attention import is_gpu, pick_attention
from looktwice.model.location import locate
from looktwice.model.weights import is_adapter, load_model, pick_device
from looktwice.processing.processor import Example, Ovis2_5Processor
from looktwice.processing.shown import Shown, parts_shown
from looktwice.rollout.episode import Look
from looktwice.rollout.trajectory import Trajectory

Question = Conversation | tuple[Shown | list[Shown] | VideoPart | None, str]
"""A conversation that ends where the assistant is to answer, or what is shown and what is asked about it."""
AHEAD, HELD = 2, 16
"""How many times the live questions are begun, so that a free place is taken at once, and how many times they may wait
for a slow one before them."""
QUESTIONS_MEND = "give a list of pairs (picture, question), or of conversations"


class OvisInference:
    """A loaded model that answers questions about pictures and videos.

    A model's folder or name stands for a config of it; settings then come by name: OvisInference("tiny", device="cpu").
    Example: OvisInference(InferenceConfig(model_path="outputs/grpo/final_model")).generate(image, "What is this?")
    """

    def __init__(self, config: InferenceConfig | str | PathLike[str] | None = None, **settings: Any) -> None:
        """Load the model. Raises ConfigError for what is no config of one, and as `load_model` does."""
        if isinstance(config, (str, PathLike)) and "model_path" not in settings:
            settings["model_path"] = config
        elif config is not None and (settings or not isinstance(config, InferenceConfig)):
            what = "two configs are given" if settings else f"the config is of type {type(config).__name__}"
            raise ConfigError(f"{what}; give an InferenceConfig, or the model's folder and settings by name")
        self.config = config if isinstance(config, InferenceConfig) else InferenceConfig(**settings)
        self.processor = Ovis2_5Processor.from_pretrained(locate(self.config.model_path))
        self.processor.policy = self.processor.policy.override(image_max_pixels=self.config.max_pixels)
        device = pick_device(self.config.device)
        is_bf16 = is_gpu(device) if self.config.bf16 is None else self.config.bf16
        dtype = torch.bfloat16 if is_bf16 else torch.float32
        model = load_model(
            self.config.model_path,
            dtype=dtype,
            device=device,
            attn_implementation=pick_attention(self.config.attn_implementation, device, is_bf16=is_bf16),
            quantization=self.config.quantization,
        )
        # an adapter merged into quantised weights would be rounded away
        self.model = merge(model) if self.config.quantization == "none" else for_inference(model)

    @property
    def described(self) -> str:
        """Which model this is and how it computes, in a line."""
        model, name = self.model, short_path(self.config.model_path)
        adapter = f" (adapter on {short_path(model.name_or_path)})" if is_adapter(self.config.model_path) else ""
        size = f"{sum(parameter.numel() for parameter in model.parameters()) / 1e6:,.1f}M parameters"
        width = {"nf4": ", 4 bits", "int8": ", 8 bits"}.get(self.config.quantization, "")
        devices = sorted({str(parameter.device) for parameter in model.parameters()})
        return f"{name}{adapter}: {size}, {str(model.dtype).removeprefix('torch.')}{width} on {', '.join(devices)}"

    def generate(
        self,
        image: Shown | list[Shown] | None = None,
        question: str = "",
        video: VideoSource | None = None,
        **generation: Any,
    ) -> Answer:
        """The answer to one question about a picture, a list of them, a video, or nothing to look at.

        A picture is a path, a PIL picture, the bytes of a file, or an array of uint8 [height, width, channels], red
        first. `video` is a path, of which `num_frames` are seen, or a list of frames, which are all seen. Crops are cut
        from the picture that a call names (`image 2` before its box), else from the first, never from a video.
        `generation` are fields of AnswerConfig that hold for this call, such as `temperature=0.7`. Where it
        samples, each call draws anew, from torch's own generator, which `torch.manual_seed` sets; with a `seed` it
        repeats.

        Raises ConfigError for a picture beside a video, without a question, for what is no picture, and for a wrong
        setting; ImageError for a picture or video that cannot be read.
        """
        return self.chat(question, image, video=video, **generation)

    def chat(
        self,
        question: str,
        image: Shown | list[Shown] | None = None,
        history: Conversation | None = None,
        *,
        video: VideoSource | None = None,
        **generation: Any,
    ) -> Answer:
        """The answer to one more question of a conversation: `history` is that of the answer before, None at first.

        Pictures may come with any question, and are counted through the whole conversation. Otherwise as `generate`.
        """
        return self.batch_generate([_conversation(question, image, video, history)], **generation)[0]

    def stream(
        self,
        image: Shown | list[Shown] | None = None,
        question: str = "",
        video: VideoSource | None = None,
        *,
        history: Conversation | None = None,
        **generation: Any,
    ) -> Iterator[Event]:
        """What happens while a question is answered, as it happens: `asking/events.py` has the events.

        The first `kind`s are "thinking", "crop" and "answer", in the order in which the model writes, and the last is
        "done", with the whole answer. Arguments are those of `generate` and `chat`, and judged at once. Who stops
        listening stops the model.
        """
        events: deque[Event] = deque()
        asked = self.ask(_conversation(question, image, video, history), events.append, **generation)
        return self._streamed(asked, events)

    def generate_with_grounding(
        self, image: Shown, phrase: str, kind: GroundingKind = "box", **generation: Any
    ) -> Answer:
        """Where in a picture something is: asks for its boxes or points as the released models were trained for.

        `grounding` of the answer has the places, in original pixels. Raises ConfigError for another kind or no phrase,
        and as `generate` does.
        """
        if kind not in get_args(GroundingKind):
            raise ConfigError(f"the kind of grounding is {kind!r}; give box or point")
        check_question(phrase)
        return self.generate(image, grounding_question(phrase, kind), **generation)

    def batch_generate(self, questions: Iterable[Question], **generation: Any) -> list[Answer]:
        """Answers to many questions, in order, all advancing together; a video is given as VideoPart in the picture's
        place.

        With a seed an answer is the same alone and beside any others, and the same question twice has one answer.
        """
        _check_questions(questions)
        settings = self.config.answer(**generation)
        asked = (self._asked(question_as_conversation(one), settings) for one in questions)
        return [done.answer for done in self.finish(asked) if done.answer is not None]

    def play(self, questions: Iterable[Question], looks: Iterable[Look] | None = None) -> list[Trajectory]:
        """The finished rollouts of the questions; `looks`, one for each, stand in the crop tool's place."""
        _check_questions(questions)
        settings = self.config.answer()
        each = zip(questions, repeat(None) if looks is None else looks)
        asked = (self._asked(question_as_conversation(one), settings, look=look) for one, look in each)
        return [done.episode.trajectory for done in self.finish(asked)]

    def ask(self, question: Question, tell: Tell | None = None, **generation: Any) -> Asked:
        """A question ready for an engine: submit its `request`, and `tell` hears what happens.

        That is how many callers share one engine, each by itself: the numbers that `submit` gives can be cancelled.
        Raises as `generate` does.
        """
        return self._asked(question_as_conversation(question), self.config.answer(**generation), tell)

    def ask_times(self, question: Question, tells: Sequence[Tell | None], **generation: Any) -> list[Asked]:
        """A question to be answered once for each of `tells`, each time drawn by itself: all have one `request`, to be
        submitted once, and share its prompt. Otherwise as `ask`."""
        settings = self.config.answer(**generation)
        conversation, seed_of = question_as_conversation(question), seeds_of(settings.seed)
        return begin(conversation, self.processor, settings, seed_of=seed_of, tells=tells)

    def engine(self, **options: Any) -> BuiltinEngine:
        """A new engine of this model, for requests of `ask`; options are those of BuiltinEngine."""
        options = {"max_rows": self.config.batch_size, **options}
        return BuiltinEngine(self.model, decode=self.processor.decode, **options)

    def finish(self, asked: Iterable[Asked]) -> Iterator[Asked]:
        """Questions at their end, in order: `batch_size` advance together, and only the pictures of a few more are held
        in memory. Siblings of `ask_times` stand beside each other. An error of `asked` is raised when its turn to begin
        comes."""
        size = self.config.batch_size
        engine = self.engine()
        coming = iter(asked)
        begun: deque[Asked] = deque()
        submitted = None
        while True:
            num_live = sum(not one.is_over for one in begun)
            for one in islice(coming, max(0, min(AHEAD * size - num_live, HELD * size - len(begun)))):
                if one.request is not submitted:  # siblings have one
                    engine.submit(one.request)
                submitted = one.request
                begun.append(one)
            if not begun:
                return
            if begun[0].is_over:
                yield begun.popleft()
            else:
                engine.step()

    def _asked(
        self,
        conversation: Conversation,
        generation: AnswerConfig,
        tell: Tell | None = None,
        look: Look | None = None,
    ) -> Asked:
        seed_of = seeds_of(generation.seed)
        return begin(conversation, self.processor, generation, seed_of=seed_of, tells=[tell], look=look)[0]

    def _streamed(self, asked: Asked, events: deque[Event]) -> Iterator[Event]:
        engine = self.engine(max_rows=1)
        engine.submit(asked.request)
        is_going = True
        while is_going:
            is_going = engine.step()
            while events:
                yield events.popleft()


def seeds_of(seed: int | None) -> Callable[[Example], int]:
    """The seed of a prompt: of its ids and pictures and nothing else when a seed is given, else always another one,
    from torch's own generator."""
    if seed is None:
        return lambda prompt: int(torch.randint(2**62, ()))
    return lambda prompt: mixed_seed(seed, repr(prompt.input_ids).encode(), *(image.key for image in prompt.images))


def question_as_conversation(asked: Question) -> Conversation:
    """A question as the conversation that asks it. Raises ConfigError for what is no question."""
    if isinstance(asked, Conversation):
        return asked
    if not isinstance(asked, (tuple, list)) or len(asked) != 2:
        raise ConfigError(f"a question is of type {type(asked).__name__}; {QUESTIONS_MEND}")
    shown, text = asked
    check_question(text)
    return question_about(text, *parts_shown(shown))


def _check_questions(questions: object) -> None:
    if isinstance(questions, (str, bytes, Conversation)) or not isinstance(questions, Iterable):
        raise ConfigError(f"the questions are of type {type(questions).__name__}; {QUESTIONS_MEND}")


def _conversation(
    question: str, image: Shown | list[Shown] | None, video: VideoSource | None, history: Conversation | None
) -> Conversation:
    """The conversation so far with one more question."""
    if image is not None and video is not None:
        raise ConfigError("a picture and a video are both given; ask about one of them")
    if history is not None and not isinstance(history, Conversation):
        raise ConfigError(f"the history is of type {type(history).__name__}; give `history` of the answer before")
    check_question(question)
    shown = image if video is None else VideoPart(source=video)
    before = () if history is None else history.messages
    return Conversation(messages=(*before, user(question, *parts_shown(shown))))
