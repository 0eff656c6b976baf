"""Prior augmentation: errors of stage one that its out-of-fold predictions hold too few of, made on the fly.

Three kinds, drawn for each element of the batch by itself, in this order: a connected component goes missing, the
foreground is too large or too small, and the prior is dropped, so that the refiner has to segment from the image alone.
Values stay in [0, 1], exclusive classes sum to at most 1, and regions stay nested.
"""

from __future__ import annotations

import torch
from scipy import ndimage
from torch import Tensor

from nnunet_diffrefine.batch import Foreground

SKIRT = 8
"""Width, in voxels, up to which the unsure voxels around a component go with it."""


def augment_prior(
    prior: Tensor,
    foreground: Foreground,
    generator: torch.Generator,
    *,
    morphology: float = 0.0,
    radius: float = 1.0,
    removal: float = 0.0,
    dropping: float = 0.0,
) -> Tensor:
    """The prior with errors made at random, (B, R, *S), of the same type and on the same device.

    Without any (all three probabilities at 0) the very tensor given, and nothing is drawn; otherwise a new one, and the
    number of draws depends on B alone.

    Args:
        prior: probabilities in [0, 1], (B, R, *S); not changed.
        foreground: meaning of the channels.
        generator: source of the draws.
        morphology: probability, per element, that :func:`resize` grows or shrinks it, equally likely, by 1 to
            ``radius`` voxels.
        radius: a whole number of voxels, at least 1.
        removal: probability, per element, that :func:`remove_component` takes one component from it.
        dropping: probability, per element, that its prior is set to 0. Of several exclusive classes, in half of the
            cases one class only; never one region only, because others may be nested in it.

    Raises:
        ValueError: a probability outside [0, 1], or an impossible ``radius``.
    """
    _check(morphology=morphology, removal=removal, dropping=dropping, radius=radius)
    if morphology == removal == dropping == 0:
        return prior
    draws = torch.rand(len(prior), 7, generator=generator, device=generator.device).tolist()
    result = prior.clone()
    for element, (morphs, size, grows, removes, component, drops, scope) in zip(result.split(1), draws, strict=True):
        if removes < removal:
            element.copy_(remove_component(element, foreground, component))
        if morphs < morphology:
            voxels = 1 + int(size * radius)
            element.copy_(resize(element, foreground, voxels if grows < 0.5 else -voxels))
        if drops < dropping:
            _dropped(element, foreground, scope).zero_()
    return result


def resize(prior: Tensor, foreground: Foreground, voxels: int) -> Tensor:
    """Foreground grown by so many voxels, or shrunk if negative: grey-scale dilation and erosion, (B, R, *S).

    Regions: every channel, which keeps them nested. Exclusive classes: their sum, so that they trade with the
    background and their common borders stay; what is new is shared out in proportion to the classes within reach. The
    border of the patch moves nothing.
    """
    if not foreground.exclusive:
        return _dilate(prior, voxels) if voxels >= 0 else -_dilate(-prior, -voxels)
    total = prior.sum(1, keepdim=True)
    if voxels < 0:
        result = prior * _ratio(-_dilate(-total, -voxels), total)
    else:
        reach = _dilate(prior, voxels)
        result = prior + (_dilate(total, voxels) - total) * _ratio(reach, reach.sum(1, keepdim=True))
    return result / result.sum(1, keepdim=True).clamp(min=1)  # 8-bit priors may sum to a little more


def remove_component(prior: Tensor, foreground: Foreground, choice: float) -> Tensor:
    """One connected component (above 0.5, corners touch) set to 0, with the unsure voxels around it; (1, R, *S).

    Their probability goes to the background. Exclusive classes: a component of one class, of all of them. Regions: of
    their union, in all channels, which keeps them nested. Components are labelled on the CPU, from the hard mask alone.

    Args:
        prior: a single element, (1, R, *S).
        foreground: meaning of the channels.
        choice: in [0, 1); all components are equally likely if it is uniform.
    """
    values = prior if foreground.exclusive else prior.amax(1, keepdim=True)
    hard = values > 0.5
    connected = ndimage.generate_binary_structure(prior.ndim - 2, prior.ndim - 2)
    labelled = [ndimage.label(channel, connected) for channel in hard[0].cpu().numpy()]
    index = int(choice * sum(count for _, count in labelled))
    for channel, (labels, count) in enumerate(labelled):
        if index < count:
            chosen = torch.from_numpy(labels == index + 1).to(prior.device)[None, None]
            support, others = values[:, channel : channel + 1] > 0, hard[:, channel : channel + 1] & ~chosen
            gone = torch.zeros_like(hard)
            gone[:, channel : channel + 1] = _with_skirt(chosen, others, support)
            return prior.masked_fill(gone, 0)
        index -= count
    return prior


def _with_skirt(chosen: Tensor, others: Tensor, support: Tensor) -> Tensor:
    """``chosen`` and the support around it that is not as near to ``others``: a ring left behind would give it away."""
    for _ in range(SKIRT):
        grown, rival = _dilate(chosen, 1) & support, _dilate(others, 1)
        chosen, others = chosen | (grown & ~rival & ~others), others | (rival & ~chosen)
    return chosen


def _dropped(element: Tensor, foreground: Foreground, scope: float) -> Tensor:
    """The part of an element (1, R, *S) to be dropped: everything, or a class; ``scope`` in [0, 1)."""
    if not foreground.exclusive or foreground.channels == 1 or scope < 0.5:
        return element
    return element[:, int((2 * scope - 1) * foreground.channels)]


def _dilate(x: Tensor, voxels: int) -> Tensor:
    """Largest value nearby: one voxel along an axis, then one along every axis, and so on, which stays near a ball."""
    for step in range(voxels):
        grown = x.clone()
        for axis in range(2, x.ndim):
            source = grown.clone() if step % 2 else x
            length = x.shape[axis] - 1
            for start, other in ((0, 1), (1, 0)):
                part = grown.narrow(axis, start, length)
                torch.maximum(part, source.narrow(axis, other, length), out=part)
        x = grown
    return x


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    """``part / whole``, 0 where ``whole`` is."""
    return torch.where(whole > 0, part / whole, 0)


def _check(*, radius: float, **probabilities: float) -> None:
    for name, value in probabilities.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{name} is {value}; it is a probability, from 0 to 1.")
    if radius < 1 or radius % 1:
        raise ValueError(f"radius is {radius}; it must be a whole number of voxels, at least 1.")
