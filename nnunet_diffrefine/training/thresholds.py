"""Which probabilities of an error are enough to mend it: the best final Dice on given cases."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nnunet_diffrefine.batch import Foreground

CANDIDATES = (*(round(0.05 * k, 2) for k in range(1, 20)), 0.97, 0.98, 0.99, 0.995, 0.999, 1.0)
"""Probabilities from which on an error is mended; 1 never mends any."""
SWEEPS = 5

Decide = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class _Case:
    """The voxels of a case that some candidate might flip, and sums over all others.

    Attributes:
        evidence: logits of the errors, (1, R, N).
        prior: probabilities (1, R, N).
        reference: bool (R, N).
        overlap: voxels elsewhere in mask and reference, (R,).
        total: voxels elsewhere in the mask plus those in the reference, (R,).
    """

    evidence: Tensor
    prior: Tensor
    reference: Tensor
    overlap: Tensor
    total: Tensor


class ThresholdChoice:
    """Thresholds judged by the Dice of the mask that a method decides on, conflicts of classes and nesting included.

    Args:
        decide: evidence (1, R, N), prior (1, R, N) and threshold logits (R,) to logits (1, H, N), voxel by voxel.
        foreground: meaning of the R channels.
    """

    def __init__(self, decide: Decide, foreground: Foreground) -> None:
        self.decide = decide
        self.foreground = foreground
        self.cases: list[_Case] = []

    def add(self, evidence: Tensor, prior: Tensor, reference: Tensor, valid: Tensor) -> None:
        """Take a case in.

        Args:
            evidence: logits of the errors, (R, D, H, W).
            prior: probabilities (R, D, H, W).
            reference: bool (R, D, H, W).
            valid: bool (1, D, H, W); False under the ignore label.
        """
        seen = valid[0]
        open_ = (evidence > torch.tensor(CANDIDATES[0]).logit()).any(0) & seen
        rest = ~open_ & seen
        mask = self._mask(evidence[:, rest][None], prior[:, rest][None], [1.0] * self.foreground.channels)
        truth = reference[:, rest]
        sums = (mask & truth).sum(1), mask.sum(1) + truth.sum(1)
        self.cases.append(_Case(evidence[:, open_][None], prior[:, open_][None], reference[:, open_], *sums))

    def dice(self, thresholds: Sequence[float]) -> np.ndarray:
        """Dice (R,) of the final masks, mean over the cases; both masks empty counts 1, so that false alarms cost."""
        rows = []
        for case in self.cases:
            mask = self._mask(case.evidence, case.prior, thresholds)
            overlap = case.overlap + (mask & case.reference).sum(1)
            total = case.total + mask.sum(1) + case.reference.sum(1)
            rows.append(torch.where(total > 0, 2 * overlap / total, 1.0).numpy())
        found: np.ndarray = np.mean(rows, 0)
        return found

    def best(self) -> list[float]:
        """The candidate of each channel with the best mean Dice over all, of equal ones the most cautious.

        One channel at a time, from "never" on, until none changes: a voxel can move from one class to another once the
        first may lose it.
        """
        chosen = [CANDIDATES[-1]] * self.foreground.channels
        for _ in range(SWEEPS):
            before = list(chosen)
            for k in range(len(chosen)):
                options = [[*chosen[:k], candidate, *chosen[k + 1 :]] for candidate in reversed(CANDIDATES)]
                chosen = options[int(np.argmax([self.dice(option).mean() for option in options]))]
            if chosen == before:
                break
        return chosen

    def _mask(self, evidence: Tensor, prior: Tensor, thresholds: Sequence[float]) -> Tensor:
        logits = self.decide(evidence, prior, torch.tensor(thresholds).logit())
        return self.foreground.decide(logits)[0] > 0
