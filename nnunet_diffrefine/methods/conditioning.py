"""What the denoiser sees beside the state: image, prior, or the image weighted by the prior."""

from __future__ import annotations

import torch
from torch import Tensor

from nnunet_diffrefine.batch import Foreground
from nnunet_diffrefine.config import ConditionConfig
from nnunet_diffrefine.networks.frequency import low_pass


class Condition:
    """Image (B, C, *S) and prior (B, R, *S) -> condition (B, C_cond, *S).

    Args:
        config: the ``condition`` settings.
        foreground: meaning of the R foreground channels.
    """

    def __init__(self, config: ConditionConfig, foreground: Foreground) -> None:
        self.config = config
        self.foreground = foreground

    def channels(self, image_channels: int) -> int:
        """C_cond."""
        shown = image_channels if self.config.image != "none" else 0
        return shown + (self.foreground.channels if self.config.prior != "none" else 0)

    def __call__(self, image: Tensor, prior: Tensor) -> Tensor:
        """Image first, then prior."""
        parts = []
        if self.config.image != "none":
            parts.append(self._image(image, prior))
        if self.config.prior != "none":
            parts.append(prior if self.config.prior == "soft" else self._hard(prior))
        return torch.cat(parts, 1)

    def _image(self, image: Tensor, prior: Tensor) -> Tensor:
        image = low_pass(image, self.config.low_pass)
        if self.config.image == "plain":
            return image
        inside = self._hard(prior).amax(1, keepdim=True)  # Re-DiffiNet, Eq. 3
        return image * torch.where(inside > 0, 1.0, self.config.outside)

    def _hard(self, prior: Tensor) -> Tensor:
        return self.foreground.decide(self.foreground.logits(prior))
