"""A second encoder for the condition, whose features join the denoiser's at every stage.

Re-DiffiNet's multi-scale features (https://arxiv.org/abs/2402.07354, after Eq. 4), inherited from Diff-UNet
(https://arxiv.org/abs/2303.10326): the condition does not change from step to step, so its features are computed once.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from nnunet_diffrefine.networks.fusion import AddFusion, DynamicFusion


class ConditionEncoder(nn.Module):
    """A trainable encoder of the same plan as the denoiser's, without time.

    Args:
        encoder: nnU-Net encoder with ``stages`` and ``output_channels``.
        channels: number of condition channels, the first ones of the denoiser's input.
        fusion: ``add`` or ``dynamic``.
    """

    def __init__(self, encoder: Any, channels: int, fusion: str) -> None:  # noqa: ANN401 (nnU-Net's untyped networks)
        super().__init__()
        self.encoder: Any = encoder
        self.channels = channels
        widths = encoder.output_channels
        self.fusions = nn.ModuleList(AddFusion() if fusion == "add" else DynamicFusion(width) for width in widths)

    def forward(self, condition: Tensor) -> list[Tensor]:
        """Features of each stage, finest first, of a condition (B, channels, *S)."""
        stem = getattr(self.encoder, "stem", None)
        f, features = (condition if stem is None else stem(condition)), []
        for stage in self.encoder.stages:
            f = stage(f)
            features.append(f)
        return features
