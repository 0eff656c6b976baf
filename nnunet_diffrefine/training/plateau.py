"""A learning rate that halves when the validation error stops falling (ReCoSeg++, section 4.2)."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau

FACTOR = 0.5


class HalvedOnPlateau:
    """torch's ``ReduceLROnPlateau`` behind nnU-Net's scheduler interface, which is called with the epoch.

    Args:
        optimizer: whose groups get the learning rate.
        minimum: the rate is not halved below it.
        patience: epochs without improvement that are tolerated.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, minimum: float, patience: int) -> None:
        self.plateau = ReduceLROnPlateau(optimizer, factor=FACTOR, patience=patience, min_lr=minimum)

    def step(self, epoch: int) -> None:
        """Nothing: the rate follows the error, not the epoch."""

    def observe(self, error: float) -> None:
        """Take note of an epoch's validation error."""
        self.plateau.step(error)

    def state_dict(self) -> dict[str, Any]:
        """What resuming needs."""
        return self.plateau.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume."""
        self.plateau.load_state_dict(state)
