"""Whether a method learns: its loss on a few tensors before and after some steps of a real, small network."""

from __future__ import annotations

import torch
from torch import nn

from nnunet_diffrefine.batch import RefineBatch
from nnunet_diffrefine.methods import AbstractRefineMethod
from tests.builders import generator, nnunet_loss


def mean_loss(method: AbstractRefineMethod, denoiser: nn.Module, batch: RefineBatch, draws: int = 4) -> float:
    """Mean over draws of times and noise that are the same at every call."""
    loss = nnunet_loss(method.foreground)
    with torch.no_grad():
        return sum(float(method.loss(denoiser, batch, loss, generator(1000 + i))) for i in range(draws)) / draws


def train(method: AbstractRefineMethod, denoiser: nn.Module, batch: RefineBatch, steps: int = 20) -> None:
    """Fit one batch."""
    optimiser = torch.optim.Adam([p for p in denoiser.parameters() if p.requires_grad], lr=1e-2)
    for step in range(steps):
        optimiser.zero_grad()
        method.loss(denoiser, batch, nnunet_loss(method.foreground), generator(step)).backward()
        optimiser.step()
