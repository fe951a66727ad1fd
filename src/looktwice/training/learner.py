"""The learner: model, optimizer and schedule; one update; checkpoints. Both stages call it."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import Tensor, nn

from looktwice.config import LORA_KNOBS, VISION_PARTS, ModelConfig, Part, StageConfig, number_of_bytes
from looktwice.errors import CheckpointError, ConfigError, TrainingError
from looktwice.model.adapters import (
    add_lora,
    base_of,
    cast_by_autocast,
    check_same_adapter,
    freeze,
    part_of,
    trained_parameters,
)
from looktwice.model.attention import is_gpu, pick_attention, shares_prompts
from looktwice.model.exact import ExactMode, alike, check_exact, without_dropout
from looktwice.model.files import adapter_folder, weights_fingerprint
from looktwice.model.location import locate
from looktwice.model.modeling import Ovis2_5ForConditionalGeneration
from looktwice.model.numerics import numerics_of
from looktwice.model.offload import activations_on_host
from looktwice.model.placement import exchange
from looktwice.model.quantization import quantization_of
from looktwice.model.vision_cache import VisionCache, is_trained
from looktwice.model.weights import load_model, load_trained, write_model
from looktwice.processing.packing import PackedBatch, pack_rows, split_rows
from looktwice.processing.processor import Example, Ovis2_5Processor
from looktwice.training.distributed import World
from looktwice.training.folder import STATE_FILE
from looktwice.training.moments import placed_moments, read_moments
from looktwice.training.nonfinite import NonfiniteGuard, Origin
from looktwice.training.optimizers import BITSANDBYTES, make_optimizer
from looktwice.training.phases import Phases
from looktwice.training.randomness import random_state, restore_random_state
from looktwice.training.record import Record
from looktwice.training.rows import MOST, default_tokens_per_row, tokens_that_fit, what_helps
from looktwice.training.start import check_attention, check_start
from looktwice.training.watchdog import SAVING

KEPT_BYTES = 2 * 2**30
"""Of the vectors of a step's pictures: 130,000 visual tokens of the 9B model in float32."""


class Scores(NamedTuple):
    """Logprobs of the trained tokens of a row, or their sum, and their entropies if asked for: [N] or [1], [N]."""

    logprobs: Tensor
    entropy: Tensor | None


ROW_LIMITS = ("max_tokens_per_row", "max_sibling_tokens", "tokens_that_fit")
"""What a run finds out of the memory at hand, and keeps when it goes on: how long rows are decides bits."""
Loss = Callable[[Scores, PackedBatch], Tensor]


@dataclass(frozen=True)
class Update:
    """Loss of one update (summed over its rows), the gradient norm before clipping, and the rows that were split
    because memory ran out."""

    loss: float
    grad_norm: float
    num_splits: int


