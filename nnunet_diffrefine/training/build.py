"""Rebuild a refiner's network from its plans alone, as nnU-Net does at prediction."""

from __future__ import annotations

from typing import Any

from nnunet_diffrefine.methods import METHODS, AbstractRefineMethod
from nnunet_diffrefine.networks.build import build_denoiser
from nnunet_diffrefine.networks.gate import Gate
from nnunet_diffrefine.networks.planned import stage_one_network
from nnunet_diffrefine.networks.refinement import RefinementNetwork
from nnunet_diffrefine.plans import read_block


def build_network(
    plans: Any,  # noqa: ANN401 (nnU-Net's PlansManager)
    configuration: Any,  # noqa: ANN401 (nnU-Net's ConfigurationManager)
    image_channels: int,
    heads: int,
    deep_supervision: bool,
) -> RefinementNetwork:
    """Build stage one and refiner, with random weights, from the plans' resolved ``diffrefine`` block.

    Args:
        plans: nnU-Net's plans manager.
        configuration: nnU-Net's configuration manager of the refiner's configuration.
        image_channels: C.
        heads: H, nnU-Net's number of segmentation heads.
        deep_supervision: whether the denoiser returns all its outputs.

    Raises:
        ConfigError: the plans hold no resolved block, or a gate of unknown classes.
    """
    config, resolved = read_block(configuration.configuration)
    foreground = resolved.channels()
    method: AbstractRefineMethod = METHODS[config.method](config, foreground)
    denoiser = build_denoiser(
        config.condition,
        configuration,
        method.condition_channels(image_channels),
        method.channels(image_channels),
        foreground,
        deep_supervision,
    )
    record = resolved.stage_one
    axes = tuple(record["mirror_axes"] or ())
    return RefinementNetwork(
        stage_one_network(record["builder"], record["architecture"], plans, configuration, image_channels, heads),
        denoiser,
        method,
        foreground,
        config.sampling,
        stage_one_axes=axes if config.stage_one.mirroring else (),
        refiner_axes=axes,
        gate=Gate.from_settings(config.gate, foreground),
    )
