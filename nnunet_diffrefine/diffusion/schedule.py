"""How fast each process forgets the clean variable: one float64 table of T + 1 values, t = 0..T.

Bridge: a_t, the weight of x_0 in ``prior + a_t (x_0 - prior)``; a_0 = 1 and a_T = 0 exactly.
Gaussian: alpha_bar_t = prod_{i <= t} (1 - beta_i), the share of the signal's variance; alpha_bar_0 = 1 and
alpha_bar_T is small, never 0. Many codes count from 0: their ``alphas_cumprod[i]`` is alpha_bar_{i + 1} here.

References:
    Ho et al. 2020, Denoising Diffusion Probabilistic Models, https://arxiv.org/abs/2006.11239
    Nichol & Dhariwal 2021, Improved DDPM, https://arxiv.org/abs/2102.09672
    Delbracio & Milanfar 2023, Inversion by Direct Iteration, https://arxiv.org/abs/2303.11435
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

Schedule = Literal["linear", "cosine"]

MAX_BETA = 0.999
COSINE_OFFSET = 0.008


def bridge_schedule(timesteps: int, schedule: Schedule) -> Tensor:
    """Weights a_t of the clean variable in the bridge, strictly falling from 1 to 0.

    ``linear``: a_t = 1 - t/T, the straight path of Delbracio & Milanfar 2023.
    ``cosine``: a_t = cos^2(pi t / 2T), f(t) of Nichol & Dhariwal 2021, Eq. 17, with offset 0, so that it ends at 0.

    Args:
        timesteps: T, at least 1.
        schedule: ``linear`` or ``cosine``.

    Returns:
        a_t, (T + 1,) float64.

    Raises:
        ValueError: T is below 1, or the schedule is unknown.
    """
    a = _choose(schedule, {"linear": _bridge_linear, "cosine": _bridge_cosine})(_times(timesteps) / timesteps)
    a[-1] = 0.0  # cos(pi / 2) is 6e-17 in floating point; the bridge has to end at the prior exactly
    return a


def gaussian_schedule(timesteps: int, schedule: Schedule) -> Tensor:
    """Signal shares alpha_bar_t of the Gaussian process, strictly falling from 1.

    ``linear``: beta from 1e-4 to 0.02 (Ho et al. 2020, section 4, T = 1000), both times 1000/T, which keeps the sum of
    the betas and so alpha_bar_T about the same for every T (guided-diffusion's convention; MONAI leaves the betas as
    they are, so that few timesteps would end far from noise). Where that exceeds 0.999 (T < 21) it is clipped.
    ``cosine``: Nichol & Dhariwal 2021, Eq. 17, s = 0.008, betas clipped at 0.999.

    Args:
        timesteps: T, at least 1.
        schedule: ``linear`` or ``cosine``.

    Returns:
        alpha_bar_t, (T + 1,) float64.

    Raises:
        ValueError: T is below 1, or the schedule is unknown.
    """
    betas = _choose(schedule, {"linear": _linear_betas, "cosine": _cosine_betas})(_times(timesteps))
    return torch.cat((betas.new_ones(1), torch.cumprod(1 - betas.clamp(max=MAX_BETA), 0)))


def _times(timesteps: int) -> Tensor:
    if timesteps < 1:
        raise ValueError(f"timesteps is {timesteps}; a process needs at least 1. Raise process.timesteps.")
    return torch.arange(timesteps + 1, dtype=torch.float64)


def _choose(schedule: str, known: dict[str, Callable[[Tensor], Tensor]]) -> Callable[[Tensor], Tensor]:
    if schedule not in known:
        raise ValueError(f"schedule is {schedule!r}; it must be one of {', '.join(known)}.")
    return known[schedule]


def _bridge_linear(u: Tensor) -> Tensor:
    return 1 - u


def _bridge_cosine(u: Tensor) -> Tensor:
    return torch.cos(u * math.pi / 2) ** 2


def _linear_betas(t: Tensor) -> Tensor:
    timesteps = len(t) - 1
    scale = 1000 / timesteps
    # Built from its end, so that the only beta of T = 1 is the large one and x_1 is noise.
    return torch.linspace(scale * 0.02, scale * 1e-4, timesteps, dtype=torch.float64).flip(0)


def _cosine_betas(t: Tensor) -> Tensor:
    f = torch.cos((t / t[-1] + COSINE_OFFSET) / (1 + COSINE_OFFSET) * math.pi / 2) ** 2
    return 1 - f[1:] / f[:-1]
