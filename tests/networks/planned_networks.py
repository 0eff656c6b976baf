"""Small plans as nnU-Net holds them, and the denoiser that a method gets from them."""

from __future__ import annotations

import torch
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager

from nnunet_diffrefine.methods import AbstractRefineMethod
from nnunet_diffrefine.networks.build import build_denoiser
from nnunet_diffrefine.networks.denoiser import TimeConditionedUNet

BLOCKS = {"plain": ("PlainConvUNet", "n_conv_per_stage"), "residual": ("ResidualEncoderUNet", "n_blocks_per_stage")}
WIDTHS = [4, 6, 8]


def configuration(kind: str = "plain") -> ConfigurationManager:
    """Three stages, as nnU-Net's plans hold them."""
    name, blocks = BLOCKS[kind]
    kwargs = {
        "n_stages": 3, "features_per_stage": WIDTHS, "conv_op": "torch.nn.modules.conv.Conv3d",
        "kernel_sizes": [[3, 3, 3]] * 3, "strides": [[1, 1, 1], [2, 2, 2], [2, 2, 2]], blocks: [1, 1, 1],
        "n_conv_per_stage_decoder": [1, 1], "conv_bias": True,
        "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d", "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "dropout_op": None, "dropout_op_kwargs": None, "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    }  # fmt: skip
    architecture = {
        "network_class_name": f"dynamic_network_architectures.architectures.unet.{name}",
        "arch_kwargs": kwargs,
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }
    return ConfigurationManager({"architecture": architecture})


def denoiser_of(
    method: AbstractRefineMethod, image_channels: int = 1, kind: str = "plain", deep: bool = False, seed: int = 0
) -> TimeConditionedUNet:
    """The denoiser that the settings of ``method`` ask for, for sides that are multiples of 4."""
    shown, channels = method.condition_channels(image_channels), method.channels(image_channels)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build_denoiser(method.config.condition, configuration(kind), shown, channels, method.foreground, deep)
