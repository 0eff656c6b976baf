"""Timestep conditioning: sinusoidal embedding and feature-wise affine modulation.

Sources: sinusoid of Vaswani et al. 2017 (https://arxiv.org/abs/1706.03762) as Ho et al. 2020 use it for t
(https://arxiv.org/abs/2006.11239); modulation h (1 + scale) + shift of Perez et al. 2018
(https://arxiv.org/abs/1709.07871). Neither module has buffers, so distributed ranks never need to exchange any.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

MAX_PERIOD = 10_000.0


def sinusoid(t: Tensor, size: int) -> Tensor:
    """Sinusoidal embedding (B, size) of times t (B,); ``size`` must be even."""
    frequencies = torch.exp(-math.log(MAX_PERIOD) * torch.arange(size // 2, device=t.device) / (size // 2))
    angles = t.float()[:, None] * frequencies[None]
    return torch.cat((angles.cos(), angles.sin()), 1)


class TimeEmbedding(nn.Module):
    """Times (B,), integers 0..T -> embedding (B, size)."""

    def __init__(self, size: int = 128) -> None:
        super().__init__()
        self.size = size
        self.layers = nn.Sequential(nn.Linear(size, size), nn.SiLU(), nn.Linear(size, size), nn.SiLU())

    def forward(self, t: Tensor) -> Tensor:
        """Embed ``t``."""
        return self.layers(sinusoid(t, self.size))


class FiLM(nn.Module):
    """Features h (B, channels, *S) -> h (1 + scale) + shift; the identity at initialisation."""

    def __init__(self, embedding_size: int, channels: int) -> None:
        super().__init__()
        self.affine = nn.Linear(embedding_size, 2 * channels)
        nn.init.zeros_(self.affine.weight)
        nn.init.zeros_(self.affine.bias)

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        """Modulate ``h`` by ``embedding`` (B, embedding_size)."""
        scale, shift = self.affine(embedding).chunk(2, 1)
        shape = (*scale.shape, *([1] * (h.ndim - 2)))
        return torch.addcmul(shift.view(shape).to(h), h, (1 + scale).view(shape).to(h))
