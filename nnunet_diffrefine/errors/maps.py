"""The error between a prior and the reference, in three forms, each with the way back.

Wherever ``valid`` is 1, applying the error of a prior to that prior gives back the reference, exactly. Where it is 0
(ignore label) there is no error, and applying it keeps the prior. Shapes are those of
:mod:`nnunet_diffrefine.batch`: foreground channels (B, R, *S), ``valid`` (B, 1, *S) in {0, 1}.

Channels are corrected one by one, which can take a region out of the one it has to lie in (BraTS: enhancing tumour in
tumour core in whole tumour). A nesting is a tuple ``parents``: for each region channel, in the dataset's own order, the
index of the region it must lie in, or None; :func:`enforce_nesting` restores it.

References:
    Yavari et al. 2025, DMCIE, https://arxiv.org/abs/2507.00983: the signed error.
    Ren et al. 2024, Re-DiffiNet, https://arxiv.org/abs/2402.07354: the absolute error.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

import torch
from torch import Tensor

Parents = tuple[int | None, ...]


class ThreeWay(IntEnum):
    """Class indices of the three-way error of a channel."""

    REMOVE = 0
    KEEP = 1
    ADD = 2


def signed_error(reference: Tensor, prior: Tensor, valid: Tensor) -> Tensor:
    """E = reference - prior in [-1, 1], (B, R, *S): above 0 where foreground is missing, below where there is too much.

    Departs from DMCIE, whose E (Eq. 1) has the opposite sign and yet is added to the prior (Eq. 14).

    Args:
        reference: {0, 1}, (B, R, *S).
        prior: [0, 1], soft or hard, (B, R, *S).
        valid: {0, 1}, (B, 1, *S).
    """
    return (reference - prior) * valid


def apply_signed(prior: Tensor, error: Tensor) -> Tensor:
    """Prior plus E, clamped to [0, 1], (B, R, *S); exact in float32 for true errors of any prior.

    A loss on the corrected mask wants ``prior + error`` itself: the clamp has no gradient outside [0, 1].
    """
    return (prior + error).clamp(0, 1)


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
    _require_hard("hard_prior", hard_prior)
    return (reference - hard_prior).abs() * valid


def apply_absolute(hard_prior: Tensor, error: Tensor) -> Tensor:
    """Exclusive or of ``hard_prior`` and ``error``, both {0, 1}, (B, R, *S).

    Channels flip one by one: classes may come to overlap, and regions to leave their parents.

    Raises:
        ValueError: an argument has values other than 0 and 1.
    """
    _require_hard("hard_prior", hard_prior)
    _require_hard("error", error)
    return (hard_prior - error).abs()


def three_way_error(reference: Tensor, hard_prior: Tensor, valid: Tensor) -> Tensor:
    """Class index of :class:`ThreeWay` per voxel and channel, (B, R, *S) int64; KEEP where not valid.

    Args:
        reference: {0, 1}, (B, R, *S).
        hard_prior: {0, 1}, (B, R, *S).
        valid: {0, 1}, (B, 1, *S).

    Raises:
        ValueError: ``hard_prior`` has values other than 0 and 1.
    """
    _require_hard("hard_prior", hard_prior)
    return signed_error(reference, hard_prior, valid).long() + ThreeWay.KEEP


def apply_three_way(hard_prior: Tensor, error: Tensor) -> Tensor:
    """0 where ``error`` says REMOVE, 1 where it says ADD, ``hard_prior`` elsewhere; (B, R, *S)."""
    return hard_prior.masked_fill(error == ThreeWay.REMOVE, 0).masked_fill(error == ThreeWay.ADD, 1)


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


def _require_hard(name: str, mask: Tensor) -> None:
    soft = mask[(mask != 0) & (mask != 1)]
    if soft.numel():
        raise ValueError(
            f"{name} has {soft.numel()} values other than 0 and 1, e.g. {soft[0].item():.4g}; it must be a hard mask. "
            "Decide probabilities first (Foreground.decide), or use signed_error, which takes soft priors."
        )


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
