"""The learner: model, optimizer and schedule, and one update. Both stages call it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from looktwice.config import ModelConfig, StageConfig, number_of_bytes
from looktwice.errors import ConfigError, TrainingError
from looktwice.model.adapters import base_of, trained_parameters
from looktwice.model.attention import is_gpu, pick_attention, shares_prompts
from looktwice.model.exact import ExactMode, check_exact, without_dropout
from looktwice.model.files import adapter_folder, weights_fingerprint
from looktwice.model.location import locate
from looktwice.model.modeling import Ovis2_5ForConditionalGeneration
from looktwice.model.numerics import numerics_of
from looktwice.model.offload import activations_on_host
from looktwice.model.placement import exchange
from looktwice.model.vision_cache import VisionCache, is_trained
from looktwice.model.weights import load_model
from looktwice.processing.packing import PackedBatch, pack_rows, split_rows
from looktwice.processing.processor import Example, Ovis2_5Processor
from looktwice.training.distributed import World
from looktwice.training.nonfinite import NonfiniteGuard, Origin
from looktwice.training.optimizers import make_optimizer
from looktwice.training.phases import Phases
from looktwice.training.rows import MOST, default_tokens_per_row, tokens_that_fit, what_helps
from looktwice.training.start import check_attention, check_start
from looktwice.training.trainable import compute_dtype, made_trainable, parameter_groups

KEPT_BYTES = 2 * 2**30
"""Of the vectors of a step's pictures: 130,000 visual tokens of the 9B model in float32."""


class Scores(NamedTuple):
    """Logprobs of the trained tokens of a row, or their sum, and their entropies if asked for: [N] or [1], [N]."""

    logprobs: Tensor
    entropy: Tensor | None


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
        self.has_learnt = False  # whether an update with a gradient was taken; where all advantages are 0 there is none
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
        if self.config.vision_cache is not None:
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
            self.has_learnt |= math.isfinite(norm) and norm > 0
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
