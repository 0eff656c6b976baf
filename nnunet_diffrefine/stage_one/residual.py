"""What the export of a synthesis model stores of a case, instead of probabilities."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import dacite
import numpy as np
import torch
from torch import Tensor

from nnunet_diffrefine.config import BLOCK
from nnunet_diffrefine.methods.recoseg import to_parts
from nnunet_diffrefine.methods.recoseg_settings import SYNTHESIS
from nnunet_diffrefine.stage_one.manifest import ChannelRecord

QUANTILES = 201  # every half per cent
SMALLEST_SCALE = 1e-3  # SD


def synthesised_channel(configuration: Mapping[str, Any]) -> ChannelRecord | None:
    """The record that a trained synthesis keeps in its configuration; None for any other model."""
    block = configuration.get(BLOCK, {})
    if not isinstance(block, Mapping) or block.get("method") != SYNTHESIS or "resolved" not in block:
        return None
    return dacite.from_dict(ChannelRecord, block["resolved"], dacite.Config(strict=True))


def stored_parts(synthetic: Tensor, image: Tensor, channel: ChannelRecord) -> np.ndarray:
    """Excess and deficit (2, D, H, W) in [0, 1] of a synthetic channel (1, D, H, W) and the image (C, D, H, W)."""
    real = image[channel.index : channel.index + 1]
    return to_parts(synthetic.float().cpu(), real.float(), channel.maximum).numpy()


def residual_quantiles(parts: np.ndarray, image: np.ndarray, maximum: float) -> list[float]:
    """Quantiles 0, 0.005, ..., 1 of the residual in SD over voxels where any image channel is not 0, to 4 decimals.

    nnU-Net sets what lies outside of a masked image to 0, where a residual says nothing. An empty image counts whole.
    """
    residual = maximum * parts.sum(0)
    inside = (image != 0).any(0)
    values = residual[inside] if inside.any() else residual
    return np.quantile(values, np.linspace(0, 1, QUANTILES)).round(4).tolist()


def quantile(quantiles: list[float], share: float) -> float:
    """Read a quantile back, interpolating linearly; ``share`` in [0, 1]."""
    return float(np.interp(share, np.linspace(0, 1, len(quantiles)), quantiles))


def median_quantile(cases: Mapping[str, list[float]], share: float) -> Tensor:
    """Median over cases of their own quantile, a scalar in SD; above 0, so that it can divide."""
    median = np.median([quantile(values, share) for values in cases.values()])
    return torch.tensor(max(float(median), SMALLEST_SCALE))
