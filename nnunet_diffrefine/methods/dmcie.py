"""DMCIE (Yavari et al. 2025): Gaussian diffusion of stage one's signed error, added back to its mask.

With the hard prior M and the reference G, one channel per class or region,

    E = G - M in {-1, 0, 1}: remove, keep or add         (Eq. 1, sign corrected: with M - G, Eq. 14 doubles errors)
    x_t = sqrt(alpha_bar_t) E + sqrt(1 - alpha_bar_t) epsilon                     (Eq. 5: noise on the error alone)
    denoiser input = (c, x_t), c being clean at every step                        (Eq. 11; Eq. 12 would noise c too)
    loss = CE(remove, keep, add) + lambda Dice(remove, add)                       (Eq. 13's two terms, on E)
    corrected mask = M + E_hat                                                    (Eq. 14)

c is the image, and by default the prior: whether an error can be -1 or +1 depends on it. Eq. 13 itself is undefined:
cross-entropy and Dice want targets in [0, 1], and its target is Gaussian noise. ``paper_literal`` predicts epsilon with
the mean squared error, from the image alone, and takes all T DDPM steps.

Yavari et al. 2025, https://arxiv.org/abs/2507.00983
"""

from __future__ import annotations

from nnunet_diffrefine.methods.composition import ComposedMethod


class DMCIE(ComposedMethod):
    """Three-way error, generated and added to the prior."""

    name = "dmcie"
    trainer = "DiffRefineTrainer_DMCIE"
    needs = {"process.kind": ("gaussian",), "error.target": ("three_way",)}
