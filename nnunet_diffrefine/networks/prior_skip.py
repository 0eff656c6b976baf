"""A skip from the prior to the denoiser's output: the network learns what to change, and begins with stage one."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from nnunet_diffrefine.batch import Foreground

SURE = 0.02
"""Probabilities of the prior are kept this far from 0 and 1, so that a sure voxel can be corrected too."""


class PriorSkip(nn.Module):
    """Denoiser's input and output (B, H, *S) -> the output plus the logits of the prior in the input.

    Args:
        foreground: meaning of the R foreground channels.
        end: the prior is channels ``end - R`` to ``end`` of the input.
    """

    def __init__(self, foreground: Foreground, end: int) -> None:
        super().__init__()
        self.foreground = foreground
        self.end = end

    def forward(self, x: Tensor, output: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
        """Add the logits to every output; their mean over a voxel where that is larger (deep supervision)."""
        prior = x[:, self.end - self.foreground.channels : self.end]
        logits = self.foreground.logits(prior, eps=min(SURE, 0.5 / max(self.foreground.heads, 2)))
        if isinstance(output, list):
            return [one + _resized(logits, one) for one in output]
        return output + logits


def _resized(logits: Tensor, output: Tensor) -> Tensor:
    if logits.shape[2:] == output.shape[2:]:
        return logits
    return functional.interpolate(logits, output.shape[2:], mode="area")
