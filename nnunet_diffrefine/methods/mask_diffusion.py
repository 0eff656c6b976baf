"""Gaussian diffusion of the mask, conditioned on image and prior: the plainest of the Gaussian methods.

x_0 is the reference in {-1, 1} times the input scale; the denoiser sees image, prior and x_t and predicts x_0 (as
segmentation logits, trained with nnU-Net's loss), epsilon or v (mean squared error).
"""

from __future__ import annotations

from nnunet_diffrefine.methods.composition import ComposedMethod


class MaskDiffusion(ComposedMethod):
    """Conditional Gaussian diffusion of the reference mask."""

    name = "mask_diffusion"
    trainer = "DiffRefineTrainer_MaskDiffusion"
    needs = {"process.kind": ("gaussian",), "error.target": ("mask",)}
