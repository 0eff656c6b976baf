"""The truncated Gaussian process: it starts from the noised prior at T' and is the full process below."""

import math

import pytest
import torch
from torch import Tensor

from nnunet_diffrefine.config import ProcessConfig
from nnunet_diffrefine.diffusion import GaussianProcess, TruncatedGaussianProcess, from_config, sample
from nnunet_diffrefine.diffusion.schedule import gaussian_schedule

T, T_PRIME = 1000, 300
SCHEDULES = pytest.mark.parametrize("schedule", ["linear", "cosine"])


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def truncated(schedule: str = "linear", input_scale: float = 1.0, eta: float = 0.0) -> TruncatedGaussianProcess:
    return TruncatedGaussianProcess(T, schedule, input_scale, eta, truncation=T_PRIME / T)


def signed(seed: int, shape: tuple[int, ...] = (2, 2, 4, 5, 6)) -> Tensor:
    return 2 * torch.rand(shape, generator=generator(seed), dtype=torch.float64) - 1


@pytest.mark.parametrize(("timesteps", "truncation", "expected"), [(1000, 0.3, 300), (4, 0.5, 2), (4, 0.1, 1)])
def test_the_end_is_a_share_of_the_steps(timesteps: int, truncation: float, expected: int) -> None:
    assert TruncatedGaussianProcess(timesteps, "linear", truncation=truncation).timesteps == expected


@SCHEDULES
@pytest.mark.parametrize("input_scale", [1.0, 0.4])
def test_start_is_the_noised_prior(schedule: str, input_scale: float) -> None:
    """Mean sqrt(alpha_bar_T') b p and variance 1 - alpha_bar_T', five standard errors."""
    process = truncated(schedule, input_scale)
    prior = torch.tensor([-1.0, 0.2, 1.0]).view(1, 3, 1, 1, 1).expand(1, 3, 40, 40, 40)
    start = process.start(prior, generator()).double()
    alpha_bar, n = gaussian_schedule(T, schedule)[T_PRIME].item(), 64000
    mean = math.sqrt(alpha_bar) * input_scale * torch.tensor([-1.0, 0.2, 1.0])
    assert (start.mean((0, 2, 3, 4)) - mean).abs().max() < 5 * math.sqrt((1 - alpha_bar) / n)
    assert (start.var((0, 2, 3, 4)) / (1 - alpha_bar) - 1).abs().max() < 5 * math.sqrt(2 / n)


def test_start_and_forward_process_meet_at_the_end() -> None:
    """The same noise on the same mask gives the same state, so a right prior is a state of training."""
    process, prior = truncated(), signed(1)
    end = torch.full((2,), T_PRIME)
    assert torch.equal(process.start(prior, generator()), process.marginal(prior, prior, end, generator()))


@SCHEDULES
def test_marginals_agree_with_the_full_process(schedule: str) -> None:
    """The schedule is that of T, not one of its own over T'."""
    process, full = truncated(schedule, 0.7), GaussianProcess(T, schedule, 0.7)
    x0 = signed(1, (4, 1, 3, 4, 5))
    t = torch.tensor([0, 1, 150, T_PRIME])
    assert torch.equal(process.marginal(x0, x0, t, generator()), full.marginal(x0, x0, t, generator()))
    assert torch.equal(process.alpha_bar(t), full.alpha_bar(t))


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("steps", [1, 2, T_PRIME])
def test_an_oracle_gives_back_x0_whatever_the_prior(steps: int, eta: float) -> None:
    process, x0, times = truncated(eta=eta), signed(1), []

    def oracle(x_t: Tensor, t: Tensor) -> Tensor:
        times.append(int(t[0]))
        return x0

    assert torch.equal(sample(process, oracle, signed(2), steps, generator()), x0)
    assert times[0] == T_PRIME
    assert len(times) == steps


def test_ddim_keeps_the_noise_of_the_start_where_the_prior_is_right() -> None:
    """With x_hat_0 = prior every state is sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) epsilon of one epsilon."""
    process, prior, states = truncated(input_scale=0.6), signed(1), {}

    def denoiser(x_t: Tensor, t: Tensor) -> Tensor:
        states[int(t[0])] = x_t
        return prior

    sample(process, denoiser, prior, 5, generator())
    noise = torch.randn(prior.shape, generator=generator(), dtype=prior.dtype)
    assert sorted(states) == [60, 120, 180, 240, 300]
    for t, x_t in states.items():
        expected = process.marginal_with(prior, noise, torch.full((2,), t))
        torch.testing.assert_close(x_t, expected, atol=1e-12, rtol=0)


def test_a_prior_distributed_like_the_truth_loses_nothing_by_truncation() -> None:
    """x_0 and prior ~ N(0.4, 0.3^2), exact denoiser: DDPM from T' gives back mean and standard deviation."""
    mean, std, process = 0.4, 0.3, truncated(eta=1.0)

    def exact(x_t: Tensor, t: Tensor) -> Tensor:
        alpha_bar = process.alpha_bar(t)[0].item()
        gain = math.sqrt(alpha_bar) * std**2 / (alpha_bar * std**2 + 1 - alpha_bar)
        return mean + gain * (x_t - math.sqrt(alpha_bar) * mean)

    prior = mean + std * torch.randn(1, 1, 10, 40, 50, generator=generator(7))
    found = sample(process, exact, prior, T_PRIME, generator())
    n = found.numel()
    assert abs(found.mean() - mean) < 5 * std / math.sqrt(n)
    assert found.std().item() == pytest.approx(std, rel=5 / math.sqrt(2 * n) + 0.005)


def test_a_wrong_prior_shifts_the_start_by_its_error() -> None:
    process, first, second = truncated(input_scale=0.5), signed(1), signed(2)
    shift = process.start(first, generator()) - process.start(second, generator())
    expected = gaussian_schedule(T, "linear")[T_PRIME].sqrt() * 0.5 * (first - second)
    torch.testing.assert_close(shift, expected, atol=1e-12, rtol=0)


def test_settings_choose_the_process() -> None:
    config = ProcessConfig(kind="gaussian", timesteps=10, truncation=0.4, input_scale=0.5)
    process = from_config(config, exclusive=True, eta=0.3)
    assert isinstance(process, TruncatedGaussianProcess)
    assert (process.timesteps, process.input_scale, process.eta) == (4, 0.5, 0.3)
    whole = from_config(ProcessConfig(kind="gaussian", timesteps=10), exclusive=True, eta=0.0)
    assert not isinstance(whole, TruncatedGaussianProcess)
