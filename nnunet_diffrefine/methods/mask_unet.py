"""Mask U-Net: the mask in one pass without diffusion, the control of every method that generates masks.

The U-Net that nnU-Net planned sees image and prior and predicts the corrected mask, with nnU-Net's own loss; there is
no state, no noise and no time (t = 0 throughout). With ``condition.prior`` ``none`` it is a plain network trained with
the refiners' optimiser, average and length: what then remains of a refiner's gain is what the prior is worth, and what
remains against image and prior is what diffusion is worth.
"""

from __future__ import annotations

from nnunet_diffrefine.methods.composition import ComposedMethod


class MaskUNet(ComposedMethod):
    """The corrected mask, predicted in one pass."""

    name = "mask_unet"
    trainer = "DiffRefineTrainer_MaskUNet"
    needs = {"process.kind": ("none",), "error.target": ("mask",)}
