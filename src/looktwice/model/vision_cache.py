"""Features of pictures that frozen weights give, kept for later epochs so that these need not compute them again.

Legend: P patches of all pictures, I pictures, A visual tokens, F features of a token, D language-model width.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from looktwice.drafts import UNFINISHED
from looktwice.errors import CheckpointError, ConfigError, one_line
from looktwice.model.exact import is_exact
from looktwice.model.modeling import Ovis2_5ForConditionalGeneration
from looktwice.model.precision import autocast_dtype

Kind = Literal["tower_features", "image_features"]
DIGEST_BYTES = 16
BLOCK = 1024
"""Numbers at the beginning, in the middle and at the end of a tensor that its fingerprint looks at."""


class VisionCache:
    """What the frozen parts make of pictures, up to the first part that is trained: features of the tower [A, F], or of
    tower, head and table vectors [A, D]. By content, in host memory or in a folder, up to `max_bytes`.

    When it is full nothing more is kept: an epoch comes to all pictures, so forgetting one for another gains nothing.
    """

    def __init__(self, model: Ovis2_5ForConditionalGeneration, *, max_bytes: int, folder: Path | None = None) -> None:
        """Raises ConfigError when the tower is trained, and CheckpointError when the folder cannot be written."""
        tokenizer, table = model.model.visual_tokenizer, model.model.vte
        if is_trained(tokenizer.vit):
            raise ConfigError("vision_cache: the vision tower is trained; freeze it (--freeze vit) or leave it out")
        self.model = model
        self.kind: Kind = "tower_features" if is_trained(tokenizer.head, table) else "image_features"
        self.max_bytes = max_bytes
        self.num_bytes = self.num_encoded = 0
        self.asked = self.missed = 0
        self.known: dict[bytes, Tensor | Path] = {}
        self.folder = folder
        if folder is not None:
            self._open(folder)

    def inputs(self, pixel_values: Tensor, image_grid_thw: Tensor) -> dict[str, Tensor]:
        """What the model takes in place of these pictures [P, C * p * p], [I, 3], which are on the host.

        Computed in the precision of the caller, and anew where a file of the folder is broken.
        """
        grids = image_grid_thw.tolist()
        images = pixel_values.split([t * h * w for t, h, w in grids])
        keys = [self._key(image, grid) for image, grid in zip(images, grids)]
        found = {key: features for key in set(keys) if (features := self._read(key)) is not None}
        missing = {key: number for number, key in enumerate(keys) if key not in found}
        self.asked += len(set(keys))
        self.missed += len(missing)
        new = self._encode([images[n] for n in missing.values()], [grids[n] for n in missing.values()])
        for key, features in zip(missing, new):
            self._keep(key, features)
            found[key] = features
        device = self.model.device
        return {self.kind: torch.cat([found[key].to(device, non_blocking=True) for key in keys])}

    def take_metrics(self) -> dict[str, float]:
        """How much it holds, and which share it had of the distinct pictures it was asked for since the last time."""
        metrics = {"memory/vision_cache_gb": self.num_bytes / 1e9}
        if self.asked:
            metrics["perf/vision_cache_hits"] = 1 - self.missed / self.asked
        self.asked = self.missed = 0
        return metrics

    @torch.no_grad()
    def _encode(self, images: list[Tensor], grids: list[list[int]]) -> list[Tensor]:
        if not images:
            return []
        self.num_encoded += len(images)
        pixels = torch.cat(images).to(self.model.device, non_blocking=True)
        places = torch.tensor(grids)
        inner = self.model.model
        encode = inner.visual_tokenizer.vit if self.kind == "tower_features" else inner.get_image_features
        return list(encode(pixels, places).split(inner.num_visual_tokens(places)))

    def _key(self, pixels: Tensor, grid: list[int]) -> bytes:
        """Of the picture as the tower sees it, after resizing, and of how its features are computed: the precision, and
        whether sums have the order of exact mode."""
        dtype = autocast_dtype(self.model.device, self.model.dtype)
        how = f"{grid} {dtype}" + " exact" * is_exact()
        digest = blake2b(pixels.contiguous().numpy().data, digest_size=DIGEST_BYTES, key=how.encode())
        return digest.digest()

    def _keep(self, key: bytes, features: Tensor) -> None:
        if self.num_bytes + features.nbytes > self.max_bytes:
            return
        self.num_bytes += features.nbytes
        # a copy, or the memory of all pictures of a row would be kept for one
        kept = features.detach().to("cpu", copy=True)
        if self.folder is None:
            self.known[key] = kept.pin_memory() if features.is_cuda else kept
            return
        path = self.folder / f"{key.hex()}.safetensors"
        draft = path.with_name(f"{path.name}{UNFINISHED}-{os.getpid()}")
        try:
            save_file({"features": kept}, draft)
            draft.replace(path)
        except (OSError, SafetensorError) as error:
            draft.unlink(missing_ok=True)
            self.max_bytes = 0
            print(f"{path}: cannot be written ({one_line(str(error))}); the vision cache keeps nothing more")
            return
        self.known[key] = path

    def _read(self, key: bytes) -> Tensor | None:
        """Features that are kept, on the host; None where there are none, or none that can be read."""
        kept = self.known.get(key)
        if not isinstance(kept, Path):
            return kept
        try:
            return load_file(kept)["features"]
        except (OSError, KeyError, SafetensorError) as error:
            print(f"{kept}: a broken file of the vision cache ({one_line(str(error))}); it is computed anew")
            del self.known[key]
            return None

    def _open(self, folder: Path) -> None:
        """Find what earlier runs left for the same weights; that of others is in folders of its own."""
        self.folder = folder / self._fingerprint()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"{folder}: the vision cache cannot be written ({error})") from error
        for path in self.folder.glob(f"{'[0-9a-f]' * 2 * DIGEST_BYTES}.safetensors"):
            self.known[bytes.fromhex(path.stem)] = path
            self.num_bytes += path.stat().st_size

    def _fingerprint(self) -> str:
        """Of the weights that the features come from, and of how they attend."""
        inner = self.model.model
        modules: list[nn.Module] = [inner.visual_tokenizer.vit]
        if self.kind == "image_features":
            modules += [inner.visual_tokenizer.head, inner.vte]
        digest = blake2b(
            f"{self.kind} {inner.visual_tokenizer.vit.config._attn_implementation}".encode(), digest_size=8
        )
        for module in modules:
            for name, weight in module.named_parameters():
                digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
                numbers, middle = weight.detach().flatten(), max(0, weight.numel() - BLOCK) // 2
                for start in (0, middle, 2 * middle):
                    digest.update(numbers[start : start + BLOCK].float().cpu().numpy().data)
        return digest.hexdigest()


def encoder(model: Ovis2_5ForConditionalGeneration, cache: VisionCache | None) -> Callable[[Tensor, Tensor], Tensor]:
    """What makes vectors [A, D] of pictures [P, C * p * p], [I, 3] on the host: the cache where it keeps them, else the
    model."""
    if cache is None or cache.kind != "image_features":
        return model.get_image_features
    return lambda pixel_values, image_grid_thw: cache.inputs(pixel_values, image_grid_thw)["image_features"]


def is_trained(*modules: nn.Module) -> bool:
    """Whether any weight of these is trained."""
    return any(weight.requires_grad for module in modules for weight in module.parameters())
