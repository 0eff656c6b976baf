"""Class tokens: a few learned vectors through which the voxels of a feature map exchange what they know of a class."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nnunet_diffrefine.networks.attention import (
    attend,
    largest_divisor,
    require_positive,
    to_tokens,
    to_voxels,
    zero_linear,
)


class ClassTokens(nn.Module):
    """Read and write by cross-attention: h (B, channels, *S) -> h + W write(LN(h), tokens), W = 0 at first.

    Tokens c query the voxels, c' = c + read(c, LN(h)); then the voxels query the tokens. There is one token for each
    class and one for none of them, without which a single class would leave the voxels nothing to choose between.
    Time is linear in the number of voxels, so it suits a decoder as well as the bottleneck. No position embedding:
    a permutation of the voxels, mirroring among them, permutes the result alike.

    Source: DMCIE (https://arxiv.org/abs/2507.00983) compares itself with a "DDPM-based corrective decoder
    incorporating class tokens" that it calls CorrDiff; it says no more, and this module is one reading of it. The real
    CorrDiff (Li, Huang and Zheng, IEEE JBHI 28(3), 2024) is something else: by its abstract it corrects systematic
    errors by diffusion in the space of a VQ-VAE, with multi-fusion attention.

    Args:
        classes: foreground classes or regions.
        channels: channels of h.
        heads: wanted heads; the largest divisor of ``channels`` up to it is used (attribute ``heads``).

    Raises:
        ValueError: an argument is below 1.
    """

    def __init__(self, classes: int, channels: int, heads: int = 4) -> None:
        super().__init__()
        require_positive(classes=classes)
        self.heads = largest_divisor(channels, heads)
        self.tokens = nn.Parameter(torch.randn(classes + 1, channels))
        self.voxel_norm = nn.LayerNorm(channels)
        self.token_norm = nn.LayerNorm(channels)
        # without biases: one on the keys would shift all scores of a query alike, which softmax does not see
        self.read_query = nn.Linear(channels, channels, bias=False)
        self.read_key_value = nn.Linear(channels, 2 * channels, bias=False)
        self.read_out = nn.Linear(channels, channels)
        self.write_query = nn.Linear(channels, channels, bias=False)
        self.write_key_value = nn.Linear(channels, 2 * channels, bias=False)
        self.write_out = zero_linear(channels, channels)

    def forward(self, h: Tensor) -> Tensor:
        """Pass what ``h`` holds through the class tokens and add it."""
        voxels = self.voxel_norm(to_tokens(h))
        key, value = self.write_key_value(self.token_norm(self.read(voxels))).chunk(2, -1)
        return h + to_voxels(self.write_out(attend(self.write_query(voxels), key, value, self.heads)), h)

    def read(self, voxels: Tensor) -> Tensor:
        """Tokens (B, classes + 1, channels) that have read the normalised voxels (B, N, channels)."""
        query = self.read_query(self.tokens).expand(len(voxels), -1, -1)
        key, value = self.read_key_value(voxels).chunk(2, -1)
        return self.tokens + self.read_out(attend(query, key, value, self.heads))
