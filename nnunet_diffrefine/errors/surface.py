"""A loss on the surface of the corrected mask: every wrong voxel counts by its distance to the reference's surface.

Kervadec's boundary loss integrates phi s, the signed distance of the reference times the prediction. Less its value for
s = reference (a constant) it is the integral of |phi| |s - reference|: zero for a perfect mask and never negative. For
hard masks, twice the integral is the squared displacement of the surface, integrated over the surface.

Two departures. The integral E is set against the reference's surface area A, as in Dice: the paper's mean over voxels
would make its weight depend on how much of a patch is foreground. A surface displaced by d costs d^2 / (d^2 + cap^2).
Distances are capped: a few shifted minima per axis then give them exactly, on the reference's device, no distance map
has to be loaded or augmented, and a far false alarm does not outweigh the surface.

Chosen over a soft surface Dice of pooled boundaries (Bokhovkin and Burnaev), which asks for the surface itself: it does
not say which way to go where surfaces lie further apart than its tolerance, and an evenly unsure prediction has no
surface. Price: voxels next to the surface weigh least, so small errors count less than in a loss of overlap. It goes
beside nnU-Net's loss, not in its place.

References:
    Kervadec et al. 2019, Boundary loss for highly unbalanced segmentation, https://arxiv.org/abs/1812.07032.
    Felzenszwalb and Huttenlocher 2012, Distance transforms of sampled functions: separable squared distances.
    Bokhovkin and Burnaev 2019, https://arxiv.org/abs/1905.07852: the alternative not taken.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nnunet_diffrefine.batch import Foreground


def surface_loss(
    logits: Tensor,
    reference: Tensor,
    valid: Tensor,
    foreground: Foreground,
    *,
    cap: float = 5.0,
    spacing: Sequence[float] | None = None,
) -> Tensor:
    """E / (E + A cap^2 / 2) over all valid voxels and foreground channels of the batch; scalar in [0, 1].

    E is the sum of distance x |probability - reference|, A the area of the reference's surface, at least that of one
    voxel, which keeps it finite where there is no surface. float32 under autocast.

    Args:
        logits: (B, H, *S), at full resolution; with deep supervision, the finest output only.
        reference: {0, 1}, (B, R, *S).
        valid: {0, 1}, (B, 1, *S); voxels at 0 neither count nor bear a surface.
        foreground: meaning of the channels.
        cap: distance beyond which errors count the same, in voxels, or in the unit of ``spacing``; above 0.
        spacing: edge lengths of a voxel, in the order of S; all 1 by default.

    Raises:
        ValueError: shapes that do not fit, or a ``cap`` or ``spacing`` that is not positive.
    """
    wanted = (reference.shape[0], foreground.heads, *reference.shape[2:])
    if logits.shape != wanted:
        raise ValueError(
            f"logits has shape {tuple(logits.shape)}, wanted {wanted} for a reference of shape "
            f"{tuple(reference.shape)}; give the finest output of deep supervision."
        )
    probabilities = foreground.probabilities(logits)
    error = torch.where(reference > 0, 1 - probabilities, probabilities)
    edges = _checked(reference, cap, spacing)
    integral = (surface_distance(reference, valid, cap=cap, spacing=edges) * error * valid.float()).sum()
    return integral / (integral + _area(reference, valid, edges) * cap**2 / 2)


@torch.no_grad()
def surface_distance(reference: Tensor, valid: Tensor, *, cap: float, spacing: Sequence[float] | None = None) -> Tensor:
    """Euclidean distance of every voxel's centre to the reference's surface, at most ``cap``; (B, R, *S) float32.

    The surface is made of the voxel faces between foreground and background, so a voxel at it is half an edge away. The
    borders of the patch and of the valid voxels are none; without any surface all distances are ``cap``.

    Args and errors as for :func:`surface_loss`.
    """
    inside = reference > 0
    seeds = torch.stack((inside, ~inside)) & (valid > 0)
    squared = torch.zeros(seeds.shape, device=seeds.device).masked_fill_(~seeds, cap**2)
    for axis, edge in enumerate(_checked(reference, cap, spacing), start=3):
        squared = _nearest_along(squared, axis, edge, cap)
    to_foreground, to_background = squared.sqrt_()
    return torch.where(inside, to_background, to_foreground)


def _nearest_along(squared: Tensor, axis: int, edge: float, cap: float) -> Tensor:
    """Smallest squared distance along an axis: of the voxel itself, and of each other plus that to its nearest face."""
    nearest = squared.clone()
    size = squared.shape[axis]
    for shift in range(1, min(size - 1, int(cap / edge + 0.5)) + 1):
        step, length = ((shift - 0.5) * edge) ** 2, size - shift
        further = squared + step
        for start, other in ((0, shift), (shift, 0)):
            part = nearest.narrow(axis, start, length)
            torch.minimum(part, further.narrow(axis, other, length), out=part)
    return nearest


def _area(reference: Tensor, valid: Tensor, edges: list[float]) -> Tensor:
    """Area of the surface in volumes of a voxel (faces / edge, by axis), at least that of one voxel; scalar."""
    inside, seen = reference > 0, valid > 0
    area = torch.zeros((), device=reference.device)
    for axis, edge in enumerate(edges, start=2):
        length = reference.shape[axis] - 1
        faces = inside.narrow(axis, 0, length) ^ inside.narrow(axis, 1, length)
        area += (faces & seen.narrow(axis, 0, length) & seen.narrow(axis, 1, length)).sum() / edge
    return area.clamp(min=sum(2 / edge for edge in edges))


def _checked(reference: Tensor, cap: float, spacing: Sequence[float] | None) -> list[float]:
    """Edge lengths of a voxel, checked, and so is ``cap``."""
    edges = [1.0] * (reference.ndim - 2) if spacing is None else [float(edge) for edge in spacing]
    if len(edges) != reference.ndim - 2 or not all(edge > 0 for edge in edges):
        raise ValueError(f"spacing is {spacing}; wanted {reference.ndim - 2} positive numbers, one per axis.")
    if not 0 < cap < float("inf"):
        raise ValueError(f"cap is {cap}; it must be a positive, finite distance.")
    return edges