class Learner:
    """Trains one model under one stage's settings."""

    def __init__(
        self,
        model: nn.Module,
        processor: Ovis2_5Processor,
        config: StageConfig,
        *,
        total_steps: int,
        world: World | None = None,
    ) -> None:
        self.model = model
        self.processor = processor
        self.config = config
        self.total_steps = total_steps
        self.world = world or World()
        self.step = 0
        self.start: str | None = None
        self.is_exact = False
        self.guard = NonfiniteGuard(config.skip_nonfinite)
        self.num_overflows = 0
        self.phases = Phases(self.world)
        self.tokens_that_fit: int | None = None
        self.vision_cache: VisionCache | None = None
        if config.vision_cache is not None:
            most = number_of_bytes(config.vision_cache)
            self.vision_cache = VisionCache(self.base, max_bytes=most, folder=config.vision_cache_dir)
        self.parameters = [parameter for _, parameter in trained_parameters(model)]
        self.optimizer = make_optimizer(config.optim, parameter_groups(model, config), config.learning_rate)
        self.scaler = torch.amp.GradScaler(self.base.device.type, enabled=config.fp16)

    @classmethod
    def load(
        cls,
        name: str,
        model_config: ModelConfig,
        config: StageConfig,
        processor: Ovis2_5Processor,
        *,
        total_steps: int,
        is_exact: bool = False,
        world: World | None = None,
    ) -> Learner:
        """Load the model and make the parts trainable that the settings name; an adapter folder keeps its adapter.

        Raises ConfigError for settings that the start does not allow or that would do nothing.
        """
        torch.manual_seed(config.seed)
        world = world or World()
        device = world.device(model_config.device)
        adapter = adapter_folder(locate(name))
        has_adapter = config.use_lora or adapter is not None
        check_start(name, adapter, model_config, config)
        if is_exact and model_config.quantization != "none":
            raise ConfigError("exact mode does not hold over a quantised base; leave --quantization or --exact out")
        check_attention(model_config, device)
        # full fine-tuning keeps float32 weights and computes in bfloat16; under LoRA only the adapters are float32
        model = load_model(
            name,
            dtype=compute_dtype(config) if has_adapter else torch.float32,
            device=world.loads_on(device),
            attn_implementation=pick_attention(model_config.attn_implementation, device, is_bf16=config.bf16),
            quantization=model_config.quantization,
        )
        model = made_trainable(model, config, is_on_gpu=is_gpu(device))
        if is_gpu(device):
            torch.set_float32_matmul_precision("highest" if is_exact or config.deterministic else "high")  # TF32
        if is_exact:
            check_exact(model, is_bf16=config.bf16)
            if dropped := without_dropout(model):
                print(f"exact mode: the adapter goes on without its dropout of {dropped}")
        model = world.prepared(model, device)
        learner = cls(model, processor, config, total_steps=total_steps, world=world)
        learner.is_exact = is_exact
        learner.start = learner.base.weights_fingerprint if adapter is None else weights_fingerprint(name)
        return learner

    @property
    def base(self) -> Ovis2_5ForConditionalGeneration:
        return base_of(self.model)

    @property
    def names(self) -> list[str]:
        """The names of the trained parameters in the optimizer's order."""
        names = {id(parameter): name for name, parameter in trained_parameters(self.model)}
        return [names[id(parameter)] for group in self.optimizer.param_groups for parameter in group["params"]]

    @cached_property
    def max_tokens_per_row(self) -> int:
        """Tokens of one packed row at the most; a longer sample has a row of its own."""
        if self.config.memory_efficient:
            return 1
        with self.precision():
            is_fixed = self.config.deterministic
            return self.config.max_tokens_per_row or default_tokens_per_row(self.base, is_fixed=is_fixed)

    @cached_property
    def max_sibling_tokens(self) -> int:
        """Tokens of a row of siblings that share their prompt: as many as the memory allows, since each one helps."""
        if self.config.memory_efficient or self.config.max_tokens_per_row or self.config.deterministic:
            return self.max_tokens_per_row
        with self.precision():
            return min(MOST, tokens_that_fit(self.base))

    def rows(self, examples: Sequence[Example]) -> list[PackedBatch]:
        """The examples in as few packed rows as the token limit allows, the longest first; siblings share prompts."""
        implementation = self.base.model.language_model.config._attn_implementation
        sibling_tokens = None
        if shares_prompts(implementation) and not self.is_exact:
            sibling_tokens = self.max_sibling_tokens
        return pack_rows(examples, self.max_tokens_per_row, sibling_tokens=sibling_tokens)

    @contextmanager
    def precision(self) -> Iterator[None]:
        """The precision of every forward, in training and in sampling alike."""
        dtype = compute_dtype(self.config)
        with (
            torch.autocast(self.base.device.type, dtype, enabled=dtype != torch.float32),
            ExactMode() if self.is_exact else nullcontext(),
        ):
            yield

    def images_of_a_step(self) -> VisionCache | None:
        """What can keep the pictures of a step where vision is frozen; None where it is trained."""
        if self.vision_cache is not None:
            return self.vision_cache
        vision = self.base.model.visual_tokenizer, self.base.model.vte
        return None if is_trained(*vision) else VisionCache(self.base, max_bytes=KEPT_BYTES)

    @contextmanager
    def images_kept(self, images: VisionCache | None = None) -> Iterator[None]:
        """While it lasts no picture is encoded twice, in rollouts, updates and reference, where vision is frozen, and
        none that `images` keep already."""
        before = self.vision_cache
        self.vision_cache = images or self.images_of_a_step()
        try:
            yield
        finally:
            self.vision_cache = before

    def numerics(self) -> dict[str, str]:
        """What the last bits of the logprobs depend on, as things are now; see `numerics_of`."""
        with self.precision():
            return numerics_of(self.model, self.processor.policy, is_exact=self.is_exact)

    def score(self, batch: PackedBatch, **options: Any) -> Scores:
        """Logprobs of the trained tokens of a row; `options` are those of the model's forward: `temperature`,
        `with_entropy`, `entropy_gradient`, `summed`."""
        with self.precision():
            inputs = batch.model_inputs(self.base.device)
            if self.vision_cache and batch.pixel_values is not None and batch.image_grid_thw is not None:
                inputs |= self.vision_cache.inputs(batch.pixel_values, batch.image_grid_thw) | {"pixel_values": None}
            output = self.base(**inputs, **options)  # adapters are in its layers; under FSDP the root must be called
        return Scores(output.logprobs, output.entropy)

    def logprobs(self, rows: Sequence[PackedBatch], *, temperature: float) -> dict[int, Tensor]:
        """Logprobs of the trained tokens [N] of each example of the rows, by its id, without gradient or dropout.

        When memory runs out, this and all later steps of this process take rows half as long.
        """
        self.model.eval()
        found: dict[int, Tensor] = {}
        waiting = split_rows(rows, self.tokens_that_fit)[::-1]
        while waiting:
            row = waiting.pop()
            try:
                with torch.no_grad():
                    logprobs = self.score(row, temperature=temperature).logprobs
            except torch.OutOfMemoryError:
                if len(row.examples) == 1 or not self.world.can_repeat:
                    raise
                self.tokens_that_fit = row.num_tokens // 2
                waiting += split_rows([row], self.tokens_that_fit)[::-1]
                continue
            found |= zip(map(id, row.examples), logprobs.split([sum(example.loss_mask) for example in row.examples]))
        return found

    def update(self, rows: Sequence[PackedBatch], loss: Loss, **options: Any) -> Update:
        """One optimizer step on the sum of the losses of all rows of all processes; `rows` are those of this one, and
        `options` those of `score`.

        When that sum is no number there is no step, and where `skip_nonfinite` does not allow that, TrainingError is
        raised.
        """
        world = self.world
        self.model.train()
        present, losses = self.split_until_it_fits(rows, lambda row: loss(self.score(row, **options), row))
        world.at("gradients", self.step + 1)
        world.sum_gradients(self.parameters)
        self.scaler.unscale_(self.optimizer)
        norm = world.clip(self.parameters, self.config.max_grad_norm)
        total, num_splits = world.sum(sum(losses), len(present) - len(rows))
        update = Update(loss=total, grad_norm=norm, num_splits=int(num_splits))
        # under fp16 a gradient may overflow: the scaler leaves the update out and takes a smaller scale
        checked = 0.0 if self.config.fp16 else norm
        self.num_overflows += self.config.fp16 and not math.isfinite(norm)
        origins = [Origin(row.where, world.rank if world.size > 1 else None) for row in present]
        if not math.isfinite(total + checked):  # and the rows that it comes from may be another process's
            found = world.gather([*zip(losses, origins)])
            losses, origins = [loss for loss, _ in found], [origin for _, origin in found]
        if not self.guard.skips(self.step + 1, losses, checked, origins):
            for group in self.optimizer.param_groups:
                group["lr"] = self.schedule() * group["peak_lr"]
            self.scaler.step(self.optimizer)
        self.scaler.update()
        return update

    def split_until_it_fits(
        self, rows: Sequence[PackedBatch], loss: Callable[[PackedBatch], Tensor]
    ) -> tuple[list[PackedBatch], list[float]]:
        """The rows as they were taken and the loss of each, their gradients being left in the parameters.

        When memory runs out, this and all later steps of this process take rows half as long, and the others wait where
        gradients are summed. Raises TrainingError when it runs out again, or where rows cannot be repeated.
        """
        present = split_rows(rows, self.tokens_that_fit)
        losses = self.gradients(present, loss)
        longest = max((row.num_tokens for row in present), default=0)
        if losses is None and self.world.can_repeat:
            self.tokens_that_fit = longest // 2
            present = split_rows(present, self.tokens_that_fit)
            losses = self.gradients(present, loss)
        if losses is None:
            shorter = max((row.num_tokens for row in present), default=0)
            again = f", and again with rows of {shorter:,}" if self.world.can_repeat else ""
            raise TrainingError(
                f"step {self.step + 1}: out of memory with rows of {longest:,} tokens{again}; "
                f"{what_helps(self.base, self.config, longest)}"
            )
        return present, losses

    def gradients(self, rows: Sequence[PackedBatch], loss: Callable[[PackedBatch], Tensor]) -> list[float] | None:
        """The loss of each row, with the gradients of their sum in the parameters; None when memory ran out, and no
        gradients."""
        world = self.world
        torch.manual_seed((self.config.seed * 1_000_003 + self.step) * world.size + world.rank)
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(torch.zeros((), device=self.base.device))  # or without a row it would not be ready
        losses: list[Tensor] = []
        try:
            for row in world.even(rows, self.step + 1):
                with activations_on_host(self.model) if self.config.offload_activations else nullcontext():
                    row_loss = loss(row)
                self.scaler.scale(row_loss).backward()
                losses.append(row_loss.detach())
        except torch.OutOfMemoryError:
            self.optimizer.zero_grad(set_to_none=True)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            return None
        # read once for all rows, which is what waits for a GPU
        return torch.stack(losses).tolist() if losses else []

    def schedule(self) -> float:
        """Share of the peak learning rates at the coming update: linear warm-up, then cosine to zero or constant."""
        warmup = math.ceil(self.config.warmup_ratio * self.total_steps)
        if self.step < warmup:
            return (self.step + 1) / warmup
        if self.config.lr_scheduler_type == "constant":
            return 1.0
        share = (self.step - warmup) / max(1, self.total_steps - warmup)
        return 0.5 * (1 + math.cos(math.pi * share))

    def freeze_reference(self) -> Reference:
        """A copy of the trained weights as they are now, for the KL term."""
        return Reference(self.parameters)

    def save(self, folder: Path, record: Record, *, with_optimizer: bool, card: str | None = None) -> None:
        """Write model, processor and the run's record, and a model card if there is one; with the optimizer's state,
        training can go on from there.

        Raises CheckpointError when the folder cannot be written.
        """
        world = self.world
        world.at(SAVING, self.step)
        weights = world.weights(self.model)
        with world.written_whole(folder) as draft:
            moments = world.moments(self.optimizer, self.names, draft) if with_optimizer else None
            if not world.is_main:
                return
            write_model(self.model, draft, weights=weights)
            self.processor.save_pretrained(draft)
            if with_optimizer:
                state = {
                    "step": self.step,
                    "optimizer": moments,
                    "trained": self.trained(),
                    "random": random_state(),
                    "skipped": (self.guard.in_a_row, self.guard.num_skipped),
                    "scaler": self.scaler.state_dict(),
                    "overflows": self.num_overflows,
                    "rows": {name: vars(self).get(name) for name in ROW_LIMITS},
                }
                try:
                    with (draft / STATE_FILE).open("wb") as file:
                        torch.save(state, file)
                except RuntimeError as error:  # what torch makes of a full disk
                    raise error.__context__ if isinstance(error.__context__, OSError) else OSError(error) from error
            if card is not None:
                (draft / "README.md").write_text(card, encoding="utf-8")
            record.write(draft, step=self.step)

    def trained(self) -> dict[str, Any]:
        """What a checkpoint must have in common with the run that goes on from it: the weights it started from,
        settings, then shapes by name."""
        facts: dict[str, Any] = {"start": self.start, "use_lora": isinstance(self.model, PeftModel)}
        if isinstance(self.model, PeftModel):
            adapter: Any = self.model.peft_config[self.model.active_adapter]
            facts |= {"lora_r": adapter.r, "lora_alpha": adapter.lora_alpha, "use_rslora": adapter.use_rslora}
        facts["quantization"] = quantization_of(self.base)
        facts["optim"] = self.config.optim if self.config.optim in BITSANDBYTES else "adamw"
        return facts | {name: list(parameter.shape) for name, parameter in trained_parameters(self.model)}

    def resume(self, folder: Path) -> None:
        """Go on from a checkpoint: its trained weights, optimizer state and step, under the present learning rates and
        weight decay.

        What was frozen before, such as the KL reference, stays as it is. Raises CheckpointError, before anything is
        changed, when the checkpoint is broken or this run trains something else.
        """
        path = folder / STATE_FILE
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            step, moments, saved = (state[name] for name in ("step", "optimizer", "trained"))
            random, skipped, scaler, limits = (state[name] for name in ("random", "skipped", "scaler", "rows"))
        except (OSError, EOFError, KeyError, RuntimeError, pickle.UnpicklingError) as error:
            raise CheckpointError(f"{path}: no usable state; resume from another checkpoint ({error})") from error
        if saved.get("start") != self.start:
            raise CheckpointError(
                f"{folder}: its run started from another model; name that one to go on, or give another run folder"
            )
        if difference := first_difference(saved, self.trained()):
            other = f"or start another run from its weights: --model_name {folder}"
            raise CheckpointError(f"{folder}: {difference}; resume with the same settings, {other}")
        if moments is None:
            moments = read_moments(folder, self.optimizer, self.names)
        load_trained(self.model, folder)
        present = [{name: group[name] for name in ("peak_lr", "weight_decay")} for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(placed_moments(moments, self.optimizer))
        for group, settings in zip(self.optimizer.param_groups, present):
            group |= settings
        self.step = step
        self.guard.in_a_row, self.guard.num_skipped = skipped
        self.num_overflows = state.get("overflows", 0)
        is_given = self.config.max_tokens_per_row is not None or self.config.memory_efficient
        kept = ROW_LIMITS[-1:] if is_given else ROW_LIMITS
        vars(self).update({name: limits[name] for name in kept if limits.get(name) is not None})
        if scaler:  # of a run in fp16
            self.scaler.load_state_dict(scaler)
        restore_random_state(random)


def made_trainable(model: nn.Module, config: StageConfig, *, is_on_gpu: bool) -> nn.Module:
    """A loaded model under the settings: with adapters, frozen parts, precisions and recomputed layers; one that comes
    with an adapter keeps it."""
    if isinstance(model, PeftModel):
        check_same_adapter(model, **lora_settings(config, only_given=True))
    elif config.use_lora:
        model = add_lora(base_of(model), **lora_settings(config))
    freeze(model, config.frozen_parts)
    if compute_dtype(config) != torch.float32:
        cast_by_autocast(model)
    if not isinstance(model, PeftModel):
        halve_frozen(model, compute_dtype(config))
    towers = "all" if config.memory_efficient else config.gradient_checkpointing
    if towers == "auto":
        towers = "all" if is_on_gpu else "none"
    recompute_layers(base_of(model), towers)
    if config.torch_compile:
        compile_layers(base_of(model))
    return model


def parameter_groups(model: nn.Module, config: StageConfig) -> list[dict[str, Any]]:
    """The optimizer's groups: trained parameters by part, matrices apart from the rest, which has no weight decay.

    Raises ConfigError for a learning rate of a part that is not trained.
    """
    groups: dict[tuple[Part, bool], list[nn.Parameter]] = {}
    for name, parameter in trained_parameters(model):
        groups.setdefault((part_of(name), parameter.ndim >= 2), []).append(parameter)
    rates = config.part_learning_rates
    for part in rates:
        if part not in {trained for trained, _ in groups}:
            raise ConfigError(f"part_learning_rates: {part} is not trained; leave it out, or train it")
    return [
        {
            "params": parameters,
            "part": part,
            "peak_lr": rates.get(part, config.learning_rate),
            "weight_decay": config.weight_decay if is_matrix else 0.0,
        }
        for (part, is_matrix), parameters in groups.items()
    ]


def towers_of(model: Ovis2_5ForConditionalGeneration) -> dict[str, Any]:
    """The two stacks of layers, by the names that settings have for them."""
    return {"llm": model.model.language_model, "vit": model.model.visual_tokenizer.vit}


def recompute_layers(model: Ovis2_5ForConditionalGeneration, towers: str) -> None:
    """Keep only the inputs of each layer of `llm`, `vit` or `all`, and recompute the rest in backward."""
    for name, tower in towers_of(model).items():
        if towers in (name, "all"):
            # transformers renamed it in 5.23; the older name warns from then on
            enable = getattr(tower, "activation_checkpointing_enable", None) or tower.gradient_checkpointing_enable
            enable({"use_reentrant": False, "context_fn": alike})


def compute_dtype(config: StageConfig) -> torch.dtype:
    """What layers compute in; sums, softmax and losses are float32 whatever it is."""
    return torch.bfloat16 if config.bf16 else torch.float16 if config.fp16 else torch.float32


def halve_frozen(model: nn.Module, dtype: torch.dtype) -> None:
    """Frozen parts of the vision side in the compute dtype, where that holds all weights of a part exactly, as it does
    those of released checkpoints in bfloat16; a CPU does not take a part in two dtypes."""
    parts: dict[Part, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        parts.setdefault(part_of(name), []).append(parameter)
    for part in VISION_PARTS:
        weights = parts[part]
        is_frozen = not any(weight.requires_grad for weight in weights)
        if is_frozen and all(torch.equal(weight.to(dtype).to(weight.dtype), weight) for weight in weights):
            for weight in weights:
                weight.data = weight.data.to(dtype)


def compile_layers(model: Ovis2_5ForConditionalGeneration) -> None:
    """Compile each layer of the language model, in place: names of weights stay. Attention over the sequences of a row
    is left out, or every other row would be compiled anew."""
    for layer in model.model.language_model.layers:
        layer.compile(dynamic=True)


def first_difference(saved: dict[str, Any], present: dict[str, Any]) -> str | None:
    """What a checkpoint has otherwise than the run that is to go on from it, if anything: a fact, else the parts that
    are trained in one of them alone, else a weight."""
    names = [name for name in present | saved if saved.get(name) != present.get(name)]
    weights = [[name for name, fact in facts.items() if isinstance(fact, list)] for facts in (saved, present)]
    was, now = ({part_of(name) for name in there} for there in weights)
    if was != now and {*names} <= {*weights[0], *weights[1]}:
        told = [*(f"{part} was trained and is frozen" for part in sorted(was - now))]
        told += [f"{part} was frozen and is trained" for part in sorted(now - was)]
        return ", ".join(told)
    if not names:
        return None
    before, here = ("not trained" if facts.get(names[0]) is None else facts[names[0]] for facts in (saved, present))
    return f"{names[0]} was {before} and is {here}"


def lora_settings(config: StageConfig, *, only_given: bool = False) -> dict[str, Any]:
    """The arguments of `add_lora`: all, or those that were set and not left at their defaults."""
    return {
        argument: getattr(config, name)
        for argument, name in LORA_KNOBS.items()
        if not only_given or name in config.model_fields_set
    }


class Reference:
    """Frozen values of the trained parameters; `active()` puts them in place for a while. Where those are in shares,
    so are these."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = parameters
        self.frozen = [parameter.detach().clone() for parameter in parameters]

    @contextmanager
    def active(self) -> Iterator[None]:
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def _exchange(self) -> None:
        pairs = zip(self.parameters, self.frozen, strict=True)
        self.frozen = [exchange(parameter, value) for parameter, value in pairs]
