"""The reverse loop. It owns time and the generator; the process owns the mathematics, the caller the network."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from nnunet_diffrefine.diffusion.process import Process


def timestep_sequence(timesteps: int, steps: int) -> list[int]:
    """Times a sampler visits: evenly spread, T first, strictly falling, 0 last.

    Args:
        timesteps: T.
        steps: network evaluations, 1..T; T visits every time.

    Returns:
        ``steps + 1`` times.

    Raises:
        ValueError: ``steps`` is outside 1..T.
    """
    if not 1 <= steps <= timesteps:
        raise ValueError(f"steps is {steps}; it must be in 1..{timesteps} (timesteps). Change sampling.steps.")
    return [timesteps * k // steps for k in range(steps, -1, -1)]


def sample(
    process: Process,
    predict_x0: Callable[[Tensor, Tensor], Tensor],
    prior: Tensor,
    steps: int,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw x_0 given the prior.

    Args:
        process: forward process and its reversal.
        predict_x0: network, maps x_t (B, R, *S) and t (B,) integers on the same device to x_0 (B, R, *S).
        prior: (B, R, *S) in [0, 1].
        steps: network evaluations, 1..T.
        generator: on the device of ``prior``; the same seed gives the same bytes.

    Returns:
        The last predicted x_0, (B, R, *S).

    Raises:
        ValueError: ``steps`` is outside 1..T.
    """
    times = [torch.full(prior.shape[:1], t, device=prior.device) for t in timestep_sequence(process.timesteps, steps)]
    x_t = process.start(prior, generator)
    for t, s in pairwise(times):
        x_t = process.reverse(x_t, predict_x0(x_t, t), prior, t, s, generator)
    return x_t
