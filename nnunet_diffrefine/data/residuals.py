"""nnU-Net's augmentation where one image channel is special: it is synthesised, or an additional one goes along.

Both travel as batchgeneratorsv2's ``regression_target``: spatial transforms move them with the image, intensity
transforms leave them alone.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from torch import Tensor

from nnunet_diffrefine.methods.recoseg import from_parts


class TargetChannelTransform(BasicTransform):
    """Apply nnU-Net's transforms, sparing one channel of ``image`` (C, *S) the changes of intensity.

    A synthesis can learn the real channel, not the noise, blur and contrast that augmentation gives each channel on
    its own.

    Args:
        transforms: nnU-Net's own pipeline.
        channel: index of the synthesised channel.
    """

    def __init__(self, transforms: BasicTransform, channel: int) -> None:
        super().__init__()
        self.transforms, self.channel = transforms, channel

    def __call__(self, **data: torch.Tensor) -> dict:
        """Transform the image and, apart from it, a copy of the channel, which then takes its place."""
        target = data["image"][self.channel : self.channel + 1].clone()
        out = self.transforms(**data, regression_target=target)
        out["image"][self.channel] = out.pop("regression_target")[0]
        return out


class ExtraChannelTransform(BasicTransform):
    """Form the additional channel of ``image`` and stored parts (C + 2, *S), then apply nnU-Net's transforms.

    Args:
        transforms: nnU-Net's own pipeline.
        extra: synthetic and real channel (1, *S) in SD -> additional channel (1, *S) in SD, as at prediction.
        channel: index of the synthesised channel.
        maximum: of the stored parts, in SD.
    """

    def __init__(
        self, transforms: BasicTransform, extra: Callable[[Tensor, Tensor], Tensor], channel: int, maximum: float
    ) -> None:
        super().__init__()
        self.transforms, self.extra, self.channel, self.maximum = transforms, extra, channel, maximum

    def __call__(self, **data: torch.Tensor) -> dict:
        """Return image and additional channel, (C + 1, *S)."""
        stacked = data.pop("image")
        image, parts = stacked[:-2].contiguous(), stacked[-2:]
        real = image[self.channel : self.channel + 1]
        extra = self.extra(from_parts(parts, real, self.maximum), real)
        out = self.transforms(**data, image=image, regression_target=extra.contiguous())
        out["image"] = torch.cat((out["image"], out.pop("regression_target")))
        return out
