"""ReCoSeg's networks, rebuilt from the plans alone, as nnU-Net does at prediction."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import dacite
import torch

from nnunet_diffrefine.batch import Foreground
from nnunet_diffrefine.config import BLOCK, ConfigError
from nnunet_diffrefine.methods.recoseg import ReCoSeg, Synthesis
from nnunet_diffrefine.methods.recoseg_settings import (
    RECOSEG,
    SYNTHESIS,
    ReCoSegConfig,
    SynthesisConfig,
)
from nnunet_diffrefine.networks.attention import SelfAttention
from nnunet_diffrefine.networks.denoiser import TimeConditionedUNet
from nnunet_diffrefine.networks.planned import planned_unet
from nnunet_diffrefine.networks.recoseg import ReCoSegNetwork, SynthesisNetwork
from nnunet_diffrefine.settings_block import read_settings
from nnunet_diffrefine.stage_one.manifest import ChannelRecord

Config = TypeVar("Config", SynthesisConfig, ReCoSegConfig)


def synthesis_of(configuration: Any) -> SynthesisNetwork:  # noqa: ANN401 (nnU-Net's ConfigurationManager)
    """The synthesis network of a trained model's plans, with random weights.

    Raises:
        ConfigError: the plans hold no resolved block of a synthesis.
    """
    _, resolved = read_resolved(SynthesisConfig, configuration.configuration, SYNTHESIS)
    return build_synthesis(configuration, dacite.from_dict(ChannelRecord, resolved))


def build_synthesis(
    configuration: Any,  # noqa: ANN401 (nnU-Net's ConfigurationManager)
    channel: ChannelRecord,
) -> SynthesisNetwork:
    """The synthesis network of the planned architecture, with random weights."""
    config = read_settings(SynthesisConfig, channel.settings)
    method = Synthesis(config, channel.index, channel.image_channels)
    unet: Any = planned_unet(configuration, *method.channels, deep_supervision=False)
    width = unet.encoder.output_channels[-1]
    attention = SelfAttention(width, config.attention_heads) if config.attention_heads else None
    return SynthesisNetwork(TimeConditionedUNet(unet, bottleneck=attention), method)


def build_recoseg(
    configuration: Any,  # noqa: ANN401 (nnU-Net's ConfigurationManager)
    heads: int,
    deep_supervision: bool,
) -> ReCoSegNetwork:
    """Synthesis and segmentation, with random weights, from the plans' resolved block alone.

    Raises:
        ConfigError: the plans hold no resolved block of ReCoSeg.
    """
    config, resolved = read_resolved(ReCoSegConfig, configuration.configuration, RECOSEG)
    values = resolved["foreground"]
    parents = tuple(values.get("parents", ()))
    foreground = Foreground(tuple(values["names"]), values["exclusive"], values["ignore_label"], parents)
    channel = dacite.from_dict(ChannelRecord, resolved["channel"])
    theirs = {**configuration.configuration, "architecture": resolved["synthesis"]["architecture"]}
    synthesis = build_synthesis(type(configuration)(theirs), channel)
    method = ReCoSeg(config, foreground, channel.index, channel.image_channels, channel.maximum)
    thresholds = torch.full((foreground.channels,), config.decision.threshold)
    axes = range(len(configuration.patch_size)) if config.mirroring else ()
    segmenter = planned_unet(configuration, method.input_channels, heads, deep_supervision)
    return ReCoSegNetwork(synthesis, segmenter, method, thresholds, tuple(axes))


def read_resolved(cls: type[Config], configuration: Mapping[str, Any], method: str) -> tuple[Config, dict[str, Any]]:
    """Settings and record of a trained model's configuration.

    Raises:
        ConfigError: the block is missing, was never resolved by a trainer, or is another method's.
    """
    block = dict(configuration.get(BLOCK, {}))
    resolved = block.pop("resolved", None)
    if resolved is None or block.get("method") != method:
        raise ConfigError(
            f"These plans hold no resolved '{BLOCK}' block of method '{method}'. Predict from the model folder that "
            "its trainer wrote."
        )
    return read_settings(cls, block), resolved
