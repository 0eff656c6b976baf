"""The choice of the probability from which on a voxel is foreground, on cases that were not trained on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nnunet_diffrefine.methods.recoseg import ReCoSeg

ROUNDS = 5


class ThresholdSweep:
    """Dice of whole cases at candidate thresholds (section 4.2), for the choice that is kept with the model.

    Masks are judged as they are decided. Every region has its own threshold; exclusive classes share one, because they
    compete.

    Args:
        method: whose decision is swept.
        candidates: thresholds.
    """

    def __init__(self, method: ReCoSeg, candidates: Sequence[float]) -> None:
        self.method, self.candidates = method, sorted(candidates, key=lambda tau: (abs(tau - 0.5), tau))
        self.cases: list[tuple[Tensor, Tensor, Tensor]] = []

    def add(self, logits: Tensor, reference: Tensor, valid: Tensor) -> None:
        """Take a case in: logits (1, H, *S), reference (1, R, *S) and valid (1, 1, *S) in {0, 1}."""
        reference, lowest = reference * valid, torch.full((self.method.foreground.channels,), min(self.candidates))
        # No candidate decides more than the lowest: elsewhere the size of the reference is all that counts.
        seen = (self._decided(logits, lowest) * valid)[0].any(0)
        self.cases.append((logits[:, :, seen], reference[:, :, seen], reference.flatten(2).sum(2)[0]))

    def dice(self, thresholds: Tensor) -> Tensor:
        """Dice (R,) at thresholds (R,), mean over the cases.

        Correctly empty counts 1, so that all thresholds are judged on the same cases and false alarms cost.
        """
        rows = []
        for logits, reference, size in self.cases:
            decided = self._decided(logits, thresholds)
            both, sizes = (decided * reference).sum(2)[0], decided.sum(2)[0] + size
            rows.append(torch.where(sizes > 0, 2 * both.double() / sizes.clamp(min=1), 1.0))
        return torch.stack(rows).mean(0)

    def best(self, default: float) -> Tensor:
        """Thresholds (R,) of the highest mean Dice, of ties the nearest to 0.5; ``default`` without cases.

        Regions one at a time, until none changes: a region is cut to those that contain it, so their thresholds count.
        """
        channels = self.method.foreground.channels
        if not self.cases:
            return torch.full((channels,), default)
        together = [list(range(channels))] if self.method.foreground.exclusive else [[k] for k in range(channels)]
        chosen = torch.full((channels,), self.candidates[0])
        for _ in range(ROUNDS):
            before = chosen
            for group in together:
                options = [chosen.index_fill(0, torch.tensor(group), tau) for tau in self.candidates]
                chosen = max(options, key=lambda thresholds: float(self.dice(thresholds).mean()))  # the first of equals
            if torch.equal(chosen, before):
                break
        return chosen

    def _decided(self, logits: Tensor, thresholds: Tensor) -> Tensor:
        return self.method.foreground.decide(self.method.shifted(logits, thresholds))
