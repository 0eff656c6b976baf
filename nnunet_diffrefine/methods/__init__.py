"""Refinement methods, one paper a file: three functions over tensors (channels, loss, refine)."""

from nnunet_diffrefine.methods.base import AbstractRefineMethod
from nnunet_diffrefine.methods.bridge import Bridge
from nnunet_diffrefine.methods.mask_diffusion import MaskDiffusion

METHODS: dict[str, type[AbstractRefineMethod]] = {"bridge": Bridge, "mask_diffusion": MaskDiffusion}

__all__ = ["METHODS", "AbstractRefineMethod", "Bridge", "MaskDiffusion"]
