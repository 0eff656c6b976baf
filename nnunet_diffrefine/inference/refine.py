"""Refine the doubtful region of a volume whose prior is given: one state for all windows, samples and folds averaged.

Preprocessed geometry throughout; :mod:`nnunet_diffrefine.inference.geometry` leads there and back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from nnunet_diffrefine.calibration.scaling import Scaling
from nnunet_diffrefine.errors.probability import error_of
from nnunet_diffrefine.inference.maps import Spread, error_probability
from nnunet_diffrefine.inference.windows import Window, WindowedDenoiser, hull, shifted, windows_over
from nnunet_diffrefine.methods.composition import ComposedMethod
from nnunet_diffrefine.networks.precision import mixed_precision
from nnunet_diffrefine.networks.refinement import RefinementNetwork, mirrored_mean

CACHE_SHARE = 0.25
"""Share of the free memory of a GPU that features of the condition may take for all steps."""
CACHE_ELSEWHERE = 2 * 1024**3
UNCHANGED = 1e-4
"""Changes of probability below this are rounding; the prior is kept, bit by bit."""

Layout = Callable[[Tensor, Tensor, Sequence[int]], list[Window]]


@dataclass(frozen=True)
class RefineOptions:
    """How volumes are refined.

    Attributes:
        device: of the network.
        on_device: keep volumes and state there as well; otherwise on the CPU.
        error_map: compute :attr:`Refined.error`.
        uncertainty: compute :attr:`Refined.spread`.
        probabilities: compute :attr:`Refined.probabilities`.
        scaling: calibration of the error; None for the refiner's own.
        dice_scaling: calibration of the probabilities; None for the refiner's own.
        layout: region, foreground seen (both bool (D, H, W)) and patch -> windows.
    """

    device: torch.device
    on_device: bool = True
    error_map: bool = False
    uncertainty: bool = False
    probabilities: bool = False
    scaling: Scaling | None = None
    dice_scaling: Scaling | None = None
    layout: Layout = windows_over


@dataclass(frozen=True)
class Refined:
    """A refined volume; all tensors on the CPU.

    Attributes:
        logits: nnU-Net's logits (H, D, H, W), through the gate; outside of the region exactly those of the prior.
        changed: voxels that differ from the prior, bool (D, H, W).
        windows: how many windows were visited.
        error: probability that the prior's decision is wrong, (D, H, W), or None.
        spread: standard deviation over samples and folds, (D, H, W), or None.
        probabilities: how likely each class is the true one, (R, D, H, W), or None: the refiner's, whatever the gate
            says, or calibrated by ``dice_scaling``; the prior's where nothing was refined.
    """

    logits: Tensor
    changed: Tensor
    windows: int
    error: Tensor | None = None
    spread: Tensor | None = None
    probabilities: Tensor | None = None

    def cut(self, padding: Sequence[int], shape: Sequence[int]) -> Refined:
        """Without the padding around a volume of ``shape``."""
        inside: Any = tuple(slice(start, start + n) for start, n in zip(padding[-2::-2], shape, strict=True))
        tensors: Any = {key: value for key, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **{key: value[(..., *inside)] for key, value in tensors.items()})


@torch.inference_mode()
def refine_volume(
    folds: Iterable[RefinementNetwork],
    image: Tensor,
    prior: Tensor,
    region: Tensor,
    patch: Sequence[int],
    options: RefineOptions,
    passed: Callable[[], None] = lambda: None,
) -> Refined:
    """Refine a volume.

    Args:
        folds: one network a fold, its denoiser on ``options.device``; taken one at a time.
        image: (C, D, H, W), normalised.
        prior: foreground probabilities (R, D, H, W) in [0, 1].
        region: bool (D, H, W), voxels that may change.
        patch: size of a window.
        options: see there.
        passed: called after every pass of the denoiser.

    Raises:
        ValueError: there is no network.
    """
    iterator = iter(folds)
    network = next(iterator, None)
    if network is None:
        raise ValueError("There is no fold to refine with.")
    shape, padding = prior.shape[1:], _padding(prior.shape[1:], patch)
    image, prior, region = (torch.nn.functional.pad(x, padding) for x in (image, prior, region))
    base = _unrefined(network, prior, options)
    windows = options.layout(region, prior.amax(0) >= network.sampling.min_foreground, patch)
    if windows:
        box = hull(windows)
        back = [-s.start for s in box]
        work = _Folds([shifted(window, back) for window in windows], options, passed)
        where = options.device if options.on_device else torch.device("cpu")
        inputs = [x[(..., *box)][None].to(where) for x in (image, prior)]
        while network is not None:
            work.add(network, *inputs)
            network = next(iterator, None)
        base = work.put_into(base, box, region[box])
    return base.cut(padding, shape)


def _padding(shape: Sequence[int], patch: Sequence[int]) -> list[int]:
    """What ``torch.nn.functional.pad`` adds around a volume smaller than a patch, as nnU-Net does."""
    missing = [max(p - n, 0) for n, p in zip(shape, patch, strict=True)]
    return [part for m in reversed(missing) for part in (m // 2, m - m // 2)]


def _unrefined(network: RefinementNetwork, prior: Tensor, options: RefineOptions) -> Refined:
    logits = network.foreground.logits(prior[None])
    none = torch.zeros(prior.shape[1:])
    error = error_probability(logits, None, prior[None], network.foreground)[0] if options.error_map else None
    p = prior.clone() if options.probabilities else None
    return Refined(logits[0], none > 0, 0, error, none if options.uncertainty else None, p)


class _Folds:
    """Sums over folds, in the box around the windows."""

    def __init__(self, windows: list[Window], options: RefineOptions, passed: Callable[[], None]) -> None:
        self.windows, self.options, self.passed = windows, options, passed
        self.folds = 0
        self.logits: Any = 0.0
        self.error: Any = 0.0
        self.spread = Spread()
        self.foreground: Any = None
        self.gate: Any = None

    def add(self, network: RefinementNetwork, image: Tensor, prior: Tensor) -> None:
        """Sample one fold."""
        method = cast(ComposedMethod, network.method)
        self.foreground, self.gate, self.folds = network.foreground, network.gate, self.folds + 1
        evidence = self._evidence(network, method, image, prior)
        logits = network.decided(evidence[:1], prior)
        self.logits = self.logits + logits
        if self.options.error_map and self.options.scaling is None:
            errors = evidence[:1] if method.flips else None
            self.error = self.error + error_probability(logits, errors, prior, self.foreground)
        for one in evidence[1:].split(1) if len(evidence) > 1 else ():
            self.spread.add(self.foreground.probabilities(network.decided(one, prior)))

    def _evidence(self, network: RefinementNetwork, method: ComposedMethod, image: Tensor, prior: Tensor) -> Tensor:
        """Evidence (1, ., *S) of all samples and, for the uncertainty, behind it of every single one."""
        generator = torch.Generator(device=image.device).manual_seed(network.sampling.seed)
        cache = cache_size(self.options.device) if method.seeds * network.sampling.steps > 1 else 0

        def of_copy(image: Tensor, prior: Tensor, corners: Tensor) -> Tensor:
            windows = [mirrored(window, corners, image.shape[2:]) for window in self.windows]
            denoiser = WindowedDenoiser(network.denoiser, windows, self.options.device, cache, self.passed)
            with mixed_precision(self.options.device):
                runs = method.runs(denoiser, image, prior, generator)
            single = runs if self.options.uncertainty else []
            return torch.cat([method.evidence_of(part, prior).float() for part in (runs, *([run] for run in single))])

        copies = network.sampling.mirrored_copies
        return mirrored_mean(of_copy, network.refiner_axes, image, prior, CORNERS, copies=copies)

    def put_into(self, base: Refined, box: Window, region: Tensor) -> Refined:
        """The prior's own volume with the mean over the folds where region and windows are."""
        covered = torch.zeros_like(region)
        for window in self.windows:
            covered[window] = True
        taken, refined, prior = region & covered, (self.logits / self.folds).cpu(), base.logits[(..., *box)][None]
        self._put_estimates(base, box, taken, refined, prior)
        logits = self.gate(refined, prior)
        p, before = (self.foreground.probabilities(x)[0] for x in (logits, prior))
        changed = taken & ((p - before).abs().amax(0) >= UNCHANGED)
        _put(base.logits, box, logits[0], changed)
        _put(base.changed, box, changed, changed)
        if base.spread is not None:
            _put(base.spread, box, self.spread.deviation()[0].cpu(), taken)
        return replace(base, windows=len(self.windows))

    def _put_estimates(self, base: Refined, box: Window, taken: Tensor, refined: Tensor, prior: Tensor) -> None:
        """Probabilities and error where windows are, of refined and prior logits (1, H, *S); the gate plays no part."""
        foreground, options = self.foreground, self.options
        if base.probabilities is not None:
            scaling = options.dice_scaling
            p = scaling(refined, prior, foreground) if scaling else foreground.probabilities(refined)
            _put(base.probabilities, box, p[0], taken)
        if base.error is not None:
            error = self.error / self.folds
            if options.scaling is not None:
                p = options.scaling(refined, prior, foreground)
                error = error_of(p, foreground.probabilities(prior), foreground)
            _put(base.error, box, error[0].cpu(), taken)


def _put(volume: Tensor, box: Window, values: Tensor, where: Tensor) -> None:
    part = volume[(..., *box)]
    part[...] = torch.where(where, values, part)


CORNERS = torch.arange(8).view(1, 1, 2, 2, 2)
"""Mirrored with a volume, its first value tells the axes: their binary digits."""


def mirrored(window: Window, corners: Tensor, shape: Sequence[int]) -> Window:
    """A window in the mirrored copy of a volume of ``shape`` with which :data:`CORNERS` became ``corners``."""
    first = int(corners.flatten()[0])
    flips = [bool(first & 4), bool(first & 2), bool(first & 1)]
    return tuple(  # type: ignore[return-value]
        slice(n - s.stop, n - s.start) if flip else s for s, n, flip in zip(window, shape, flips, strict=True)
    )


def cache_size(device: torch.device) -> int:
    """Bytes that features of the condition may take for all steps."""
    return int(CACHE_SHARE * torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else CACHE_ELSEWHERE
