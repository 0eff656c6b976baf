r"""Diff-UNet: diffusion of the mask from the image alone, the estimates of all steps and runs fused by uncertainty.

Gaussian diffusion of the reference mask x_0 (linear schedule, T = 1000). The denoiser predicts it from image and state,
x_hat = DU(cat(I, x_t), t, xi(I)), with xi a trainable copy of DU's encoder, its features computed once a window and
added at every level. The prior is not looked at: a segmentation network of its own, the baseline of Re-DiffiNet.

Step-uncertainty based fusion. DDIM runs K times in S steps; let pbar_i be the mean over the runs of the probabilities
predicted at step i = 1..S (the first is the noisiest). With the uncertainty u_i of pbar_i,

    w_i = exp(sigmoid(i / S) (1 - u_i)),    Y = sum_i w_i pbar_i / sum_i w_i,

so that later and surer steps count more, voxel by voxel. Dividing by the sum makes Y a probability; the authors leave
it out, which for their x_0 in [-1, 1], cut at 0, decides alike.

The printed u = -p log p is one-sided: largest at p = 1 / e instead of 1 / 2, so that of two steps equally sure, one of
the channel and one against it, the former counts more. Here u is the entropy of all outcomes,

    u = -sum_k p_k log p_k / log n,

over {channel, not channel} for regions (n = 2, every region by itself) and over background and classes for exclusive
classes (n = R + 1, one weight a voxel, so that Y sums to 1). ``paper_literal`` takes the printed form, p floored at
0.001 as in the code, and rescales exclusive classes to a sum of 1.

References:
    Xing et al. 2023, Diff-UNet, https://arxiv.org/abs/2303.10326; code https://github.com/ge-xing/Diff-UNet.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nnunet_diffrefine.methods.composition import ComposedMethod

FLOOR = 0.001
"""Of the printed entropy's probabilities; from the code."""


class DiffUNet(ComposedMethod):
    """Gaussian diffusion of the mask given the image, with step-uncertainty based fusion."""

    name = "diff_unet"
    trainer = "DiffRefineTrainer_DiffUNet"
    needs = {
        "process.kind": ("gaussian",),
        "process.prediction": ("x0",),
        "error.target": ("mask",),
        "condition.image": ("plain",),
        "condition.prior": ("none",),
        "condition.encoder": (True,),
    }
    fuses_steps = True

    def fused(self, estimates: list[list[Tensor]]) -> Tensor:
        """Y (B, R, *S) of the probabilities of every run and step, each (B, R, *S)."""
        pbar = torch.stack([torch.stack(runs).mean(0) for runs in zip(*estimates, strict=True)])
        p = self._outcomes(pbar)
        i = torch.arange(1, len(p) + 1, device=p.device).view(-1, *([1] * (p.ndim - 1)))
        w = torch.exp(torch.sigmoid(i / len(p)) * (1 - self.uncertainty(p)))
        Y = (w * p).sum(0) / w.sum(0)
        return (Y / Y.sum(1, keepdim=True))[:, 1:] if self.foreground.exclusive else Y

    def uncertainty(self, p: Tensor) -> Tensor:
        """Entropy u of the probabilities of outcomes.

        Args:
            p: (S, B, R, *S) of regions, or (S, B, R + 1, *S) of background and classes.

        Returns:
            In [0, 1] and with one channel for exclusive classes; in [0, 1 / e] and with all channels if literal.
        """
        if self.config.paper_literal:
            return entropy(p.clamp(min=FLOOR))
        if self.foreground.exclusive:
            return entropy(p).sum(2, keepdim=True) / math.log(p.shape[2])
        return (entropy(p) + entropy(1 - p)) / math.log(2)

    def _outcomes(self, p: Tensor) -> Tensor:
        """Foreground probabilities (S, B, R, *S), with those of the background in front for exclusive classes."""
        if not self.foreground.exclusive:
            return p
        return torch.cat(((1 - p.sum(2, keepdim=True)).clamp(min=0), p), 2)


def entropy(p: Tensor) -> Tensor:
    """-p log p in nats, 0 at p = 0."""
    result: Tensor = torch.special.entr(p)
    return result
