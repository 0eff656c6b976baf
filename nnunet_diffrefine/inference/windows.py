"""Windows over a volume: where they lie, and a denoiser of the whole volume that is made of them.

The denoiser's outputs in the windows are blended with nnU-Net's Gaussian weights at every step, so a sampler that is
given :class:`WindowedDenoiser` has one state for the whole volume, draws noise over the whole volume, and leaves no
seams between windows. Outputs (logits or noise) are blended, as nnU-Net blends logits: in one step this is nnU-Net's
own sliding window.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import torch
from nnunetv2.inference.sliding_window_prediction import compute_gaussian, compute_steps_for_sliding_window
from torch import Tensor

from nnunet_diffrefine.methods.base import finest

Window = tuple[slice, slice, slice]
Features = list[Tensor]
STEP = 0.5
"""Of the windows, as a share of the patch; nnU-Net's default."""


def all_windows(shape: Sequence[int], patch: Sequence[int]) -> list[Window]:
    """nnU-Net's windows over a volume of ``shape`` (D, H, W), which is at least as large as ``patch``."""
    steps = compute_steps_for_sliding_window(tuple(shape), tuple(patch), STEP)
    starts = product(*steps)
    return [tuple(slice(a, a + n) for a, n in zip(start, patch, strict=True)) for start in starts]  # type: ignore[misc]


def windows_over(region: Tensor, seen: Tensor, patch: Sequence[int]) -> list[Window]:
    """nnU-Net's windows over the box around a region, less those without any of the region.

    Args:
        region: bool (D, H, W); what is to be refined.
        seen: bool (D, H, W), voxels with any foreground; windows without one are left out, as
            :class:`RefinementNetwork` leaves them out.
        patch: size of a window, at most that of the volume.
    """
    if not region.any():
        return []
    low, size = zip(*(_extent(region, axis, patch[axis]) for axis in range(3)), strict=True)
    windows = [shifted(window, low) for window in all_windows(size, patch)]
    return [window for window in windows if region[window].any() and seen[window].any()]


def _extent(region: Tensor, axis: int, patch: int) -> tuple[int, int]:
    """Start and length, at least a patch, of what a region covers along an axis."""
    others = [a for a in range(region.ndim) if a != axis]
    hit = torch.nonzero(region.any(others[1]).any(others[0])).flatten()
    low, high, length = int(hit[0]), int(hit[-1]) + 1, region.shape[axis]
    missing = max(patch - (high - low), 0)
    low = min(max(low - missing // 2, 0), length - max(high - low, patch))
    return low, max(high - low, patch)


def hull(windows: Sequence[Window]) -> Window:
    """The smallest box that holds all windows."""
    return tuple(  # type: ignore[return-value]
        slice(min(w[axis].start for w in windows), max(w[axis].stop for w in windows)) for axis in range(3)
    )


def shifted(window: Window, by: Sequence[int]) -> Window:
    """A window moved by voxels along each axis."""
    return tuple(slice(w.start + b, w.stop + b) for w, b in zip(window, by, strict=True))  # type: ignore[return-value]


class WindowedDenoiser:
    """A denoiser of whole volumes, made of one of windows; what a method's sampler takes for its denoiser.

    Args:
        denoiser: network of input (1, C_in, *P), times (1,) and, maybe, features of the condition.
        windows: of equal size P; voxels in none of them get an output of 0.
        device: where the network is; volumes may lie elsewhere.
        cache: bytes of features of the condition that may be kept for all steps; more are computed anew at each.
        passed: called after every pass of the network.
    """

    def __init__(
        self,
        denoiser: Any,  # noqa: ANN401 (a network, or a function of its arguments)
        windows: Sequence[Window],
        device: torch.device,
        cache: int = 0,
        passed: Callable[[], None] = lambda: None,
    ) -> None:
        self.denoiser = denoiser
        self.windows = windows
        self.device = device
        self.cache = cache
        self.passed = passed
        self.patch = tuple(s.stop - s.start for s in windows[0])

    def __call__(self, x: Tensor, t: Tensor, features: list[Features] | None = None) -> Tensor:
        """Output (1, C_out, *S) for an input volume (1, C_in, *S) at times (1,)."""
        weight = gaussian(self.patch, x.device)
        total, weights = None, x.new_zeros(x.shape[2:])
        t = t.to(self.device)
        for i, window in enumerate(self.windows):
            known = () if features is None else (features[i],)
            output = finest(self.denoiser(self._part(x, window), t, *known)).to(x.device, torch.float32)
            if total is None:
                total = x.new_zeros((*output.shape[:2], *x.shape[2:]))
            total[(..., *window)] += weight * output
            weights[window] += weight
            self.passed()
        if total is None:
            raise ValueError("There are no windows.")
        return total / torch.where(weights > 0, weights, 1)

    def condition_features(self, condition: Tensor) -> list[Features] | None:
        """Features of the condition (1, C_cond, *S) in each window; None where there are none, or not enough memory."""
        compute = getattr(self.denoiser, "condition_features", None)
        if compute is None or not self.cache:
            return None
        kept: list[Features] = []
        for window in self.windows:
            features = compute(self._part(condition, window))
            if features is None or len(self.windows) * sum(f.nbytes for f in features) > self.cache:
                return None
            kept.append(features)
        return kept

    def _part(self, x: Tensor, window: Window) -> Tensor:
        return x[(..., *window)].to(self.device).contiguous()


def gaussian(patch: Sequence[int], device: torch.device) -> Tensor:
    """nnU-Net's weights of a window (*P), above 0, in single precision."""
    weight: Tensor = compute_gaussian(
        tuple(patch), sigma_scale=1 / 8, value_scaling_factor=10, dtype=torch.float32, device=device
    )
    return weight
