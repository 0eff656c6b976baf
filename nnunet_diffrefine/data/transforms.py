"""nnU-Net's augmentation for stacked image and prior channels.

The prior travels as batchgeneratorsv2's ``regression_target``: spatial transforms move it with the image, intensity
transforms leave it alone.
"""

from __future__ import annotations

import torch
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform


class PriorTransform(BasicTransform):
    """Apply nnU-Net's transforms to ``image`` (C + R, *S), treating its last R channels as the prior.

    Args:
        transforms: nnU-Net's own pipeline.
        prior_channels: R.
    """

    def __init__(self, transforms: BasicTransform, prior_channels: int) -> None:
        super().__init__()
        self.transforms = transforms
        self.prior_channels = prior_channels

    def __call__(self, **data: torch.Tensor) -> dict:
        """Split, transform, stack again; probabilities stay in [0, 1]."""
        stacked = data.pop("image")
        image, prior = stacked[: -self.prior_channels], stacked[-self.prior_channels :]
        out = self.transforms(**data, image=image.contiguous(), regression_target=prior.contiguous())
        prior = out.pop("regression_target").clamp(0, 1)
        out["image"] = torch.cat((out["image"], prior))
        return out
