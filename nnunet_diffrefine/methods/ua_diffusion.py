"""UA-Diffusion: Diff-UNet augmented with stage one's mask as a condition, in three forms.

Gaussian diffusion of the reference mask x_0 (linear schedule, T = 1000). The denoiser DU predicts it,

    x_hat = DU(cat(c, x_t), t, xi(c)),                                                                         (Eq. 4)

with xi a trainable copy of DU's encoder, its features computed once a window and added to DU's at every level, and with
one of three conditions c:

    cat(U(I), I)           the mask of stage one and the image; the paper's choice,
    U(I)                   the mask alone,
    I * M',                the image, with M' = 1 where any U(I) > 0, and 0.2 elsewhere                        (Eq. 3)

Trained with nnU-Net's loss (Dice and cross-entropy) + mean squared error; the paper's third term is its own. Sampled
with DDIM; the mean of K seeds is decided as nnU-Net decides.

References:
    Ren et al. 2024, Re-DiffiNet, MIDL, section 2.1.2, https://arxiv.org/abs/2402.07354.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nnunet_diffrefine.methods.composition import ComposedMethod

SHARED: Mapping[str, tuple[Any, ...]] = {
    "process.kind": ("gaussian",),
    "process.prediction": ("x0",),
    "error.target": ("mask",),
    "condition.encoder": (True,),
}


class UADiffusion(ComposedMethod):
    """Conditioned on stage one's mask and the image."""

    name = "ua_diffusion"
    trainer = "DiffRefineTrainer_UADiffusion"
    needs = {**SHARED, "condition.image": ("plain",), "condition.prior": ("soft", "hard")}


class UADiffusionPriorOnly(ComposedMethod):
    """Conditioned on stage one's mask alone."""

    name = "ua_diffusion_prior_only"
    trainer = "DiffRefineTrainer_UADiffusionPriorOnly"
    needs = {**SHARED, "condition.image": ("none",), "condition.prior": ("soft", "hard")}


class UADiffusionMasked(ComposedMethod):
    """Conditioned on the image, weighted down outside stage one's mask."""

    name = "ua_diffusion_masked"
    trainer = "DiffRefineTrainer_UADiffusionMasked"
    needs = {**SHARED, "condition.image": ("masked",), "condition.prior": ("none",)}
