"""The Gaussian process against MONAI's independent schedulers. MONAI's timestep i is our t = i + 1."""

import pytest
import torch
from torch import Tensor

from nnunet_diffrefine.diffusion import GaussianProcess, sample
from nnunet_diffrefine.diffusion.schedule import gaussian_schedule

schedulers = pytest.importorskip("monai.networks.schedulers")
pytestmark = pytest.mark.reference

SCHEDULES = [("linear", "linear_beta"), ("cosine", "cosine")]
PRIOR = torch.zeros(2, 1, 3, 4, 5)
BETAS = {"beta_start": 1e-4, "beta_end": 2e-2}


def settings(schedule: str, timesteps: int) -> dict[str, float]:
    """MONAI leaves the betas as they are; ours are for T = 1000 and scaled to other T."""
    return {k: v * 1000 / timesteps for k, v in BETAS.items()} if schedule == "linear_beta" else {}


def network(x_t: Tensor, t: Tensor) -> Tensor:
    return torch.tanh(0.7 * x_t + t.view(-1, 1, 1, 1, 1) / 1000 - 0.2)


@pytest.mark.parametrize(("ours", "theirs"), SCHEDULES)
@pytest.mark.parametrize("timesteps", [100, 1000])
def test_signal_shares_agree(ours: str, theirs: str, timesteps: int) -> None:
    scheduler = schedulers.DDPMScheduler(timesteps, schedule=theirs, **settings(theirs, timesteps))
    expected = scheduler.alphas_cumprod.double()  # computed in float32
    torch.testing.assert_close(gaussian_schedule(timesteps, ours)[1:], expected, atol=2e-6, rtol=2e-4)


@pytest.mark.parametrize(("ours", "theirs"), SCHEDULES)
def test_a_full_ddpm_path_agrees(ours: str, theirs: str) -> None:
    timesteps = 100
    scheduler = schedulers.DDPMScheduler(
        timesteps, schedule=theirs, prediction_type="sample", clip_sample=False, **settings(theirs, timesteps)
    )
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(PRIOR.shape, generator=generator)
    for i in range(timesteps - 1, -1, -1):
        x, _ = scheduler.step(network(x, torch.full((2,), i + 1)), i, x, generator)
    process = GaussianProcess(timesteps, ours, eta=1.0)
    found = sample(process, network, PRIOR, timesteps, torch.Generator().manual_seed(0))
    torch.testing.assert_close(found, x, atol=2e-4, rtol=0)


@pytest.mark.parametrize("eta", [0.0, 0.6])
@pytest.mark.parametrize("steps", [10, 100])
@pytest.mark.parametrize(("ours", "theirs"), SCHEDULES)
def test_a_full_ddim_path_agrees(ours: str, theirs: str, steps: int, eta: float) -> None:
    timesteps = 100
    scheduler = schedulers.DDIMScheduler(
        timesteps, schedule=theirs, prediction_type="sample", clip_sample=False, **settings(theirs, timesteps)
    )
    scheduler.set_timesteps(steps)  # fixes MONAI's stride; the times visited are ours, which end at clean data
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(PRIOR.shape, generator=generator)
    for t in range(timesteps, 0, -timesteps // steps):
        x, _ = scheduler.step(network(x, torch.full((2,), t)), t - 1, x, eta, generator)
    found = sample(GaussianProcess(timesteps, ours, eta=eta), network, PRIOR, steps, torch.Generator().manual_seed(0))
    torch.testing.assert_close(found, x, atol=2e-4, rtol=0)


@pytest.mark.parametrize(("kind", "theirs"), [("epsilon", "epsilon"), ("v", "v_prediction")])
def test_parametrisations_agree(kind: str, theirs: str) -> None:
    process = GaussianProcess(1000, "linear")
    scheduler = schedulers.DDPMScheduler(1000, prediction_type=theirs, clip_sample=False)
    generator = torch.Generator().manual_seed(0)
    x0, noise, output = (torch.randn(PRIOR.shape, generator=generator) for _ in range(3))
    t = torch.tensor([250, 250])
    x_t = process.marginal_with(x0, noise, t)
    torch.testing.assert_close(x_t, scheduler.add_noise(x0, noise, t - 1), atol=1e-5, rtol=0)
    if kind == "v":
        target = process.training_target("v", x0, noise, t)
        torch.testing.assert_close(target, scheduler.get_velocity(x0, noise, t - 1), atol=1e-5, rtol=0)
    _, expected = scheduler.step(output, 249, x_t)
    torch.testing.assert_close(process.predicted_x0(kind, output, x_t, t), expected, atol=1e-4, rtol=0)
