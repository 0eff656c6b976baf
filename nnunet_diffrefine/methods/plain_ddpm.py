"""A plain DDPM of the mask, conditioned on the image alone: no prior, no error, no second network.

    x_t = sqrt(alpha_bar_t) b x_0 + sqrt(1 - alpha_bar_t) epsilon,    denoiser input (I, x_t)

The reference point of the other diffusion methods, and what the comparison in DMCIE's Table 1 calls SF-Diff ("a
lightweight DDPM design tailored for binary segmentation", timestep conditioning): no paper of that name was found.

Ho et al. 2020, DDPM, https://arxiv.org/abs/2006.11239; the image joined to every state: Wolleb et al. 2022,
https://arxiv.org/abs/2112.03145
"""

from __future__ import annotations

from nnunet_diffrefine.methods.composition import ComposedMethod


class PlainDDPM(ComposedMethod):
    """Gaussian diffusion of the reference mask given the image."""

    name = "plain_ddpm"
    trainer = "DiffRefineTrainer_PlainDDPM"
    needs = {
        "process.kind": ("gaussian",),
        "process.truncation": (1.0,),
        "error.target": ("mask",),
        "condition.image": ("plain",),
        "condition.prior": ("none",),
    }
