"""Whether all ways to compute with a model agree: training's packed rows, the engine, transformers, TRL and vLLM.

Training's forward is what the others are compared with. Logits are compared as shares of the largest one, logprobs in
nats; those of visual ids are left out, since no id of a picture is ever predicted.

Legend: T tokens of a sequence, V vocabulary.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText

from looktwice.config import GRPOConfig
from looktwice.doctor.probes import TOKEN_KINDS, TokenKind, conversation_of, examples_of, kinds_of, probes, prompts_of
from looktwice.engine.builtin import BuiltinEngine
from looktwice.engine.interface import Continuation, Engine, Request, Segment
from looktwice.errors import LooktwiceError, one_line
from looktwice.export import ROUNDING
from looktwice.model.adapters import merged
from looktwice.model.attention import pick_attention
from looktwice.model.location import locate
from looktwice.model.weights import load_model, pick_device
from looktwice.processing.images import PatchedImage
from looktwice.processing.packing import pack
from looktwice.processing.processor import Example, Ovis2_5Processor
from looktwice.rollout.episode import EpisodeRules, start_episodes
from looktwice.training.canaries import LARGEST_GAP, LARGEST_ROUGH_GAP, check_rollouts
from looktwice.training.learner import Learner
from looktwice.training.sampler import Sampler

NUM_TURNS, TURN_TOKENS = 3, 16
"""Of what the engines sample: completions with a crop after each but the last."""
ENGINE, TRANSFORMERS, TRL, VLLM = "built-in engine", "transformers", "TRL's collator", "vLLM"


@dataclass(frozen=True)
class Gap:
    """How far a way is from training's forward, where the model has read tokens of one kind.

    `logits` is the largest difference as a share of the largest logit, `mean` and `worst` are of logprobs in nats; None
    where a way has none.
    """

    way: str
    kind: TokenKind
    num_tokens: int
    logits: float | None
    mean: float | None
    worst: float | None

    def is_kept(self, dtype: torch.dtype) -> bool:
        """Whether rounding in the dtype explains it; NaN is never explained."""
        largest = LARGEST_GAP if dtype == torch.float32 else LARGEST_ROUGH_GAP
        return (self.logits is None or self.logits <= ROUNDING[dtype]) and (self.mean is None or self.mean <= largest)


@dataclass(frozen=True)
class Parity:
    """What was found: gaps; ways that could not be tried or failed, and why; what the canaries saw."""

    dtype: torch.dtype
    gaps: list[Gap]
    left_out: dict[str, str]
    failed: dict[str, str]
    canaries: dict[str, float]

    @property
    def broken(self) -> list[str]:
        """What is not as it must be, a line each."""
        gaps = [f"{gap.way}, {gap.kind}" for gap in self.gaps if not gap.is_kept(self.dtype)]
        return [f"{name}: more than rounding in {self.dtype}" for name in gaps] + [
            f"{name}: {reason}" for name, reason in self.failed.items()
        ]


def compare(name: str, *, device: str | None = None, is_bf16: bool = False, vllm: Sequence[str] = ()) -> Parity:
    """Compare all ways with a model that can be tried here, one model in memory at a time.

    Raises as `load_model` does; what fails in one of the ways is told in `failed`.
    """
    dtype = torch.bfloat16 if is_bf16 else torch.float32
    place = pick_device(device)
    processor = Ovis2_5Processor.from_pretrained(locate(name))
    examples = examples_of(processor)
    found = Parity(dtype, gaps=[], left_out={}, failed={}, canaries={})
    attention = pick_attention("auto", place, is_bf16=is_bf16)
    model = load_model(name, dtype=dtype, device=place, attn_implementation=attention)
    config = GRPOConfig(bf16=is_bf16, max_new_tokens=TURN_TOKENS)
    learner = Learner(model, processor, config, total_steps=1)
    model.eval()
    ours = logits_of_training(learner, examples)
    with attempt(found, ENGINE), learner.precision(), merged(learner.base):
        engine = BuiltinEngine(learner.base, cache_tokens=4096)
        scripts = played(engine, processor)
    if ENGINE not in found.failed:
        found.gaps.extend(gaps_of_scripts(ENGINE, learner, scripts))
    if vllm:
        with attempt(found, VLLM):
            found.gaps.extend(gaps_of_scripts(VLLM, learner, played(served(vllm, learner), processor)))
    else:
        found.left_out[VLLM] = "name a server: --vllm http://host:8000"
    with attempt(found, "canaries"):
        found.canaries.update(canaries(learner))
    del learner, model
    gc.collect()
    with attempt(found, TRANSFORMERS):
        theirs = AutoModelForImageTextToText.from_pretrained(
            locate(name), dtype=dtype, device_map={"": place}, attn_implementation="sdpa"
        ).eval()
        found.gaps.extend(gaps_of_logits(TRANSFORMERS, ours, logits_of_calls(theirs, processor), examples, processor))
        if find_spec("trl") is None:
            found.left_out[TRL] = "pip install trl"
            return found
    with attempt(found, TRL):
        found.gaps.extend(gaps_of_logits(TRL, ours, logits_of_trl(theirs, processor), examples, processor))
    return found


class attempt(ExitStack):
    """Inside, what goes wrong is that of one way, and noted as such."""

    def __init__(self, found: Parity, way: str) -> None:
        super().__init__()
        self.found, self.way = found, way

    def __exit__(self, kind: Any, error: Any, trace: Any) -> bool:
        super().__exit__(kind, error, trace)
        if not isinstance(error, Exception):
            return False
        words = str(error) if isinstance(error, LooktwiceError) else f"{type(error).__name__}: {error}"
        self.found.failed[self.way] = one_line(words)
        return True


@torch.no_grad()
def logits_of_training(learner: Learner, examples: Sequence[Example]) -> list[Tensor]:
    """Of each sequence [T, V] in float32 on the host, all packed into one row."""
    batch = pack(examples)
    inputs = batch.model_inputs(learner.base.device)
    del inputs["loss_mask"]
    with learner.precision():
        logits = learner.base(**inputs).logits[0].float().cpu()
    return list(logits.split(batch.cu_seqlens.diff().tolist()))


@torch.no_grad()
def logits_of_calls(model: Any, processor: Ovis2_5Processor) -> list[tuple[list[int], Tensor]]:
    """Ids and logits of each probe by itself, written by the processor's Hugging Face call."""
    found = []
    for turns in probes():
        inputs: Any = processor.apply_chat_template(turns, tokenize=True, return_dict=True, return_tensors="pt")
        logits = model(**inputs.to(model.device)).logits[0].float().cpu()
        found.append((inputs["input_ids"][0].tolist(), logits))
    return found


