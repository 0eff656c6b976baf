"""The error between a prior and the reference, signed or absolute.

Wherever ``valid`` is 1, prior + signed error and, of a hard prior, prior xor absolute error are the reference, exactly.
Where it is 0 (ignore label) there is no error. Shapes are those of :mod:`nnunet_diffrefine.batch`: foreground channels
(B, R, *S), ``valid`` (B, 1, *S) in {0, 1}. The way back from predicted errors is in
:mod:`nnunet_diffrefine.errors.targets`.

Channels are corrected one by one, which can take a region out of the one it has to lie in (BraTS: enhancing tumour in
tumour core in whole tumour). A nesting is a tuple ``parents``: for each region channel, in the dataset's own order, the
index of the region it must lie in, or None; :func:`enforce_nesting` restores it.

References:
    Yavari et al. 2025, DMCIE, https://arxiv.org/abs/2507.00983: the signed error.
    Ren et al. 2024, Re-DiffiNet, https://arxiv.org/abs/2402.07354: the absolute error.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Parents = tuple[int | None, ...]


def signed_error(reference: Tensor, prior: Tensor, valid: Tensor) -> Tensor:
    """E = reference - prior in [-1, 1], (B, R, *S): above 0 where foreground is missing, below where there is too much.

    Departs from DMCIE, whose E (Eq. 1) has the opposite sign and yet is added to the prior (Eq. 14).

    Args:
        reference: {0, 1}, (B, R, *S).
        prior: [0, 1], soft or hard, (B, R, *S).
        valid: {0, 1}, (B, 1, *S).
    """
    return (reference - prior) * valid


def absolute_error(reference: Tensor, hard_prior: Tensor, valid: Tensor) -> Tensor:
    """|reference - prior| in {0, 1}, (B, R, *S): the voxels to flip.

    Re-DiffiNet's Delta, which is defined on hard masks only.

    Args:
        reference: {0, 1}, (B, R, *S).
        hard_prior: {0, 1}, (B, R, *S).
        valid: {0, 1}, (B, 1, *S).

    Raises:
        ValueError: ``hard_prior`` has values other than 0 and 1.
    """
    soft = hard_prior[(hard_prior != 0) & (hard_prior != 1)]
    if soft.numel():
        raise ValueError(
            f"hard_prior has {soft.numel()} values other than 0 and 1, e.g. {soft[0].item():.4g}; it must be a hard "
            "mask. Decide probabilities first (Foreground.decide), or use signed_error, which takes soft priors."
        )
    return (reference - hard_prior).abs() * valid


def nesting_from_labels(regions: Sequence[int | Sequence[int]]) -> Parents:
    """Parent of each region: the smallest region whose labels strictly contain its own.

    A tree holds one parent a region: of several equally small ones the first is taken, and a region that lies in two
    of which neither contains the other is bound to one only.

    Args:
        regions: labels of each region in channel order, as in ``dataset.json``: a label or several.
    """
    sets = [frozenset((r,)) if isinstance(r, int) else frozenset(r) for r in regions]
    supersets = [[j for j, other in enumerate(sets) if labels < other] for labels in sets]
    return tuple(min(candidates, key=lambda j: len(sets[j]), default=None) for candidates in supersets)


def enforce_nesting(regions: Tensor, parents: Parents) -> Tensor:
    """Cut every region to its parent, and so to all its ancestors, (B, R, *S).

    The minimum over a region and its ancestors: AND for masks; for probabilities, the largest nested ones below them.

    Args:
        regions: masks or probabilities, (B, R, *S).
        parents: parent of each of the R channels.

    Raises:
        ValueError: ``parents`` does not fit the channels, or a region is its own ancestor.
    """
    ancestors = _checked(parents, regions.shape[1])
    while True:
        regions = torch.minimum(regions, regions[:, ancestors])
        # Each pass covers twice as many generations: the ancestor's ancestor, until all point at a root.
        further = [ancestors[a] for a in ancestors]
        if further == ancestors:
            return regions
        ancestors = further


def _checked(parents: Parents, channels: int) -> list[int]:
    """``parents`` with every root as its own parent, checked."""
    if len(parents) != channels:
        raise ValueError(f"parents has {len(parents)} entries, regions has {channels} channels; give one per channel.")
    for region, parent in enumerate(parents):
        if parent is not None and not 0 <= parent < channels:
            raise ValueError(f"parents[{region}] is {parent}; it must be None or a channel in 0..{channels - 1}.")
    for region in range(channels):
        _refuse_cycle(parents, region)
    return [region if parent is None else parent for region, parent in enumerate(parents)]


def _refuse_cycle(parents: Parents, region: int) -> None:
    ancestor: int | None = region
    for _ in parents:
        ancestor = None if ancestor is None else parents[ancestor]
    if ancestor is not None:
        raise ValueError(f"parents is {parents}; region {region} is its own ancestor. Name the outermost region None.")
