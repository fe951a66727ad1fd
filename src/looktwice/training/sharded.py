"""Processes that hold a share of the model each: FSDP2.

Every layer of both towers is gathered when it is used and let go afterwards. All else is one unit with the root and is
there from forward to the end of backward: weights of head and embeddings are read directly, those of visual head and
table as often as a row has chunks of visual tokens, which differs between processes.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from looktwice.geometry import Size
from looktwice.model.adapters import ADAPTER_TENSOR, base_of
from looktwice.model.configuration import Ovis2_5Config
from looktwice.model.modeling import Ovis2_5ForConditionalGeneration
from looktwice.model.placement import whole
from looktwice.processing.images import PatchedImage
from looktwice.processing.packing import PackedBatch, pack
from looktwice.processing.processor import Example
from looktwice.training.distributed import Replicated
from looktwice.training.moments import write_moments


class Sharded(Replicated):
    """One of several processes, each with a share of the weights, gradients and moments.

    All of them run the same modules for the same number of rows, or those that gather a layer would wait for ever. So
    rows without weight are added where a process has fewer, with a tiny picture where another has one. Gradients are
    summed row by row, while backward goes on.
    """

    kind = "each with a share of the model (fsdp)"
    can_repeat = False  # the others are in the middle of the same row
    has_root = is_whole = False

    def loads_on(self, device: str) -> str:
        return "cpu"  # no GPU needs to hold it whole

    def prepared(self, model: nn.Module, device: str) -> nn.Module:
        if isinstance(model, PeftModel):  # what is fresh; what was loaded is the same in all
            model = super().prepared(model, device)
        # nothing is changed in place
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
        self.config = cast(Ovis2_5Config, base_of(model).config)
        shard(base_of(model), device, self.size)
        return model

    @contextmanager
    def whole_model(self, model: nn.Module) -> Iterator[None]:
        if self.is_whole:
            yield
            return
        base = base_of(model)
        units = [module for module in base.modules() if isinstance(module, FSDPModule)]
        if not self.has_root:  # which is the module whose forward comes first
            with torch.no_grad():
                base(**idle_row(self.config, with_image=False).model_inputs(base.device))
            self.has_root = True
        self.watchdog.arrive()
        for unit in units:
            unit.reshard()  # what a forward without backward left whole may be older
            unit.unshard()
        set_kept(base, is_whole=True)
        self.is_whole = True
        try:
            yield
        finally:
            self.is_whole = False
            set_kept(base, is_whole=False)
            for unit in units:
                unit.reshard()

    def even(self, rows: Sequence[PackedBatch], step: int) -> Iterator[PackedBatch]:
        self.watchdog.arrive()
        everyone: list[Any] = [None] * self.size
        dist.all_gather_object(everyone, [row.pixel_values is not None for row in rows])
        num_rows = max(map(len, everyone))
        for number in range(num_rows):
            self.at(f"row {number + 1} of {num_rows}", step)
            has_image = any(each[number] for each in everyone if number < len(each))
            if number >= len(rows):
                yield idle_row(self.config, with_image=has_image)
            elif has_image and rows[number].pixel_values is None:
                yield side_by_side(rows[number], idle_row(self.config, with_image=True))
            else:
                yield rows[number]

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """They are summed already."""

    def weights(self, model: nn.Module) -> dict[str, Tensor] | None:
        wanted = ADAPTER_TENSOR.search if isinstance(model, PeftModel) else bool
        gathered = ((name, whole(tensor)) for name, tensor in model.state_dict().items() if wanted(name))
        # one at a time, and none stays where it is not written
        return {name: tensor.cpu() for name, tensor in gathered if self.is_main}

    def moments(self, optimizer: torch.optim.Optimizer, names: Sequence[str], draft: Path) -> dict[str, Any] | None:
        write_moments(optimizer, names, draft)
        return None


def shard(base: Ovis2_5ForConditionalGeneration, device: str, size: int) -> None:
    """Leave of each weight the share of this process. Parts of the vision side of which nothing is trained stay whole:
    pictures can be encoded outside a forward of the model."""
    mesh = init_device_mesh(torch.device(device).type, (size,))
    tokenizer, frozen = base.model.visual_tokenizer, set[nn.Parameter]()
    for part in (tokenizer.vit, tokenizer.head, base.model.vte):
        if not any(parameter.requires_grad for parameter in part.parameters()):
            frozen |= set(part.to(device).parameters())
    stacks = [[*base.model.language_model.layers]]
    if not frozen.intersection(tokenizer.vit.parameters()):
        stacks.append([*tokenizer.vit.encoder.layers])
    for layer in chain.from_iterable(stacks):
        fully_shard(layer, mesh=mesh)
    fully_shard(base, mesh=mesh, ignored_params=frozen)
    for stack in stacks:
        for earlier, later in pairwise([base, *stack]):
            # or the one would be gathered that ran before it, perhaps in a forward that other processes did not run
            later.set_modules_to_backward_prefetch([earlier])
    for module in base.modules():
        if isinstance(module, FSDPModule):
            # gradients are summed, not averaged; the loss has its divisor
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def set_kept(base: Ovis2_5ForConditionalGeneration, *, is_whole: bool) -> None:
    """Whether layers stay whole after they ran; the unit with the root does so always, until backward is over."""
    root = cast(FSDPModule, base)
    root.set_reshard_after_forward(not is_whole)
    root.set_reshard_after_forward(False, recurse=False)


def idle_row(config: Ovis2_5Config, *, with_image: bool) -> PackedBatch:
    """A row of which nothing is trained: one id, or a picture of one visual token."""
    if not with_image:
        return pack([Example(input_ids=[0], loss_mask=[False])])
    vision = config.vit_config
    side = vision.hidden_stride * vision.patch_size
    pixels = torch.zeros(vision.hidden_stride**2, vision.num_channels * vision.patch_size**2, dtype=torch.uint8)
    grid = (1, vision.hidden_stride, vision.hidden_stride)
    image = PatchedImage(pixel_values=pixels, grid_thw=grid, size=Size(side, side), num_tokens=1)
    ids = [config.indicator_token_ids[0], config.image_token_id, config.indicator_token_ids[1]]
    return pack([Example(input_ids=ids, loss_mask=[False] * 3, images=[image])])


def side_by_side(row: PackedBatch, other: PackedBatch) -> PackedBatch:
    """A row without pictures, and behind it another row with some, as one."""
    return replace(
        row,
        input_ids=torch.cat([row.input_ids, other.input_ids], dim=1),
        position_ids=torch.cat([row.position_ids, other.position_ids], dim=1),
        loss_mask=torch.cat([row.loss_mask, other.loss_mask], dim=1),
        cu_seqlens=torch.cat([row.cu_seqlens, row.cu_seqlens[-1] + other.cu_seqlens[1:]]),
        parents=None if row.parents is None else torch.cat([row.parents, row.parents.new_tensor([-1])]),
        pixel_values=other.pixel_values,
        image_grid_thw=other.image_grid_thw,
        image_index=other.image_index,
        num_shown=row.num_shown + other.num_shown,
    )
