"""The Bernoulli process: marginal and posterior by simulation and by Bayes' rule, strides, and what soft x_0 do."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from nnunet_diffrefine.config import ProcessConfig
from nnunet_diffrefine.diffusion import BernoulliProcess, DiscreteBridge, from_config, sample
from nnunet_diffrefine.diffusion.schedule import bridge_schedule

T = 6
PAIRS = [(t, s) for t, s in itertools.product(range(1, T + 1), range(T)) if s < t]
SCHEDULES = pytest.mark.parametrize("schedule", ["linear", "cosine"])
ETAS = pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def voxel(value: float) -> Tensor:
    return torch.full((1, 1, 1, 1, 1), value, dtype=torch.float64)


def at(t: int) -> Tensor:
    return torch.tensor([t])


def flip_probability(s: int, t: int, schedule: str) -> float:
    """Probability that x_t differs from x_s, from the one-step transitions: beta_k / 2 each."""
    a, flipped = bridge_schedule(T, schedule).tolist(), 0.0
    for k in range(s + 1, t + 1):
        half_beta = (1 - a[k] / a[k - 1]) / 2
        flipped = flipped * (1 - half_beta) + (1 - flipped) * half_beta
    return flipped


def by_bayes(x_t: int, x0: int, t: int, s: int, schedule: str) -> float:
    """q(x_s = 1 | x_t, x_0) = q(x_t | x_s) q(x_s | x_0), summed over x_s."""
    joint = []
    for x_s in (0, 1):
        first, second = flip_probability(0, s, schedule), flip_probability(s, t, schedule)
        joint.append((first if x_s != x0 else 1 - first) * (second if x_t != x_s else 1 - second))
    return joint[1] / sum(joint)


def test_start_is_a_fair_coin_for_every_channel_and_voxel_alone() -> None:
    process = BernoulliProcess(T, "linear")
    prior = torch.rand(1, 2, 40, 40, 40, generator=generator(5))
    x = process.start(prior, generator())
    assert torch.equal(x, process.start(torch.zeros_like(prior), generator()))
    assert set(x.unique().tolist()) == {0.0, 1.0}
    error = 0.5 / math.sqrt(64000)
    assert ((x.mean((2, 3, 4)) - 0.5).abs() < 5 * error).all()
    agreement = (x[:, 0] == x[:, 1]).float().mean(), (x[..., 1:] == x[..., :-1]).float().mean()
    assert all(abs(share - 0.5) < 5 * error for share in agreement)


@SCHEDULES
@pytest.mark.parametrize("x0", [0.0, 0.3, 1.0])
def test_marginal_is_that_of_the_chain(schedule: str, x0: float) -> None:
    """Five binomial standard errors at every t; a soft x_0 is a mask drawn from it."""
    process, n = BernoulliProcess(T, schedule), 30**3
    clean = torch.full((T + 1, 1, 30, 30, 30), x0)
    x_t = process.marginal(clean, torch.rand_like(clean), torch.arange(T + 1), generator())
    assert set(x_t.unique().tolist()) <= {0.0, 1.0}
    for t in range(T + 1):
        flipped = flip_probability(0, t, schedule)
        wanted = x0 * (1 - flipped) + (1 - x0) * flipped
        assert abs(x_t[t].mean().item() - wanted) <= 5 * math.sqrt(wanted * (1 - wanted) / n) + 1e-7


def test_ends_are_exact() -> None:
    process = BernoulliProcess(T, "cosine")
    x0 = (torch.rand(2, 2, 5, 5, 5, generator=generator(1)) < 0.3).float()
    assert torch.equal(process.marginal(x0, x0, torch.tensor([0, 0]), generator()), x0)
    ends = [process.marginal(x, x, torch.tensor([T, T]), generator()) for x in (x0, 1 - x0)]
    assert torch.equal(*ends)  # nothing of x_0 is left at T


@SCHEDULES
@pytest.mark.parametrize("plug_in", [False, True])
def test_posterior_of_hard_masks_is_bayes_rule(schedule: str, plug_in: bool) -> None:
    process = BernoulliProcess(T, schedule, plug_in=plug_in)
    for (t, s), x_t, x0 in itertools.product(PAIRS, (0, 1), (0, 1)):
        found = process.posterior(voxel(x_t), voxel(x0), at(t), at(s)).item()
        assert found == pytest.approx(by_bayes(x_t, x0, t, s, schedule), abs=1e-12)


def test_posterior_of_one_voxel_worked_out_by_hand() -> None:
    """T = 4, linear: a = 1, 3/4, 1/2, 1/4, 0, so r = 2/3 from t = 2 to s = 1."""
    mixed, plugged = BernoulliProcess(4, "linear"), BernoulliProcess(4, "linear", plug_in=True)
    for x_t, x0, wanted in [(1, 1, 35 / 36), (1, 0, 5 / 12), (0, 1, 7 / 12), (0, 0, 1 / 36)]:
        for process in (mixed, plugged):
            assert process.posterior(voxel(x_t), voxel(x0), at(2), at(1)).item() == pytest.approx(wanted, abs=1e-12)
    found = [process.posterior(voxel(1), voxel(0.3), at(2), at(1)).item() for process in (mixed, plugged)]
    assert found == pytest.approx([0.3 * 35 / 36 + 0.7 * 5 / 12, 35 / 48], abs=1e-12)


def test_posterior_is_what_a_simulated_chain_does() -> None:
    """Frequencies of x_s among chains x_0 -> x_s -> x_t that arrive at the same x_t, five standard errors."""
    process, a, (t, s), n = BernoulliProcess(T, "linear"), bridge_schedule(T, "linear"), (4, 2), 60**3
    for x0 in (0.0, 1.0):
        chain = [torch.full((n,), x0)]
        for k in range(1, t + 1):
            redrawn = torch.rand(n, generator=generator(k)) < 1 - a[k] / a[k - 1]
            coin = (torch.rand(n, generator=generator(100 + k)) < 0.5).float()
            chain.append(torch.where(redrawn, coin, chain[-1]))
        for x_t in (0.0, 1.0):
            arrived = chain[s][chain[t] == x_t]
            wanted = process.posterior(voxel(x_t), voxel(x0), at(t), at(s)).item()
            assert abs(arrived.mean() - wanted) < 5 * math.sqrt(wanted * (1 - wanted) / len(arrived))


@SCHEDULES
def test_soft_posterior_is_that_of_the_bridge_to_a_coin(schedule: str) -> None:
    """An independent implementation, from matrices of outcomes instead of a formula for two."""
    process, bridge = BernoulliProcess(T, schedule), DiscreteBridge(T, schedule, exclusive=False)
    x0 = torch.rand(len(PAIRS), 2, 3, 4, 5, generator=generator(), dtype=torch.float64)
    x_t, coin = (x0 * 7 % 1 < 0.5).double(), torch.full_like(x0, 0.5)
    t, s = (torch.tensor(times) for times in zip(*PAIRS, strict=True))
    wanted = bridge.posterior(x_t, x0, coin, t, s)
    torch.testing.assert_close(process.posterior(x_t, x0, t, s), wanted, atol=1e-12, rtol=0)


@SCHEDULES
@ETAS
def test_any_stride_and_eta_reproduces_the_marginal_at_s(schedule: str, eta: float) -> None:
    """If x_t ~ q(x_t | x_0), then x_s ~ q(x_s | x_0): exact, summed over both x_t."""
    process = BernoulliProcess(T, schedule, eta)
    for (t, s), x0 in itertools.product(PAIRS, (0.0, 1.0)):
        arrives = flip_probability(0, t, schedule)
        found = 0.0
        for x_t in (0.0, 1.0):
            p = eta * process.posterior(voxel(x_t), voxel(x0), at(t), at(s))
            p = p + (1 - eta) * process.ddim(voxel(x_t), voxel(x0), at(t), at(s))
            found += (arrives if x_t != x0 else 1 - arrives) * p.item()
        flipped = flip_probability(0, s, schedule)
        assert found == pytest.approx(flipped if x0 == 0 else 1 - flipped, abs=1e-12)


@ETAS
def test_reverse_draws_what_it_says(eta: float) -> None:
    process, n = BernoulliProcess(T, "cosine", eta), 40**3
    x0, x_t = torch.full((2, 1, 40, 40, 40), 0.7), torch.zeros(2, 1, 40, 40, 40)
    t, s = torch.tensor([5, 3]), torch.tensor([2, 1])
    found = process.reverse(x_t, x0, x0, t, s, generator())
    wanted = eta * process.posterior(x_t, x0, t, s) + (1 - eta) * process.ddim(x_t, x0, t, s)
    assert set(found.unique().tolist()) == {0.0, 1.0}
    for i in range(2):
        p = wanted[i].flatten()[0].item()
        assert 0.01 < p < 0.99
        assert abs(found[i].mean() - p) < 5 * math.sqrt(p * (1 - p) / n)


def calibrated(truth: float, x_t: int, t: int) -> float:
    """Exact p(x_0 = 1 | x_t) where x_0 = 1 has probability ``truth``: what a perfect denoiser answers."""
    flipped = flip_probability(0, t, "linear")
    one, zero = (1 - flipped, flipped) if x_t else (flipped, 1 - flipped)
    return truth * one / (truth * one + (1 - truth) * zero)


def sampled_mean(process: BernoulliProcess, truth: float, times: list[int]) -> float:
    """Mean of the last x_0 of a perfect denoiser, summed over all paths of one voxel."""
    shares = {0: 0.5, 1: 0.5}
    for t, s in itertools.pairwise(times):
        arrived = 0.0
        for x_t, share in shares.items():
            x0 = voxel(calibrated(truth, x_t, t))
            p = process.eta * process.posterior(voxel(x_t), x0, at(t), at(s))
            arrived += share * (p + (1 - process.eta) * process.ddim(voxel(x_t), x0, at(t), at(s))).item()
        shares = {0: 1 - arrived, 1: arrived}
    return shares[1]


@ETAS
@pytest.mark.parametrize("times", [[6, 0], [6, 3, 0], [6, 5, 4, 3, 2, 1, 0]])
def test_a_perfect_denoiser_is_sampled_without_bias(eta: float, times: list[int]) -> None:
    assert sampled_mean(BernoulliProcess(T, "linear", eta), 0.2, times) == pytest.approx(0.2, abs=1e-12)


def test_plugging_in_is_biased_towards_the_coin() -> None:
    """Why it is not the default: x_hat_0 has weighed x_t already."""
    plugged = BernoulliProcess(T, "linear", eta=1.0, plug_in=True)
    assert sampled_mean(plugged, 0.2, [6, 5, 4, 3, 2, 1, 0]) > 0.23


@ETAS
@pytest.mark.parametrize("steps", [1, 2, T])
def test_an_oracle_gives_back_x0(eta: float, steps: int) -> None:
    x0 = (torch.rand(2, 3, 4, 5, 6, generator=generator(1)) < 0.3).float()
    soft = torch.rand(2, 3, 4, 5, 6, generator=generator(2))
    process = BernoulliProcess(T, "cosine", eta)
    for clean in (x0, soft):  # the last prediction itself, soft if it is
        assert torch.equal(sample(process, lambda x, t, clean=clean: clean, soft, steps, generator()), clean)


@pytest.mark.parametrize("plug_in", [False, True])
def test_probabilities_stay_in_range_at_many_steps(plug_in: bool) -> None:
    process = BernoulliProcess(1000, "cosine", plug_in=plug_in)
    hard = (torch.rand(4, 1, 3, 4, 5, generator=generator(1)) < 0.5).float()
    t, s = torch.tensor([1, 2, 500, 1000]), torch.tensor([0, 1, 499, 0])
    for x0 in (hard, 1 - hard, torch.rand(hard.shape, generator=generator(2))):
        for p in (process.posterior(hard, x0, t, s), process.ddim(hard, x0, t, s)):
            assert (p >= 0).all()
            assert (p <= 1 + 1e-6).all()
            torch.testing.assert_close(p[0], x0[0], atol=1e-5, rtol=0)


def test_batch_elements_have_their_own_times() -> None:
    process = BernoulliProcess(T, "linear")
    x_t, x0 = torch.ones(3, 1, 1, 1, 1), torch.full((3, 1, 1, 1, 1), 0.3)
    t, s = torch.tensor([1, 4, 6]), torch.tensor([0, 2, 5])
    together = process.posterior(x_t, x0, t, s)
    alone = [process.posterior(x_t[i : i + 1], x0[i : i + 1], t[i : i + 1], s[i : i + 1]) for i in range(3)]
    assert torch.equal(together, torch.cat(alone))
    assert len(together.unique()) == 3


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_settings_reach_the_process(eta: float) -> None:
    config = ProcessConfig(kind="bernoulli", timesteps=7, schedule="cosine", prediction="flip")
    process = from_config(config, exclusive=True, eta=eta)
    assert isinstance(process, BernoulliProcess)
    assert (process.timesteps, process.eta, process.plug_in) == (7, eta, False)
