"""From settings to a denoiser of the planned architecture."""

from __future__ import annotations

from typing import Any

from torch import nn

from nnunet_diffrefine.batch import Foreground
from nnunet_diffrefine.config import ConditionConfig
from nnunet_diffrefine.networks.attention import ChannelAttention, SelfAttention
from nnunet_diffrefine.networks.class_tokens import ClassTokens
from nnunet_diffrefine.networks.condition_encoder import ConditionEncoder
from nnunet_diffrefine.networks.denoiser import TimeConditionedUNet
from nnunet_diffrefine.networks.planned import planned_unet
from nnunet_diffrefine.networks.prior_skip import PriorSkip


def build_denoiser(
    config: ConditionConfig,
    configuration: Any,  # noqa: ANN401 (nnU-Net's ConfigurationManager)
    condition_channels: int,
    channels: tuple[int, int],
    foreground: Foreground,
    deep_supervision: bool,
) -> TimeConditionedUNet:
    """Build a denoiser with random weights.

    Args:
        config: the ``condition`` settings.
        configuration: nnU-Net's configuration manager.
        condition_channels: how many input channels are condition; they come first.
        channels: numbers of input and output channels.
        foreground: meaning of the R foreground channels; a prior's are the last ones of the condition.
        deep_supervision: whether the denoiser returns all its outputs.
    """
    unet: Any = planned_unet(configuration, *channels, deep_supervision)
    encoder = None
    if config.encoder:
        planned: Any = planned_unet(configuration, condition_channels, channels[1], deep_supervision)
        encoder = ConditionEncoder(planned.encoder, condition_channels, config.fusion)
    width = unet.encoder.output_channels[-1]
    skip = PriorSkip(foreground, condition_channels) if config.skip == "prior" else None
    bottleneck = _bottleneck(config.bottleneck, width, foreground.channels)
    return TimeConditionedUNet(unet, condition=encoder, bottleneck=bottleneck, skip=skip)


def _bottleneck(kind: str, width: int, classes: int) -> nn.Module | None:
    if kind == "channel_attention":
        return ChannelAttention(width)
    if kind == "self_attention":
        return SelfAttention(width)
    return ClassTokens(classes, width) if kind == "class_tokens" else None
