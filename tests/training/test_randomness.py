"""Random numbers go on where a checkpoint left them."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import torch

from looktwice.training.randomness import random_state, restore_random_state


def test_all_generators_go_on_from_a_state_on_disk(tmp_path: Path) -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.normal()), float(torch.rand(()))

    draw()
    torch.save(random_state(), tmp_path / "state")
    expected = draw()
    assert draw() != expected
    restore_random_state(torch.load(tmp_path / "state", weights_only=True))
    assert draw() == expected
