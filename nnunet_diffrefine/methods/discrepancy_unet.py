"""Discrepancy U-Net: Re-DiffiNet's target without diffusion, its control.

The U-Net that nnU-Net planned sees image and hard mask, cat(U(I), I), and predicts in one pass where the mask is wrong,
Delta = |U(I) - x_0|. Loss and flip are Re-DiffiNet's; there is no state, no noise and no time (t = 0 throughout).

References:
    Ren et al. 2024, Re-DiffiNet, MIDL, section 2.1.3, https://arxiv.org/abs/2402.07354. Its input is not stated there:
    that of Re-DiffiNet is taken.
"""

from __future__ import annotations

from nnunet_diffrefine.methods.composition import ComposedMethod


class DiscrepancyUNet(ComposedMethod):
    """The absolute discrepancy, predicted in one pass."""

    name = "discrepancy_unet"
    trainer = "DiffRefineTrainer_DiscrepancyUNet"
    needs = {
        "process.kind": ("none",),
        "error.target": ("absolute",),
        "condition.image": ("plain",),
        "condition.prior": ("hard", "soft"),
    }
