"""Maps beside the mask: how likely stage one is wrong, and how far samples and folds lie apart.

The error probability is the model's own, not calibrated.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nnunet_diffrefine.batch import Foreground
from nnunet_diffrefine.errors.probability import error_of


def error_probability(logits: Tensor, evidence: Tensor | None, prior: Tensor, foreground: Foreground) -> Tensor:
    """Probability in [0, 1], (B, *S), that the prior's decision is wrong.

    That of :func:`~nnunet_diffrefine.errors.probability.error_of` with the probabilities of the corrected mask. Methods
    that predict errors: the largest of theirs.

    Args:
        logits: of the corrected mask, (B, H, *S).
        evidence: logits of the errors (B, R, *S), or None for methods that predict masks.
        prior: probabilities (B, R, *S).
        foreground: meaning of the R channels.
    """
    if evidence is not None:
        return torch.sigmoid(evidence).amax(1)
    return error_of(foreground.probabilities(logits), prior, foreground)


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
