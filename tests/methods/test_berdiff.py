"""BerDiff: flips as noise, the calibration function, and one optimum for both parts of the loss."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.distributions import Bernoulli, kl_divergence

from nnunet_diffrefine.batch import Foreground, RefineBatch
from nnunet_diffrefine.config import ConfigError
from nnunet_diffrefine.diffusion.schedule import bridge_schedule
from nnunet_diffrefine.methods.berdiff import BerDiff, bernoulli_kl
from tests.builders import LABELS, REGIONS, TinyDenoiser, batch_of, generator, method_of, nnunet_loss, with_ignore

T = 8
BOTH = pytest.mark.parametrize("foreground", [LABELS, REGIONS], ids=["labels", "regions"])
FLAT = {"deep_supervision": False, "recycling": 0.0}


def berdiff(foreground: Foreground, training: dict | None = None, literal: bool = False, **groups: dict) -> BerDiff:
    process = {"kind": "bernoulli", "timesteps": T, "schedule": "cosine", "prediction": "flip"}
    groups = {"error": {"dice": 0.0}, "condition": {"prior": "none"}, **groups}
    training = {**FLAT, **(training or {})}
    return method_of(foreground, "berdiff", process=process, training=training, paper_literal=literal, **groups)


def recorded(method: BerDiff, batch: RefineBatch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Input of the training pass, its times and output, and the loss."""
    network, seen = TinyDenoiser(*method.channels(1)), []

    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        output = network(x, t)
        seen.append((x.detach(), t, output.detach()))
        return output

    loss = method.loss(denoiser, batch, nnunet_loss(method.foreground), generator())
    return *seen[-1], loss.detach()


@BOTH
def test_noise_is_an_exclusive_or_with_bernoulli_flips(foreground: Foreground) -> None:
    """epsilon = x_t XOR x_0 ~ Bernoulli((1 - a_t) / 2), five standard errors at every t."""
    method, batch = berdiff(foreground, {"prior_end": 0.0}), batch_of(foreground, size=96)
    x, t, _, _ = recorded(method, batch)
    assert torch.equal(x[:, :1], batch.image)
    assert x.shape[1] == 1 + foreground.channels  # no prior
    x_t = x[:, 1:]
    assert set(x_t.unique().tolist()) == {0.0, 1.0}
    flips = (x_t != batch.reference).float()
    for k in t.unique():
        p = (1 - bridge_schedule(T, "cosine")[k].item()) / 2
        found = flips[t == k]
        assert abs(found.mean().item() - p) < 5 * (p * (1 - p) / found.numel()) ** 0.5


@BOTH
@pytest.mark.parametrize(("entropy", "dice"), [(1.0, 0.0), (0.3, 0.0), (1.0, 2.0)])
def test_the_loss_is_kl_of_the_posteriors_and_entropy_of_the_flips(
    foreground: Foreground, entropy: float, dice: float
) -> None:
    """Written out with torch.distributions, channel by channel, for valid voxels."""
    foreground = with_ignore(foreground)
    method = berdiff(foreground, {"prior_end": 0.2}, error={"entropy": entropy, "dice": dice})
    batch = batch_of(foreground, size=6)
    x, t, output, loss = recorded(method, batch)
    x_t = x[:, 1:].double()
    flip = torch.sigmoid((1 - 2 * x_t) * output.double())
    valid = batch.valid.expand_as(x_t) > 0
    x0, own = batch.reference.double(), (x_t - flip).abs()
    theta, theta_hat = (method.process.posterior(x_t, clean, t, t - 1) for clean in (x0, own))
    kl = kl_divergence(Bernoulli(theta[valid]), Bernoulli(theta_hat[valid])).mean()
    bce = -Bernoulli(flip[valid]).log_prob((x_t != x0).double()[valid]).mean()
    masked = [(2 * (own * x0 * batch.valid).sum((2, 3, 4)) + 1), ((own + x0) * batch.valid).sum((2, 3, 4)) + 1]
    wanted = kl + entropy * bce + dice * (1 - (masked[0] / masked[1]).mean())
    assert kl > 1e-3
    torch.testing.assert_close(loss.double(), wanted, atol=1e-4, rtol=1e-4)


def optimum(method: BerDiff, truth: float, x_t: float, t: int) -> float:
    """The x_hat_0 of smallest expected KL at one voxel, x_0 = 1 having probability ``truth`` before x_t is seen."""
    process, times = method.process, torch.tensor([t])
    q = torch.linspace(0.001, 0.999, 999, dtype=torch.float64).view(1, 1, 1, 1, -1)
    a_t = bridge_schedule(T, "cosine")[t].item()
    seen = [a_t * x_t + (1 - a_t) / 2, a_t * (1 - x_t) + (1 - a_t) / 2]  # q(x_t | x_0 = 1), q(x_t | x_0 = 0)
    weights = truth * seen[0], (1 - truth) * seen[1]
    state = torch.full_like(q, x_t)
    expected = torch.zeros_like(q)
    for x0, weight in zip((1.0, 0.0), weights, strict=True):
        theta = process.posterior(state, torch.full_like(q, x0), times, times - 1)
        expected += weight / sum(weights) * bernoulli_kl(theta, process.posterior(state, q, times, times - 1))
    return q.flatten()[expected.argmin()].item()


