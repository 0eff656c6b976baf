"""Maps beside the mask: how likely stage one is wrong, and how far samples and folds lie apart.

The error probability is the model's own, not calibrated.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nnunet_diffrefine.batch import Foreground


def error_probability(logits: Tensor, evidence: Tensor | None, prior: Tensor, foreground: Foreground) -> Tensor:
    """Probability in [0, 1], (B, *S), that the prior's decision is wrong.

    Exclusive classes: one less the probability of the class that the prior decided. Regions: the largest difference
    between a region's probability and the prior's decision on it. Methods that predict errors: the largest of theirs.

    Args:
        logits: of the corrected mask, (B, H, *S).
        evidence: logits of the errors (B, R, *S), or None for methods that predict masks.
        prior: probabilities (B, R, *S).
        foreground: meaning of the R channels.
    """
    if evidence is not None:
        return torch.sigmoid(evidence).amax(1)
    p, hard = foreground.probabilities(logits), foreground.decide(foreground.logits(prior))
    if not foreground.exclusive:
        return (p - hard).abs().amax(1)
    decided = torch.where(hard.amax(1) > 0, (p * hard).sum(1), 1 - p.sum(1))
    return (1 - decided).clamp(0, 1)


class Spread:
    """Running standard deviation of probabilities over samples and folds."""

    def __init__(self) -> None:
        self.count = 0
        self._mean: Tensor | float = 0.0
        self._squares: Tensor | float = 0.0

    def add(self, probabilities: Tensor) -> None:
        """Take in one prediction (B, R, *S) in [0, 1] (Welford's update)."""
        self.count += 1
        difference = probabilities - self._mean
        self._mean = self._mean + difference / self.count
        self._squares = self._squares + difference * (probabilities - self._mean)

    def deviation(self) -> Tensor:
        """Largest standard deviation of the R channels, in [0, 0.5], (B, *S).

        Raises:
            ValueError: fewer than two predictions.
        """
        if self.count < 2:
            raise ValueError(f"The spread of {self.count} prediction(s) is not defined; two are needed.")
        return (torch.as_tensor(self._squares) / self.count).clamp(min=0).sqrt().amax(1)
