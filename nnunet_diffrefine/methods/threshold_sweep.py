"""The choice of the probability from which on a voxel is foreground, on cases that were not trained on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nnunet_diffrefine.methods.recoseg import ReCoSeg


class ThresholdSweep:
    """Dice of whole cases at every candidate threshold (section 4.2), for the choice that is kept with the model.

    Regions choose on their own; exclusive classes share one threshold, because they compete.

    Args:
        method: whose decision is swept.
        candidates: thresholds.
    """

    def __init__(self, method: ReCoSeg, candidates: Sequence[float]) -> None:
        self.method, self.candidates = method, sorted(candidates, key=lambda tau: (abs(tau - 0.5), tau))
        self.dice: list[Tensor] = []

    def add(self, logits: Tensor, reference: Tensor, valid: Tensor) -> None:
        """Count a case: logits (1, H, *S), reference (1, R, *S) and valid (1, 1, *S) in {0, 1}."""
        axes = tuple(range(2, logits.ndim))
        rows = []
        for tau in self.candidates:
            thresholds = torch.full((self.method.foreground.channels,), tau)
            decided = self.method.foreground.decide(self.method.shifted(logits, thresholds)) * valid
            both, sizes = (decided * reference).sum(axes), decided.sum(axes) + (reference * valid).sum(axes)
            # Correctly empty counts 1, so that every threshold is judged on the same cases and false alarms cost.
            rows.append(torch.where(sizes[0] > 0, 2 * both[0] / sizes[0].clamp(min=1), 1.0))
        self.dice.append(torch.stack(rows))

    def best(self, default: float) -> Tensor:
        """Thresholds (R,): the highest mean Dice over cases, of ties the nearest to 0.5; ``default`` without cases."""
        if not self.dice:
            return torch.full((self.method.foreground.channels,), default)
        mean = torch.stack(self.dice).mean(0)
        if self.method.foreground.exclusive:
            mean = mean.mean(1, keepdim=True).expand_as(mean)
        return torch.tensor(self.candidates)[mean.argmax(0)]  # the first of equals, and they are sorted
