"""Learning rate and weight averaging of the denoiser."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

_Tensors = tuple[Tensor, ...] | list[Tensor]


class WarmupCosine:
    """Linear warm-up, then cosine to zero, in (fractional) epochs; stateless, so resuming needs only the epoch.

    Args:
        optimizer: whose groups get the learning rate.
        peak: learning rate after the warm-up.
        epochs: length of the training.
        warmup: share of the training spent warming up, in [0, 1].
    """

    def __init__(self, optimizer: torch.optim.Optimizer, peak: float, epochs: int, warmup: float) -> None:
        self.optimizer, self.peak, self.epochs, self.warmup = optimizer, peak, epochs, warmup

    def rate(self, epoch: float) -> float:
        """Learning rate at an epoch."""
        progress = min(max(epoch / self.epochs, 0.0), 1.0)
        if progress < self.warmup:
            return self.peak * max(progress / self.warmup, 1e-2)
        return self.peak * 0.5 * (1 + math.cos(math.pi * (progress - self.warmup) / max(1 - self.warmup, 1e-8)))

    def step(self, epoch: float) -> None:
        """Set the learning rate of ``epoch``; nnU-Net calls this once an epoch, the trainer once a step."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate(epoch)


def ema_model(module: nn.Module, decay: float) -> AveragedModel:
    """Exponential moving average of ``module``, with a decay that warms up as (1 + n) / (10 + n)."""

    def average(averaged: _Tensors, current: _Tensors, updates: Tensor | int) -> None:
        n = int(updates)
        weight = 1 - min(decay, (1 + n) / (10 + n))
        torch._foreach_lerp_(list(averaged), list(current), weight)

    return AveragedModel(module, multi_avg_fn=average)


@contextmanager
def swapped_weights(module: nn.Module, averaged: AveragedModel) -> Iterator[None]:
    """Give ``module`` the averaged weights inside the block and its own back afterwards."""
    own = {name: value.detach().clone() for name, value in module.state_dict().items()}
    module.load_state_dict(averaged.module.state_dict())
    try:
        yield
    finally:
        module.load_state_dict(own)