@torch.no_grad()
def logits_of_trl(model: Any, processor: Ovis2_5Processor) -> list[tuple[list[int], Tensor]]:
    """Ids and logits of each probe with a picture, in one padded batch that TRL's collator makes."""
    from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

    rows = [row_of_trl(turns) for turns in probes()]
    batch = DataCollatorForVisionLanguageModeling(processor)([row for row in rows if row["images"]])
    inputs = {name: value.to(model.device) for name, value in batch.items() if name != "labels"}
    logits = model(**inputs).logits.float().cpu()
    masks = batch["attention_mask"].bool()
    return [(ids[mask].tolist(), row[mask]) for ids, mask, row in zip(batch["input_ids"], masks, logits)]


def row_of_trl(turns: list[dict[str, Any]]) -> dict[str, Any]:
    """A row of a data set as TRL reads it: the pictures in a column of their own, their places in the messages."""
    parts = [part for turn in turns for part in turn["content"]]
    messages = [
        {
            "role": turn["role"],
            "content": [{key: value for key, value in part.items() if key != "image"} for part in turn["content"]],
        }
        for turn in turns
    ]
    return {"messages": messages, "images": [part["image"] for part in parts if part["type"] == "image"]}


def gaps_of_logits(
    way: str,
    ours: Sequence[Tensor],
    theirs: Sequence[tuple[list[int], Tensor]],
    examples: Sequence[Example],
    processor: Ovis2_5Processor,
) -> list[Gap]:
    """Gaps by kind of what was read; sequences are matched by their ids. Raises LooktwiceError for other ids."""
    config = processor.config
    visual = torch.tensor(config.visual_token_ids)
    differences: dict[TokenKind, list[tuple[float, float | None]]] = {kind: [] for kind in TOKEN_KINDS}
    known = {tuple(example.input_ids): place for place, example in enumerate(examples)}
    for ids, logits in theirs:
        if (place := known.get(tuple(ids))) is None:
            raise LooktwiceError(f"{way}: {len(ids)} ids that are not those of training; the templates differ")
        own = ours[place]
        largest = own.abs().max()
        by_logit = ((own - logits).abs().amax(-1) / largest).tolist()
        nexts = torch.tensor([*ids[1:], config.visual_token_ids[0]])
        by_id = [each.log_softmax(-1).gather(1, nexts[:, None])[:, 0] for each in (own, logits)]
        by_logprob = (by_id[0] - by_id[1]).abs().tolist()
        is_visual = torch.isin(nexts, visual).tolist()
        for kind, share, nats, skipped in zip(kinds_of(examples[place], config), by_logit, by_logprob, is_visual):
            differences[kind].append((share, None if skipped else nats))
    return [gap_of(way, kind, pairs) for kind, pairs in differences.items() if pairs]


