"""The learner: model, optimizer and schedule; one update; checkpoints. Both stages call it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from peft import PeftModel
from torch import Tensor, nn

from looktwice.config import Config, ModelConfig, StageConfig
from looktwice.errors import CheckpointError, ConfigError, LooktwiceError
from looktwice.model.adapters import add_lora, base_of, freeze_vision, trained_parameters
from looktwice.model.modeling import Ovis2_5ForConditionalGeneration
from looktwice.model.weights import is_adapter, load_model, pick_device, save_model
from looktwice.processing.packing import PackedBatch, pack, split_by_tokens
from looktwice.processing.processor import Example, Ovis2_5Processor

FINAL_MODEL = "final_model"
STATE_FILE = "trainer_state.pt"


class Scores(NamedTuple):
    """Logprobs and entropies of the trained tokens of a row [N], float32."""

    logprobs: Tensor
    entropy: Tensor


Loss = Callable[[Scores, PackedBatch], Tensor]


class TrainingError(LooktwiceError):
    """Training cannot go on, such as a loss that is no number."""


@dataclass(frozen=True)
class Update:
    """Loss of one update (summed over its rows) and the gradient norm before clipping."""

    loss: float
    grad_norm: float


class Learner:
    """Trains one model under one stage's settings."""

    def __init__(self, model: nn.Module, processor: Ovis2_5Processor, config: StageConfig, *, total_steps: int) -> None:
        self.model = model
        self.processor = processor
        self.config = config
        self.total_steps = total_steps
        self.step = 0
        named = list(trained_parameters(model))
        self.parameters = [parameter for _, parameter in named]
        matrices = [parameter for parameter in self.parameters if parameter.ndim >= 2]
        others = [parameter for parameter in self.parameters if parameter.ndim < 2]
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}],
            lr=config.learning_rate,
        )

    @classmethod
    def load(
        cls, name: str, model_config: ModelConfig, config: StageConfig, processor: Ovis2_5Processor, *, total_steps: int
    ) -> Learner:
        """Load the model and make the parts trainable that the settings name; an adapter folder keeps its adapter."""
        torch.manual_seed(config.seed)
        # full fine-tuning keeps float32 weights and computes in bfloat16; under LoRA only the adapters are float32
        has_adapter = config.use_lora or is_adapter(name)
        dtype = torch.bfloat16 if config.bf16 and has_adapter else torch.float32
        device = pick_device(model_config.device)
        model = load_model(name, dtype=dtype, device=device, attn_implementation=model_config.attn_implementation)
        if isinstance(model, Ovis2_5ForConditionalGeneration):
            if config.use_lora:
                model = add_lora(model, r=config.lora_r, alpha=config.lora_alpha, dropout=config.lora_dropout)
            elif config.freeze_vision:
                freeze_vision(model)
        elif isinstance(model, PeftModel):
            check_adapter(model, config)
        if config.memory_efficient:
            base_of(model).gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            base_of(model).enable_input_require_grads()
        return cls(model, processor, config, total_steps=total_steps)

    @property
    def base(self) -> Ovis2_5ForConditionalGeneration:
        return base_of(self.model)

    def rows(self, examples: Sequence[Example]) -> list[PackedBatch]:
        """The examples in as many packed rows as the token limit asks for, in order."""
        limit = 1 if self.config.memory_efficient else self.config.max_tokens_per_row
        places = split_by_tokens([len(example) for example in examples], limit)
        return [pack([examples[place] for place in row]) for row in places]

    def precision(self) -> torch.autocast:
        """The precision of every forward, in training and in sampling alike."""
        return torch.autocast(self.base.device.type, torch.bfloat16, enabled=self.config.bf16)

    def score(self, batch: PackedBatch, *, temperature: float = 1.0) -> Scores:
        """Logprobs and entropy of the trained tokens of a row."""
        with self.precision():
            output = self.model(**batch.model_inputs(self.base.device), temperature=temperature)
        return Scores(output.logprobs, output.entropy)

    def update(self, rows: Sequence[PackedBatch], loss: Loss, *, temperature: float = 1.0) -> Update:
        """One optimizer step on the sum of the rows' losses. Raises TrainingError before it when that is no number."""
        torch.manual_seed(self.config.seed * 1_000_003 + self.step)
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for batch in rows:
            row_loss = loss(self.score(batch, temperature=temperature), batch)
            row_loss.backward()
            total += row_loss.item()
        norm = float(nn.utils.clip_grad_norm_(self.parameters, self.config.max_grad_norm or math.inf))
        if not (math.isfinite(total) and math.isfinite(norm)):
            raise TrainingError(
                f"step {self.step + 1}: loss {total}, gradient norm {norm}; lower --learning_rate or check the data"
            )
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        self.optimizer.step()
        return Update(loss=total, grad_norm=norm)

    def learning_rate(self) -> float:
        """The rate of the coming update: linear warm-up, then cosine to zero or constant."""
        warmup = math.ceil(self.config.warmup_ratio * self.total_steps)
        if self.step < warmup:
            return self.config.learning_rate * (self.step + 1) / warmup
        if self.config.lr_scheduler_type == "constant":
            return self.config.learning_rate
        share = (self.step - warmup) / max(1, self.total_steps - warmup)
        return self.config.learning_rate * 0.5 * (1 + math.cos(math.pi * share))

    def freeze_reference(self) -> Reference:
        """A copy of the trained weights as they are now, for the KL term."""
        return Reference(self.parameters)

    def save(self, folder: Path, resolved: Sequence[Config], *, with_optimizer: bool) -> None:
        """Write model, processor and resolved settings; with the optimizer's state, training can go on from there."""
        folder.mkdir(parents=True, exist_ok=True)
        save_model(self.model, folder)
        self.processor.save_pretrained(folder)
        settings = {type(config).__name__: config.model_dump(mode="json") for config in resolved}
        (folder / "train_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        if with_optimizer:
            torch.save({"step": self.step, "optimizer": self.optimizer.state_dict()}, folder / STATE_FILE)

    def resume(self, folder: Path) -> None:
        """Go on from a checkpoint: its trained weights, optimizer state and step.

        What was frozen before, such as the KL reference, stays as it is.
        """
        path = state_file(folder)
        saved = dict(load_model(str(folder)).named_parameters())
        missing = [name for name, _ in trained_parameters(self.model) if name not in saved]
        if missing:
            raise CheckpointError(f"{folder}: lacks {missing[0]}, which this run trains; resume with the same settings")
        with torch.no_grad():
            for name, parameter in trained_parameters(self.model):
                parameter.copy_(saved[name])
        state = torch.load(path, map_location="cpu", weights_only=True)
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]


