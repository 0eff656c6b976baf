"""How the features of a condition encoder join those of the denoiser, at each level of the U-Net."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nnunet_diffrefine.networks.frequency import FrequencyParser


class AddFusion(nn.Module):
    """Sum h + f: Re-DiffiNet (https://arxiv.org/abs/2402.07354), Fig. 1, and Diff-UNet before it. No parameters."""

    def forward(self, h: Tensor, f: Tensor) -> Tensor:
        """Join h and f, both (B, channels, *S); ValueError if their shapes differ."""
        _require_one_shape(h, f)
        return h + f.to(h.dtype)


class DynamicFusion(nn.Module):
    """Dynamic conditional encoding: h + f + γ ⊗ A, A = LN(f) ⊗ LN(P(h)) ⊗ f; h + f at initialisation.

    h are the denoiser's features and f the condition's, both (B, channels, *S); ⊗ multiplies element by element.
    A lets the state of the current step say where the condition counts; P, a :class:`FrequencyParser` on h, learns
    which frequencies of the noisy state may. γ (one a channel) starts at zero, so P gets its first gradient after the
    first optimiser step. LN normalises all channels and voxels of a sample together, and has no weights: γ scales A.

    A is the attentive-like mechanism A(m_I, m_x) = (LN(m_I) ⊗ LN(m_x)) ⊗ m_I of MedSegDiff
    (https://arxiv.org/abs/2211.00611), m_I = f, m_x = P(h). There A replaces m_I and the parser has one weight for
    each frequency of a fixed size; γ and the sum around A are ours. A holds float32 copies of h and f, which the
    finest levels of a 3D network may not have room for; MedSegDiff fuses in the middle ones only.

    Args:
        channels: channels of h and of f.
        bands: see :class:`FrequencyParser`.

    Raises:
        ValueError: ``channels`` is below 1 or ``bands`` below 2.
    """

    def __init__(self, channels: int, bands: int = 8) -> None:
        super().__init__()
        self.parser = FrequencyParser(channels, bands)
        self.gamma = nn.Parameter(torch.zeros(channels))

    def forward(self, h: Tensor, f: Tensor) -> Tensor:
        """Join h and f, both (B, channels, *S); ValueError if their shapes differ."""
        _require_one_shape(h, f)
        with torch.autocast(h.device.type, enabled=False):  # a product of three overflows half precision
            affinity = _layer_norm(f.float()) * _layer_norm(self.parser(h.float()))
            change = self.gamma.view(-1, *([1] * (h.ndim - 2))) * affinity * f.float()
        return h + f.to(h.dtype) + change.to(h.dtype)


def _layer_norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[1:])


def _require_one_shape(h: Tensor, f: Tensor) -> None:
    if h.shape != f.shape:  # broadcasting would hide it
        raise ValueError(
            f"h has shape {tuple(h.shape)} and f {tuple(f.shape)}; fusion takes two of one shape (B, channels, *S). "
            "Give the condition's encoder the same plan as the denoiser's."
        )
