"""What calibration keeps of a case: the voxels of its doubtful region, and sums over the rest.

The region holds all that a refiner can change, so every decision can be tried on these voxels without the network, as
often as wanted, one case in memory at a time.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nnunet_diffrefine.batch import Foreground

LEVELS = 255


@dataclass(frozen=True)
class CaseVoxels:
    """A case; N voxels are in its doubtful region and have a valid reference.

    Attributes:
        name: of the case.
        fold: that validates it.
        refined: refined logits (R, N), of exclusive classes relative to the background; half precision.
        prior: stage one's probabilities (R, N) in 255 levels, as they are stored.
        reference: bool, (R, N).
        outside: sums over the valid voxels outside of the region, (5, R): with m the prior's decision as it is
            exported, x_0 the reference and p the prior, those of m x_0, m, x_0, p and p m.
        outside_errors: number of valid voxels there at which the prior is wrong.
    """

    name: str
    fold: int
    refined: np.ndarray
    prior: np.ndarray
    reference: np.ndarray
    outside: np.ndarray
    outside_errors: int

    def logits(self, foreground: Foreground) -> tuple[Tensor, Tensor]:
        """Refined logits and stage one's, both (1, H, N)."""
        refined = torch.from_numpy(self.refined.astype(np.float32))[None]
        if foreground.exclusive:
            refined = torch.cat((torch.zeros_like(refined[:, :1]), refined), 1)
        prior = torch.from_numpy(self.prior.astype(np.float32) / np.float32(LEVELS))[None]
        return refined, foreground.logits(prior)

    @property
    def truth(self) -> Tensor:
        """Reference (1, R, N) in {0, 1}."""
        return torch.from_numpy(self.reference)[None].float()

    def sums(self, decided: Tensor) -> np.ndarray:
        """Sums of m x_0, m and x_0 over the whole case, (3, R), of a decision m (1, R, N) in {0, 1}."""
        inside = torch.stack(((decided * self.truth).sum((0, 2)), decided.sum((0, 2)), self.truth.sum((0, 2))))
        return inside.double().numpy() + self.outside[:3]

    def errors(self, foreground: Foreground) -> Tensor:
        """Where stage one's decision is wrong in any channel, bool (N,)."""
        hard = foreground.decide(self.logits(foreground)[1])
        return (hard != self.truth).any(1)[0]


def dice(sums: np.ndarray) -> np.ndarray:
    """Dice (R,) of sums (3, R) as :meth:`CaseVoxels.sums` gives them; 1 where both masks are empty.

    So every decision is judged on the same cases, and false alarms cost.
    """
    total = sums[1] + sums[2]
    return np.where(total > 0, 2 * sums[0] / np.maximum(total, 1), 1.0)


def gather(
    name: str,
    fold: int,
    foreground: Foreground,
    volumes: Mapping[str, Tensor],
) -> CaseVoxels:
    """Keep what calibration needs of a case.

    Args:
        name: of the case.
        fold: that validates it.
        foreground: meaning of the R channels.
        volumes: ``logits`` (H, D, H, W) refined, ``prior`` (R, D, H, W) in [0, 1], ``region`` bool (D, H, W),
            ``reference`` bool (R, D, H, W), ``valid`` bool (D, H, W).
    """
    logits, prior, region, reference, valid = (
        volumes[key] for key in ("logits", "prior", "region", "reference", "valid")
    )
    relative = logits[1:] - logits[:1] if foreground.exclusive else logits
    hard = foreground.decide(foreground.logits(prior[None]))[0] > 0
    inside, rest = region & valid, valid & ~region
    p, m, x0 = prior[:, rest].double(), foreground.exported(hard[None])[0][:, rest], reference[:, rest]
    outside = torch.stack(((m & x0).sum(1), m.sum(1), x0.sum(1), p.sum(1), (p * m).sum(1))).double()
    return CaseVoxels(
        name,
        fold,
        relative[:, inside].numpy().astype(np.float16),
        np.rint(prior[:, inside].numpy() * LEVELS).astype(np.uint8),
        reference[:, inside].numpy(),
        outside.numpy(),
        int((hard[:, rest] != x0).any(0).sum()),
    )


def save(case: CaseVoxels, made_from: Mapping[str, Any], file: Path) -> None:
    """Write a case atomically, with what it was made from (JSON)."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as stream:
            np.savez_compressed(stream, made_from=json.dumps(made_from, sort_keys=True), **vars(case))
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


def load(file: Path, made_from: Mapping[str, Any]) -> CaseVoxels | None:
    """Read a case; None where there is none, it is damaged, or it was made from something else."""
    try:
        with file.open("rb") as stream, np.load(stream, allow_pickle=False) as content:
            if str(content["made_from"]) != json.dumps(made_from, sort_keys=True):
                return None
            arrays = {key: content[key] for key in ("refined", "prior", "reference", "outside")}
            return CaseVoxels(
                str(content["name"]), int(content["fold"]), outside_errors=int(content["outside_errors"]), **arrays
            )
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
