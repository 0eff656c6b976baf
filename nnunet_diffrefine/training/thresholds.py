"""Thresholds of a method's decision: those of the best final Dice on cases that no network trained on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

SWEEPS = 5

Decide = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class _Case:
    """The voxels of a case that the candidates disagree on, and sums over all others.

    Attributes:
        voxels: what is decided from, (1, K, N).
        reference: bool (R, N).
        overlap: voxels elsewhere in mask and reference, (R,).
        total: voxels elsewhere in the mask plus those in the reference, (R,).
    """

    voxels: Tensor
    reference: Tensor
    overlap: Tensor
    total: Tensor


class ThresholdChoice:
    """Thresholds judged by the Dice of the mask that a method decides on, conflicts of classes and nesting included.

    Args:
        decide: what a voxel is decided from, (1, K, N), and thresholds (R,) to the mask (1, R, N) in {0, 1}. Voxel by
            voxel and monotone: where the lowest and the highest candidates agree, all do.
        channels: R.
        candidates: thresholds, of equally good ones the preferred first.
        together: whether all channels share one.
    """

    def __init__(self, decide: Decide, channels: int, candidates: Sequence[float], *, together: bool = False) -> None:
        self.decide, self.channels, self.candidates = decide, channels, tuple(candidates)
        self.groups = [list(range(channels))] if together else [[k] for k in range(channels)]
        self.cases: list[_Case] = []

    def add(self, voxels: Tensor, reference: Tensor, valid: Tensor) -> None:
        """Take a case in.

        Args:
            voxels: what is decided from, (K, *S).
            reference: bool (R, *S).
            valid: bool (1, *S); False under the ignore label.
        """
        seen = valid[0]
        voxels, reference = voxels[:, seen][None], reference[:, seen]
        most, least = (self._mask(voxels, [f(self.candidates)] * self.channels) for f in (min, max))
        open_ = (most != least).any(0)
        mask, truth = least[:, ~open_], reference[:, ~open_]
        sums = (mask & truth).sum(1), mask.sum(1) + truth.sum(1)
        self.cases.append(_Case(voxels[:, :, open_], reference[:, open_], *sums))

    def dice(self, thresholds: Sequence[float]) -> np.ndarray:
        """Dice (R,) of the final masks, mean over the cases; both masks empty counts 1, so that false alarms cost."""
        rows = []
        for case in self.cases:
            mask = self._mask(case.voxels, thresholds)
            overlap = case.overlap + (mask & case.reference).sum(1)
            total = case.total + mask.sum(1) + case.reference.sum(1)
            rows.append(torch.where(total > 0, 2 * overlap.double() / total, 1.0).numpy())
        found: np.ndarray = np.mean(rows, 0)
        return found

    def best(self) -> list[float]:
        """The candidate of each channel with the best mean Dice over all, of equal ones the preferred.

        One channel at a time, from the preferred on, until none changes: a voxel can move from one class to another
        once the first may lose it, and a region is cut to those that contain it.
        """
        chosen = [self.candidates[0]] * self.channels
        for _ in range(SWEEPS):
            before = chosen
            for group in self.groups:
                options = [[c if k in group else t for k, t in enumerate(chosen)] for c in self.candidates]
                chosen = options[int(np.argmax([self.dice(option).mean() for option in options]))]
            if chosen == before:
                break
        return chosen

    def _mask(self, voxels: Tensor, thresholds: Sequence[float]) -> Tensor:
        return self.decide(voxels, torch.tensor(thresholds))[0] > 0