def check_adapter(model: PeftModel, config: StageConfig) -> None:
    """Refuse LoRA settings that were given and that the loaded adapter does not have. Raises ConfigError."""
    for adapter in model.peft_config.values():
        for name, field in (("lora_r", "r"), ("lora_alpha", "lora_alpha")):
            given, has = getattr(config, name), getattr(adapter, field)
            if name in config.model_fields_set and given != has:
                raise ConfigError(f"{name} is {given}, the adapter to go on from has {has}; leave the setting out")


def state_file(folder: Path) -> Path:
    """The optimizer state in a checkpoint folder. Raises CheckpointError when there is none."""
    path = folder / STATE_FILE
    if not path.is_file():
        raise CheckpointError(f"{folder}: no {STATE_FILE}; resume from a checkpoint-N folder, not {FINAL_MODEL}")
    return path


class Reference:
    """Frozen values of the trained parameters; `active()` puts them in place for a while."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = parameters
        self.frozen = [parameter.detach().clone() for parameter in parameters]

    @contextmanager
    def active(self) -> Iterator[None]:
        live = [parameter.data for parameter in self.parameters]
        for parameter, value in zip(self.parameters, self.frozen):
            parameter.data = value
        try:
            yield
        finally:
            for parameter, value in zip(self.parameters, live):
                parameter.data = value
