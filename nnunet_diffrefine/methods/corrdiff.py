"""CorrDiff as DMCIE describes it: mask diffusion from image and prior, with class tokens before the decoder.

The denoiser is encoder -> class tokens -> decoder; it sees image, stage one's probabilities and x_t, and x_0 is the
reference. One learned token a class reads the deepest features and is read by them
(:class:`nnunet_diffrefine.networks.class_tokens.ClassTokens`), so that every voxel knows what the whole patch holds of
each class.

Source: DMCIE, https://arxiv.org/abs/2507.00983, whose comparison names "a UNet++ encoder and a DDPM-based corrective
decoder incorporating class tokens" and no more. The CorrDiff of Li, Huang and Zheng (IEEE JBHI 28(3), 2024) is another
method: by its abstract, diffusion in the space of a VQ-VAE with multi-fusion attention.
"""

from __future__ import annotations

from nnunet_diffrefine.methods.composition import ComposedMethod


class CorrDiff(ComposedMethod):
    """Mask diffusion from image and prior, with class tokens at the bottleneck."""

    name = "corrdiff"
    trainer = "DiffRefineTrainer_CorrDiff"
    needs = {
        "process.kind": ("gaussian",),
        "error.target": ("mask",),
        "condition.prior": ("soft", "hard"),
        "condition.bottleneck": ("class_tokens",),
    }
