"""Attention for a denoiser's features: over channels (squeeze and excitation) and over voxels.

Both modules are the identity at initialisation, so a network that starts from trained weights still gives those
weights' output; neither has buffers. Meant for the bottleneck, where voxels are few.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_POOLING: dict[int, Callable[..., Tensor]] = {
    1: F.adaptive_avg_pool1d,
    2: F.adaptive_avg_pool2d,
    3: F.adaptive_avg_pool3d,
}


class ChannelAttention(nn.Module):
    """Multi-scale squeeze and excitation: h (B, channels, *S) -> h times one gate in (0, 2) for each channel.

    gate = 2 sigmoid(W₂ SiLU(W₁ d)), d = (dₛ for s in scales), dₛ = largest mean of h over the cells of a grid of s
    cells an axis. Scale 1 is the global mean; finer scales keep a small target from being averaged away. W₂ starts
    at zero, hence every gate at exactly 1. Unchanged by mirroring, equivariant to it.

    Sources: CMDiff (https://doi.org/10.1038/s41598-025-25137-7) names a multi-scale channel attention of "global
    pooling and fully connected layers" at the bottleneck and no more; grid, maximum and the range of the gate are
    choices made here. Squeeze and excitation: Hu et al. 2018 (https://arxiv.org/abs/1709.01507).

    Args:
        channels: channels of h.
        reduction: W₁ leaves ``channels // reduction`` features, at least 1.
        scales: cells an axis; an axis shorter than a scale gets one cell a voxel.

    Raises:
        ValueError: an argument is below 1, or there is no scale.
    """

    def __init__(self, channels: int, reduction: int = 4, scales: Sequence[int] = (1, 2, 4)) -> None:
        super().__init__()
        require_positive(channels=channels, reduction=reduction)
        if not scales or min(scales) < 1:
            raise ValueError(f"scales={tuple(scales)}: name at least one number of cells an axis, each 1 or more.")
        self.scales = tuple(scales)
        hidden = max(channels // reduction, 1)
        # SiLU, not the original's ReLU, which with few hidden units can leave all of them without gradient
        self.layers = nn.Sequential(
            nn.Linear(channels * len(self.scales), hidden), nn.SiLU(), zero_linear(hidden, channels)
        )

    def forward(self, h: Tensor) -> Tensor:
        """Gate ``h``, which has 1 to 3 spatial axes."""
        return h * self.gate(h).view(*h.shape[:2], *([1] * (h.ndim - 2))).to(h)

    def gate(self, h: Tensor) -> Tensor:
        """Gates (B, channels) in (0, 2) of features (B, channels, *S)."""
        rank = h.ndim - 2
        if rank not in _POOLING:
            raise ValueError(f"h has shape {tuple(h.shape)}; ChannelAttention takes (B, channels, *S) of 1 to 3 axes.")
        cells = [[min(scale, side) for side in h.shape[2:]] for scale in self.scales]
        descriptors = [_POOLING[rank](h.float(), grid).flatten(2).amax(2) for grid in cells]
        return 2 * torch.sigmoid(self.layers(torch.cat(descriptors, 1)))


class SelfAttention(nn.Module):
    """Pre-norm multi-head self-attention over voxels: h (B, channels, *S) -> h + W attention(LN(h)), W = 0 at first.

    Vaswani et al. 2017 (https://arxiv.org/abs/1706.03762), at the bottleneck as in Ho et al. 2020
    (https://arxiv.org/abs/2006.11239); ReCoSeg++ names "self-attention layers" and gives no detail. There is no
    position embedding, so any permutation of the voxels, mirroring among them, permutes the result alike. LN acts
    on the channels of one voxel. Time grows with the square of the number of voxels.

    Args:
        channels: channels of h.
        heads: wanted heads; the largest divisor of ``channels`` up to it is used (attribute ``heads``).

    Raises:
        ValueError: an argument is below 1.
    """

    def __init__(self, channels: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = largest_divisor(channels, heads)
        self.norm = nn.LayerNorm(channels)
        # without bias: one on the keys shifts all scores of a query alike, which softmax does not see
        self.query_key_value = nn.Linear(channels, 3 * channels, bias=False)
        self.out = zero_linear(channels, channels)

    def forward(self, h: Tensor) -> Tensor:
        """Let every voxel of ``h`` attend to all of them."""
        query, key, value = self.query_key_value(self.norm(to_tokens(h))).chunk(3, -1)
        return h + to_voxels(self.out(attend(query, key, value, self.heads)), h)


def attend(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    """Scaled dot-product attention in ``heads`` heads: query (B, N, C), key and value (B, M, C) -> (B, N, C)."""
    split = [x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key, value)]
    return F.scaled_dot_product_attention(*split).transpose(1, 2).flatten(2)


def to_tokens(h: Tensor) -> Tensor:
    """Features (B, C, *S) -> one token a voxel (B, N, C)."""
    return h.flatten(2).transpose(1, 2)


def to_voxels(tokens: Tensor, like: Tensor) -> Tensor:
    """Undo :func:`to_tokens`: tokens (B, N, C) -> shape and type of ``like`` (B, C, *S)."""
    return tokens.transpose(1, 2).reshape(like.shape).to(like.dtype)


def zero_linear(inputs: int, outputs: int) -> nn.Linear:
    """Linear layer that starts at zero, so that what it ends contributes nothing at first."""
    layer = nn.Linear(inputs, outputs)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def largest_divisor(channels: int, heads: int) -> int:
    """Largest number of heads up to ``heads`` that divides ``channels``; ValueError where either is below 1."""
    require_positive(channels=channels, heads=heads)
    return next(n for n in range(min(heads, channels), 0, -1) if channels % n == 0)


def require_positive(**sizes: int) -> None:
    """ValueError that names the first size below 1."""
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name}={size}: must be 1 or more.")