@pytest.mark.parametrize("x_t", [0.0, 1.0])
@pytest.mark.parametrize("t", [2, 5])
def test_kl_and_entropy_agree_on_the_optimum_unless_plugged_in(x_t: float, t: int) -> None:
    """The flips' entropy is smallest at p(x_0 | I, x_t); so is our KL. The printed one's is at p(x_0 | I)."""
    truth, a_t = 0.3, bridge_schedule(T, "cosine")[t].item()
    one, zero = a_t * x_t + (1 - a_t) / 2, a_t * (1 - x_t) + (1 - a_t) / 2
    weighed = truth * one / (truth * one + (1 - truth) * zero)
    assert abs(weighed - truth) > 0.05
    assert optimum(berdiff(REGIONS), truth, x_t, t) == pytest.approx(weighed, abs=2e-3)
    assert optimum(berdiff(REGIONS, literal=True), truth, x_t, t) == pytest.approx(truth, abs=2e-3)


@BOTH
@pytest.mark.parametrize("literal", [False, True])
def test_predicted_flips_turn_the_state_into_the_mask(foreground: Foreground, literal: bool) -> None:
    """The first step of the calibration function: x_hat_0 = |x_t - epsilon_hat|."""
    method, batch = berdiff(foreground, literal=literal), batch_of(foreground)
    x_t = method.process.start(batch.prior, generator())
    output = torch.randn(x_t.shape, generator=generator(1))
    found = method.predicted(output, x_t, torch.full((2,), T))
    torch.testing.assert_close(found, (x_t - torch.sigmoid(method.flip_logits(output, x_t))).abs())
    # literal: the output is the flip's logit; else it is the mask's, and the flip's up to the sign of the state
    torch.testing.assert_close(
        method.flip_logits(output, x_t),
        output if literal else torch.logit((x_t - output.sigmoid()).abs()),
        atol=1e-4,
        rtol=1e-4,
    )


@BOTH
@pytest.mark.parametrize("recycling", [0.0, 1.0])
def test_flips_of_a_recycled_state_lead_to_the_reference(foreground: Foreground, recycling: float) -> None:
    method = berdiff(foreground)
    training = replace(method.config.training, recycling=recycling, prior_end=0.0)
    method = BerDiff(replace(method.config, training=training), foreground)
    batch = batch_of(foreground, size=8)
    calls: list[int] = []

    def oracle(x: Tensor, t: Tensor) -> Tensor:
        calls.append(len(x))
        if len(x) < len(batch.image):  # the pass whose prediction is recycled: it may be anything
            return torch.zeros_like(x[:, 1:])
        return torch.logit(batch.reference, eps=1e-6)

    assert method.loss(oracle, batch, nnunet_loss(foreground), generator()) < 1e-5
    assert len(calls) == 1 + int(recycling)


@BOTH
def test_sampling_starts_at_coins_and_averages_soft_masks(foreground: Foreground) -> None:
    method, batch = berdiff(foreground, sampling={"steps": 1, "samples": 3}), batch_of(foreground)
    network, seen = TinyDenoiser(*method.channels(1)), []

    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        output = network(x, t)
        seen.extend(zip(x[:, 1:].chunk(3), output.chunk(3), strict=True))
        return output

    refined = method.refine(denoiser, batch.image, batch.prior, generator())
    assert not torch.equal(seen[0][0], seen[1][0])
    mean = torch.stack([torch.sigmoid(output) for _, output in seen]).mean(0)
    likeliest = (mean == mean.amax(1, keepdim=True)) if foreground.exclusive else torch.ones_like(mean).bool()
    assert torch.equal(foreground.decide(refined) > 0, likeliest & (mean > 0.5))


def test_the_paper_plugs_in() -> None:
    assert berdiff(LABELS, literal=True).process.plug_in
    assert not berdiff(LABELS).process.plug_in


def test_kl_is_that_of_torch_and_finite_at_the_ends() -> None:
    p, q = (torch.rand(1000, generator=generator(k), dtype=torch.float64) for k in (1, 2))
    torch.testing.assert_close(bernoulli_kl(p, q), kl_divergence(Bernoulli(p), Bernoulli(q)), atol=1e-4, rtol=1e-4)
    ends = torch.tensor([0.0, 0.0, 1.0, 1.0]), torch.tensor([0.0, 1.0, 0.0, 1.0], requires_grad=True)
    kl = bernoulli_kl(*ends)
    kl.sum().backward()
    assert torch.isfinite(kl).all()
    assert torch.isfinite(ends[1].grad).all()
    torch.testing.assert_close(kl[[0, 3]], torch.zeros(2), atol=2e-6, rtol=0)


def test_what_cannot_work_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"training.deep_supervision.*false"):
        berdiff(LABELS, {"deep_supervision": True})
    with pytest.raises(ConfigError, match=r"condition.prior.*needs 'none'"):
        berdiff(LABELS, condition={"prior": "soft"})
