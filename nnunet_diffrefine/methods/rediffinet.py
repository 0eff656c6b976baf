"""Re-DiffiNet: diffusion of the discrepancy between stage one's hard mask and the reference.

Stage one U decides a hard mask U(I) of the image I, one channel per class or region. What is generated is where it is
wrong,

    Delta = |U(I) - x_0|,

by Gaussian diffusion of 2 Delta - 1 (linear schedule, T = 1000). The denoiser DU predicts Delta from the noisy state:

    Delta_hat = DU(cat(U(I), I, x_t), t, I_f),    I_f = xi(cat(U(I), I))                                       (Eq. 5)

xi is a trainable copy of DU's encoder; its features I_f are computed once a window and added to DU's at every level.
Trained with Dice + binary cross-entropy + mean squared error of Delta_hat. Sampled with DDIM; the mean of K seeds is
taken, and the corrected mask is

    x_hat = |U(I) - Delta_hat|,

a flip of every channel where Delta_hat exceeds its threshold.

What the paper leaves open for several classes at once is settled in :mod:`nnunet_diffrefine.errors.targets`: one
decision among exclusive classes, nested regions cut to the regions that contain them, a threshold a class.

References:
    Ren et al. 2024, Re-DiffiNet, MIDL, https://arxiv.org/abs/2402.07354; code https://github.com/KurtLabUW/Re-DiffiNet.
"""

from __future__ import annotations

from nnunet_diffrefine.methods.composition import ComposedMethod


class ReDiffiNet(ComposedMethod):
    """Gaussian diffusion of the absolute discrepancy, with a second encoder for image and hard prior."""

    name = "rediffinet"
    trainer = "DiffRefineTrainer_ReDiffiNet"
    needs = {
        "process.kind": ("gaussian",),
        "process.prediction": ("x0",),
        "error.target": ("absolute",),
        "condition.image": ("plain",),
        "condition.prior": ("hard", "soft"),
        "condition.encoder": (True,),
    }