def gap_of(way: str, kind: TokenKind, pairs: Sequence[tuple[float | None, float | None]]) -> Gap:
    """The gap of the differences of logits and logprobs at some places."""
    shares = [share for share, _ in pairs if share is not None]
    nats = [each for _, each in pairs if each is not None]
    return Gap(
        way=way,
        kind=kind,
        num_tokens=len(pairs),
        logits=_largest(shares) if shares else None,
        mean=sum(nats) / len(nats) if nats else None,
        worst=_largest(nats) if nats else None,
    )


def _largest(numbers: Sequence[float]) -> float:
    return float(torch.tensor(numbers).max())  # NaN, which Python's own would pass over


class Script:
    """A rollout of set turns of so many tokens with a crop after each, and the logprobs it was told."""

    def __init__(
        self, prompt: Example, crop: PatchedImage, processor: Ovis2_5Processor, *, turn_tokens: int = TURN_TOKENS
    ) -> None:
        self.turn_tokens = turn_tokens
        self.prompt, self.finished, self.crop, self.processor = prompt, prompt.copy(), crop, processor
        self.noted: list[float] = []
        self.turns = 0

    def hear(self, token: int, logprob: float) -> None: ...

    def respond(self, segment: Segment) -> Continuation | None:
        self.finished.append(segment.ids, is_trained=True)
        self.noted += segment.logprobs
        self.turns += 1
        if self.turns == NUM_TURNS:
            return None
        self.processor.append_image(self.finished, self.crop)
        return Continuation(
            ids=self.processor.image_ids(self.crop), images=[self.crop], max_new_tokens=self.turn_tokens
        )

    def fail(self, error: Exception) -> None:
        raise error


def played(engine: Engine, processor: Ovis2_5Processor) -> list[Script]:
    """What an engine samples after the questions of the probes, crops put in between."""
    crop = examples_of(processor)[-1].images[-1]
    scripts = [Script(prompt, crop, processor) for prompt in prompts_of(processor)]
    requests = [Request(prompt=one.prompt, drivers=[one], max_new_tokens=TURN_TOKENS) for one in scripts]
    engine.run(requests)
    return scripts


def gaps_of_scripts(way: str, learner: Learner, scripts: Sequence[Script]) -> list[Gap]:
    """Logprobs that an engine noted against those of the finished sequences in one pass, by what was read before."""
    differences: dict[TokenKind, list[tuple[None, float]]] = {kind: [] for kind in TOKEN_KINDS}
    for script in scripts:
        example = script.finished
        with torch.no_grad():
            logprobs = learner.score(pack([example])).logprobs.float().tolist()
        num_images = len(script.prompt.images)
        kinds = kinds_of(example, learner.processor.config, num_prompt_images=num_images)
        places = [place for place, is_trained in enumerate(example.loss_mask) if is_trained]
        for place, noted, scored in zip(places, script.noted, logprobs, strict=True):
            differences[kinds[place - 1]].append((None, abs(noted - scored)))
    return [gap_of(way, kind, pairs) for kind, pairs in differences.items() if pairs]


def served(addresses: Sequence[str], learner: Learner) -> Engine:
    """Servers that hold the weights of the model already. Raises ConfigError for one that cannot be used."""
    from looktwice.engine.vllm import VllmEngine  # needs the extra

    return VllmEngine(addresses, learner.processor.config)


def canaries(learner: Learner) -> dict[str, float]:
    """What R-GRPO looks at before its first update, in a rollout about the board. Raises TrainingError."""
    config = learner.config
    assert isinstance(config, GRPOConfig)
    rules = EpisodeRules(max_new_tokens=config.max_new_tokens)
    episodes = start_episodes(conversation_of(probes()[1][:1]), learner.processor, rules)
    Sampler(learner, config).play([episodes], config, [config.seed], None)
    return check_rollouts(learner, episodes, temperature=config.temperature)


def rows_of(gaps: Sequence[Gap], dtype: torch.dtype) -> Iterator[tuple[str, ...]]:
    """The gaps as cells of a table."""
    for gap in gaps:
        numbers = ("-" if number is None else f"{number:.1e}" for number in (gap.logits, gap.mean, gap.worst))
        yield (gap.way, gap.kind, str(gap.num_tokens), *numbers, "ok" if gap.is_kept(dtype) else "broken")
