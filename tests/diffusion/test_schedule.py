"""Schedules: end points, monotony, and their formulas computed a second way."""

import math
from collections.abc import Callable

import pytest
import torch

from nnunet_diffrefine.diffusion.schedule import bridge_schedule, gaussian_schedule

NAMES = ["linear", "cosine"]
TIMESTEPS = [1, 2, 10, 20, 21, 1000]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("timesteps", TIMESTEPS)
def test_bridge_falls_from_exactly_one_to_exactly_zero(name: str, timesteps: int) -> None:
    a = bridge_schedule(timesteps, name)
    assert a.dtype == torch.float64
    assert a.shape == (timesteps + 1,)
    assert a[0] == 1
    assert a[-1] == 0
    assert (a.diff() < 0).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("timesteps", TIMESTEPS)
def test_gaussian_signal_to_noise_ratio_falls_strictly_and_ends_in_noise(name: str, timesteps: int) -> None:
    alpha_bar = gaussian_schedule(timesteps, name)
    assert alpha_bar.dtype == torch.float64
    assert alpha_bar.shape == (timesteps + 1,)
    assert alpha_bar[0] == 1
    snr = alpha_bar / (1 - alpha_bar)
    assert (snr.diff() < 0).all()
    assert 0 < snr[-1] <= 1.1e-3  # a standard normal start is close to the marginal at T for every T, also for T = 1


def test_bridge_formulas() -> None:
    assert bridge_schedule(4, "linear").tolist() == [1, 0.75, 0.5, 0.25, 0]
    expected = [math.cos(math.pi * t / 12) ** 2 for t in range(7)]
    assert bridge_schedule(6, "cosine").tolist() == pytest.approx(expected, abs=1e-15)


def test_gaussian_formulas_at_a_thousand_steps() -> None:
    signal, linear = 1.0, [1.0]
    for i in range(1000):
        signal *= 1 - (1e-4 + (0.02 - 1e-4) * i / 999)
        linear.append(signal)
    assert gaussian_schedule(1000, "linear").tolist() == pytest.approx(linear, rel=1e-10)
    # Without the clipped last step, Nichol & Dhariwal's alpha_bar is f(t) / f(0) in closed form.
    f = [math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(1000)]
    assert gaussian_schedule(1000, "cosine")[:-1].tolist() == pytest.approx([v / f[0] for v in f], rel=1e-9)


def test_linear_gaussian_keeps_its_total_noise_when_timesteps_change() -> None:
    ends = [-math.log(gaussian_schedule(timesteps, "linear")[-1]) for timesteps in (250, 1000, 4000)]
    assert ends == pytest.approx([10.05] * 3, rel=0.05)  # the sum of betas is 10.05 for every T


@pytest.mark.parametrize("table", [bridge_schedule, gaussian_schedule])
def test_refuses_unknown_names_and_empty_ranges(table: Callable[[int, str], torch.Tensor]) -> None:
    with pytest.raises(ValueError, match="'cubic'; it must be one of linear, cosine"):
        table(10, "cubic")
    with pytest.raises(ValueError, match="timesteps is 0"):
        table(0, "linear")
