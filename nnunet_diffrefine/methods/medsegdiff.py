"""MedSegDiff: mask diffusion whose image features are attended to by the state of each step, through learned filters.

Image I and state x_t have an encoder each. Their features m_I and m_x are joined at every stage k (Eq. 2, 3), m_x
having passed the frequency parser P (Eq. 4 to 6), and one decoder reads the sum:

    D(E_I + E_x, t),    A(m_I, m_x) = (LN(m_I) ⊗ LN(P(m_x))) ⊗ m_I

Departure: E_x is given the image beside the state, as every denoiser here is; E_I sees the image alone.

See :class:`nnunet_diffrefine.networks.fusion.DynamicFusion`. Stage one has no part in it. E_I depends on the image
alone, so it runs once a window; A depends on the state and runs at every step.

Source: Wu et al. 2022, https://arxiv.org/abs/2211.00611; DMCIE, https://arxiv.org/abs/2507.00983, compares itself with
it ("UNet3+ backbone enriched with frequency-aware modules and dynamic conditioning").
"""

from __future__ import annotations

from nnunet_diffrefine.methods.composition import ComposedMethod


class MedSegDiff(ComposedMethod):
    """Mask diffusion with an image encoder, dynamic conditioning and frequency parser."""

    name = "medsegdiff"
    trainer = "DiffRefineTrainer_MedSegDiff"
    needs = {
        "process.kind": ("gaussian",),
        "error.target": ("mask",),
        "condition.image": ("plain",),
        "condition.encoder": (True,),
        "condition.fusion": ("dynamic",),
    }
