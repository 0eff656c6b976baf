"""The Gaussian process: closed-form marginals, and samplers that recover a distribution whose denoiser is known."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from nnunet_diffrefine.diffusion import GaussianProcess, sample

SHAPE = (4, 2, 20, 25, 25)
T = 1000


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("input_scale", [1.0, 0.3])
def test_marginal_has_the_closed_form_mean_and_variance(input_scale: float) -> None:
    process = GaussianProcess(T, "cosine", input_scale)
    t, x0 = torch.tensor([1, 300, 700, 1000]), torch.tensor([-1.0, 1.0]).view(1, 2, 1, 1, 1).expand(SHAPE)
    x_t = process.marginal(x0, torch.zeros(SHAPE), t, generator()).double()
    alpha_bar = process.alpha_bar(t)
    n = math.prod(SHAPE[2:])
    for i in range(4):
        mean, variance = alpha_bar[i].sqrt() * input_scale, 1 - alpha_bar[i]
        assert (x_t[i].mean((1, 2, 3)) - torch.tensor([-mean, mean])).abs().max() < 5 * (variance / n).sqrt()
        assert (x_t[i].var((1, 2, 3)) / variance - 1).abs().max() < 5 * math.sqrt(2 / n)


def test_marginal_at_zero_is_the_scaled_input() -> None:
    x0 = torch.rand(2, 1, 3, 3, 3, generator=generator()) * 2 - 1
    assert torch.equal(GaussianProcess(T, "linear", 0.5).marginal(x0, x0, torch.tensor([0, 0]), generator()), 0.5 * x0)


def test_start_is_standard_normal_whatever_the_prior() -> None:
    process = GaussianProcess(T, "linear")
    x = process.start(torch.ones(SHAPE), generator())
    assert torch.equal(x, process.start(torch.zeros(SHAPE), generator()))
    assert abs(x.mean()) < 5 / math.sqrt(x.numel())
    assert abs(x.var() - 1) < 5 * math.sqrt(2 / x.numel())


@pytest.mark.parametrize("kind", ["x0", "epsilon", "v"])
def test_training_target_and_prediction_are_inverse_with_input_scale(kind: str) -> None:
    process = GaussianProcess(T, "linear", input_scale=0.4)
    x0, noise = (torch.randn(4, 1, 3, 3, 3, generator=generator(k), dtype=torch.float64) for k in (1, 2))
    t = torch.tensor([1, 200, 600, 1000])
    x_t = process.marginal_with(x0, noise, t)
    target = process.training_target(kind, x0, noise, t)
    torch.testing.assert_close(process.predicted_x0(kind, target, x_t, t), x0, atol=1e-10, rtol=0)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_reverse_reproduces_the_marginal_at_s(eta: float) -> None:
    """If x_t ~ q(x_t | x_0), then x_s ~ q(x_s | x_0), for any eta and stride (Song et al. 2021, Lemma 1)."""
    process = GaussianProcess(T, "linear", 0.7, eta)
    x0 = torch.full(SHAPE, 0.6)
    t, s = torch.tensor([1000, 900, 500, 2]), torch.tensor([400, 899, 50, 1])
    x_s = process.reverse(process.marginal(x0, x0, t, generator(1)), x0, x0, t, s, generator(2)).double()
    alpha_bar, n = process.alpha_bar(s), math.prod(SHAPE[1:])
    mean, variance = alpha_bar.sqrt() * 0.7 * 0.6, 1 - alpha_bar
    assert ((x_s.mean((1, 2, 3, 4)) - mean).abs() < 5 * (variance / n).sqrt()).all()
    assert ((x_s.var((1, 2, 3, 4)) / variance - 1).abs() < 5 * math.sqrt(2 / n)).all()


def test_eta_one_is_the_posterior_of_ho_et_al() -> None:
    """Eq. 6 and 7 of DDPM in their own form, with the noise our step draws."""
    process = GaussianProcess(T, "linear", eta=1.0)
    x_t, x0 = (torch.randn(3, 1, 4, 4, 4, generator=generator(k), dtype=torch.float64) for k in (1, 2))
    t = torch.tensor([2, 400, 1000])
    now, before = (process.alpha_bar(k).view(3, 1, 1, 1, 1) for k in (t, t - 1))
    beta = 1 - now / before
    mean = before.sqrt() * beta / (1 - now) * x0 + (1 - beta).sqrt() * (1 - before) / (1 - now) * x_t
    noise = torch.randn(x0.shape, generator=generator(3), dtype=torch.float64)
    expected = mean + ((1 - before) / (1 - now) * beta).sqrt() * noise
    found = process.reverse(x_t, x0, x0, t, t - 1, generator(3))
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=0)


def test_eta_zero_draws_nothing() -> None:
    process = GaussianProcess(T, "cosine", eta=0.0)
    x_t, x0 = torch.randn(1, 1, 4, 4, 4), torch.zeros(1, 1, 4, 4, 4)
    g = generator()
    first = process.reverse(x_t, x0, x0, torch.tensor([800]), torch.tensor([300]), g)
    assert torch.equal(g.get_state(), generator().get_state())
    assert torch.equal(first, process.reverse(x_t, x0, x0, torch.tensor([800]), torch.tensor([300]), generator(5)))


def gaussian_denoiser(process: GaussianProcess, mean: float, std: float) -> Callable[[Tensor, Tensor], Tensor]:
    """E[x_0 | x_t] of x_0 ~ N(mean, std^2), exact."""

    def predict(x_t: Tensor, t: Tensor) -> Tensor:
        b, alpha_bar = process.input_scale, process.alpha_bar(t)[0].item()
        gain = math.sqrt(alpha_bar) * b * std**2 / (alpha_bar * b**2 * std**2 + 1 - alpha_bar)
        return mean + gain * (x_t - math.sqrt(alpha_bar) * b * mean)

    return predict


def ddim_moments(process: GaussianProcess, steps: int, mean: float, std: float) -> tuple[float, float]:
    """Exact mean and standard deviation of DDIM's result: the path is affine in x_T, so two starts determine it."""
    start = torch.tensor([0.0, 1.0], dtype=torch.float64).view(1, 1, 1, 1, 2)
    process.start = lambda prior, generator=None: start  # type: ignore[method-assign]
    offset, end = sample(process, gaussian_denoiser(process, mean, std), start, steps).flatten().tolist()
    return offset, end - offset


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("input_scale", [1.0, 0.5])
def test_ddim_with_the_exact_denoiser_recovers_a_gaussian(schedule: str, input_scale: float) -> None:
    found = ddim_moments(GaussianProcess(T, schedule, input_scale), T, mean=0.4, std=0.3)
    assert found == pytest.approx((0.4, 0.3), rel=0.02)


def test_ddim_converges_at_first_order() -> None:
    """Twice the steps, about half the error of the standard deviation."""
    errors = [abs(ddim_moments(GaussianProcess(T, "cosine"), steps, 0.4, 0.3)[1] - 0.3) for steps in (50, 100, 200)]
    ratios = [coarse / fine for coarse, fine in zip(errors, errors[1:], strict=False)]
    assert all(1.6 < ratio < 2.5 for ratio in ratios), ratios


def test_ddpm_with_the_exact_denoiser_recovers_a_gaussian() -> None:
    process = GaussianProcess(T, "linear", eta=1.0)
    prior = torch.zeros(1, 1, 10, 40, 50)
    found = sample(process, gaussian_denoiser(process, 0.4, 0.3), prior, T, generator())
    assert abs(found.mean() - 0.4) < 5 * 0.3 / math.sqrt(found.numel())
    assert found.std().item() == pytest.approx(0.3, rel=5 / math.sqrt(2 * found.numel()) + 0.005)
