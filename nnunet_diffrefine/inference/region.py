"""Where a prior can be wrong: around its surface, where it is in doubt, and where a low threshold sees candidates.

Only these voxels are refined; everything else is copied. How many of the true errors lie among them is measured by
``calibrate``, on out-of-fold priors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from scipy.ndimage import maximum_filter1d, minimum_filter1d
from torch import Tensor

from nnunet_diffrefine.batch import Foreground


@dataclass(frozen=True)
class RegionSettings:
    """What counts as doubtful.

    Attributes:
        margin: voxels of the preprocessed image, along each axis, on either side of the prior's surface and around
            candidates.
        entropy: share in [0, 1] of the largest possible entropy from which on a voxel is doubtful.
        candidates: foreground probability in (0, 1] from which on a voxel outside of the prior's mask is a candidate.
        everywhere: refine all voxels.
    """

    margin: int = 4
    entropy: float = 0.1
    candidates: float = 0.05
    everywhere: bool = False

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        wrong = "{} is {}; it must be {}."
        if self.margin < 0:
            raise ValueError(wrong.format("--margin", self.margin, "0 or more voxels"))
        if not 0 <= self.entropy <= 1:
            raise ValueError(wrong.format("--entropy", self.entropy, "between 0 and 1"))
        if not 0 < self.candidates <= 1:
            raise ValueError(wrong.format("--candidates", self.candidates, "above 0 and at most 1"))


def doubtful_region(prior: Tensor, foreground: Foreground, settings: RegionSettings) -> Tensor:
    """Voxels that may be wrong, bool (D, H, W).

    Args:
        prior: foreground probabilities (R, D, H, W) in [0, 1], on the CPU.
        foreground: meaning of the R channels.
        settings: of the region.
    """
    if settings.everywhere:
        return torch.ones(prior.shape[1:], dtype=torch.bool)
    hard = hard_channels(prior, foreground) > 0
    candidates = (prior >= settings.candidates) & ~hard
    doubtful = entropy(prior, foreground) >= settings.entropy
    for inside, candidate in zip(hard, candidates, strict=True):
        doubtful |= surface_band(inside, settings.margin) | dilated(candidate, settings.margin)
    return doubtful


def hard_channels(prior: Tensor, foreground: Foreground) -> Tensor:
    """nnU-Net's decision (R, D, H, W) in {0, 1} of probabilities (R, D, H, W)."""
    return foreground.decide(foreground.logits(prior[None]))[0]


def entropy(prior: Tensor, foreground: Foreground) -> Tensor:
    """Entropy (D, H, W) in [0, 1] of the decision, as a share of its maximum; regions: of the most doubtful one."""
    p = prior.float().clamp(0, 1)
    if foreground.exclusive:
        background = (1 - p.sum(0)).clamp(0, 1)
        total = torch.special.entr(background) + torch.special.entr(p).sum(0)
        return total / math.log(foreground.heads)
    return ((torch.special.entr(p) + torch.special.entr(1 - p)) / math.log(2)).amax(0)


def surface_band(mask: Tensor, margin: int) -> Tensor:
    """Voxels (D, H, W) within ``margin`` voxels, along each axis, of the surface between mask and background.

    The band has ``margin`` voxels on either side; with 0 it is empty.
    """
    if margin == 0 or not mask.any():
        return torch.zeros_like(mask)
    eroded = mask.numpy().astype("uint8")
    for axis in range(eroded.ndim):
        eroded = minimum_filter1d(eroded, 2 * margin + 1, axis, mode="nearest")
    return dilated(mask, margin) & (torch.from_numpy(eroded) == 0)


def dilated(mask: Tensor, margin: int) -> Tensor:
    """A bool mask (D, H, W) grown by ``margin`` voxels along each axis (a box)."""
    if margin == 0 or not mask.any():
        return mask
    grown = mask.numpy().astype("uint8")
    for axis in range(grown.ndim):
        grown = maximum_filter1d(grown, 2 * margin + 1, axis, mode="constant")
    return torch.from_numpy(grown) > 0
