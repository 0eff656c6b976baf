"""CMDiff: Gaussian diffusion of the mask, conditioned on a low-passed image, channel attention at the bottleneck.

    image -> Fourier low-pass -> condition of every step
    x_T ~ N(0, I) -> x_0 predicted from (condition, x_t, t) -> DDIM -> mask

Stage one has no part in it, so it competes with stage one instead of correcting it. ``condition.low_pass`` is the
filter's cut-off (:func:`nnunet_diffrefine.networks.frequency.low_pass`); the attention is
:class:`nnunet_diffrefine.networks.attention.ChannelAttention`.

Source: CMDiff, Scientific Reports 2025, https://doi.org/10.1038/s41598-025-25137-7, known here from a web page about it
and its abstract only. The page's diffusion "guided by segmentation labels" can mean no more than that labels are what
is noised in training: a label at test time would be the answer itself.
"""

from __future__ import annotations

from nnunet_diffrefine.methods.composition import ComposedMethod


class CMDiff(ComposedMethod):
    """Mask diffusion from the filtered image alone."""

    name = "cmdiff"
    trainer = "DiffRefineTrainer_CMDiff"
    needs = {
        "process.kind": ("gaussian",),
        "error.target": ("mask",),
        "condition.image": ("plain",),
        "condition.bottleneck": ("channel_attention",),
    }
