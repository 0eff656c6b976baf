"""Cut nnU-Net plans down to a network that a CPU can train in minutes."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

CONFIGURATION = "3d_fullres"


def shrink(
    plans: dict[str, Any],
    name: str,
    features: list[int],
    batch: int,
    patch: list[int] | None = None,
    kept: str = CONFIGURATION,
) -> dict[str, Any]:
    """Copy of ``plans`` with ``len(features)`` resolution stages, on the same preprocessed data.

    Args:
        plans: nnU-Net plans.
        name: plans identifier of the copy.
        features: channels per stage, finest first; at most as many stages as were planned.
        batch: batch size.
        patch: patch size in voxels; the planned one if None. Must be divisible by the product of the strides.
        kept: the configuration that the copy has.

    Raises:
        ValueError: too many stages, or a patch that the strides do not divide.
    """
    plans = deepcopy(plans)
    configuration = plans["configurations"][kept]
    kwargs = configuration["architecture"]["arch_kwargs"]
    stages = len(features)
    if not 2 <= stages <= kwargs["n_stages"]:
        raise ValueError(f"features has {stages} stages; the plans allow 2 to {kwargs['n_stages']}.")
    for key in ("n_conv_per_stage", "n_blocks_per_stage", "kernel_sizes", "strides"):
        if key in kwargs:
            kwargs[key] = kwargs[key][:stages]
    kwargs["n_conv_per_stage_decoder"] = kwargs["n_conv_per_stage_decoder"][: stages - 1]
    kwargs.update(n_stages=stages, features_per_stage=features)
    patch = patch or configuration["patch_size"]
    for axis, size in enumerate(patch):
        stride = 1
        for step in kwargs["strides"]:
            stride *= step[axis]
        if size % stride:
            raise ValueError(
                f"patch is {patch}; axis {axis} must be divisible by {stride}, the product of its strides."
            )
    configuration.update(batch_size=batch, patch_size=patch)
    plans.update(configurations={kept: configuration}, plans_name=name)
    return plans
