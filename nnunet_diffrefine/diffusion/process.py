"""The contract of a forward process and its reversal.

A process joins a clean variable x_0 (t = 0) to a known end at t = T: pure noise (Gaussian) or the prior (bridge).
Times are integers 0..T, one per batch element; every draw takes a ``torch.Generator``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor


class Process(ABC):
    """Forward process q(x_t | x_0, prior) and its reverse step p(x_s | x_t, predicted x_0)."""

    timesteps: int
    signed: ClassVar[bool] = False
    """Whether the process' variable lies in [-1, 1] instead of [0, 1]."""

    @abstractmethod
    def start(self, prior: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draw x_T, shape of ``prior`` (B, R, *S)."""

    @abstractmethod
    def marginal(self, x0: Tensor, prior: Tensor, t: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draw x_t ~ q(x_t | x_0, prior); ``t`` (B,) integers in 0..T, ``x0`` and ``prior`` (B, R, *S)."""

    @abstractmethod
    def reverse(
        self,
        x_t: Tensor,
        x0: Tensor,
        prior: Tensor,
        t: Tensor,
        s: Tensor,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw x_s for s < t, given x_t and the predicted ``x0``; at s = 0 it returns ``x0``."""


def at_times(table: Tensor, t: Tensor) -> Tensor:
    """Values (B,) of a float64 table (T + 1,) at times (B,), on their device; float32 on MPS, where that is all."""
    return (table.float() if t.device.type == "mps" else table).to(t.device)[t]


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """Reshape (B,) to (B, 1, ..., 1) so that it broadcasts over ``like`` (B, R, *S), in its dtype and device."""
    return values.to(like.device, like.dtype).view(-1, *([1] * (like.ndim - 1)))
