"""The seam to nnU-Net's networks: build what the plans describe."""

from __future__ import annotations

import inspect
from copy import deepcopy
from typing import Any

from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import nn


def planned_unet(
    configuration: ConfigurationManager, input_channels: int, output_channels: int, deep_supervision: bool
) -> nn.Module:
    """Build the network of the plans with other numbers of channels."""
    return get_network_from_plans(
        configuration.network_arch_class_name,
        configuration.network_arch_init_kwargs,
        configuration.network_arch_init_kwargs_req_import,
        input_channels,
        output_channels,
        allow_init=True,
        deep_supervision=deep_supervision,
    )


def stage_one_network(
    builder: str,
    architecture: dict[str, Any],
    plans: PlansManager,
    configuration: ConfigurationManager,
    input_channels: int,
    heads: int,
) -> nn.Module:
    """Build stage one as its trainer did, for inference; no file is read.

    Args:
        builder: name of the trainer class that defines ``build_network_architecture``.
        architecture: the ``architecture`` entry of stage one's configuration.
        plans: plans of the refiner (stage one's preprocessing is the same).
        configuration: the refiner's configuration.
        input_channels: number of image channels.
        heads: number of segmentation heads.
    """
    settings = deepcopy(configuration.configuration)
    settings["architecture"] = architecture
    configuration = ConfigurationManager(settings)
    build = recursive_find_trainer_class_by_name(builder).build_network_architecture
    if "plans_manager" in inspect.signature(build).parameters:
        return build(plans, configuration, input_channels, heads, enable_deep_supervision=False)
    return build(
        configuration.network_arch_class_name,
        configuration.network_arch_init_kwargs,
        configuration.network_arch_init_kwargs_req_import,
        input_channels,
        heads,
        enable_deep_supervision=False,
    )
