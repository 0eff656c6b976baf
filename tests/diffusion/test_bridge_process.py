"""Bridges: end points, means, and the posterior against an enumeration of the Markov chain."""

import itertools

import pytest
import torch
from torch import Tensor

from nnunet_diffrefine.diffusion import DeterministicBridge, DiscreteBridge
from nnunet_diffrefine.diffusion.schedule import bridge_schedule

T = 6
SCHEDULES = ["linear", "cosine"]


def times(*values: int) -> Tensor:
    return torch.tensor(values)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_probabilities(exclusive: bool, shape: tuple[int, ...] = (4, 3, 5, 6, 7), seed: int = 1) -> Tensor:
    """Class probabilities with background, or regions nested in channel order (0 in 1 in 2)."""
    values = torch.rand(shape[0], shape[1] + 1, *shape[2:], generator=generator(seed))
    if exclusive:
        return torch.softmax(6 * values, 1)[:, 1:]
    return values[:, 1:].cumprod(1).flip(1)


def random_mask(exclusive: bool, seed: int = 2) -> Tensor:
    return DiscreteBridge(T, "linear", exclusive).start(random_probabilities(exclusive, seed=seed), generator(seed))


# Deterministic


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_deterministic_bridge_joins_x0_and_prior_exactly(schedule: str) -> None:
    bridge = DeterministicBridge(T, schedule)
    x0, prior = random_probabilities(True, seed=3), random_probabilities(True)
    assert torch.equal(bridge.start(prior), prior)
    ends = bridge.marginal(x0, prior, times(0, T, 0, T))
    assert torch.equal(ends[::2], x0[::2])
    assert torch.equal(ends[1::2], prior[1::2])
    assert torch.equal(bridge.reverse(prior, x0, prior, times(T, 3, 2, 1), times(0, 0, 0, 0)), x0)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_deterministic_bridge_is_prior_plus_a_t_error(schedule: str) -> None:
    bridge, a = DeterministicBridge(T, schedule), bridge_schedule(T, schedule)
    x0, prior = random_probabilities(True, seed=3), random_probabilities(True)
    state = bridge.marginal(x0, prior, times(1, 2, 4, 5))
    expected = prior + a[[1, 2, 4, 5]].view(4, 1, 1, 1, 1) * (x0 - prior).double()
    torch.testing.assert_close(state.double(), expected, atol=2e-7, rtol=0)
    assert state.dtype == torch.float32
    # The state at s is that of the predicted x0, whatever x_t was.
    assert torch.equal(bridge.reverse(torch.zeros_like(prior), x0, prior, times(6, 6, 6, 6), times(1, 2, 4, 5)), state)


# Discrete: marginals


@pytest.mark.parametrize("exclusive", [True, False])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_discrete_bridge_ends_exactly(exclusive: bool, schedule: str) -> None:
    bridge = DiscreteBridge(T, schedule, exclusive)
    x0, prior, soft = random_mask(exclusive), random_probabilities(exclusive), random_probabilities(exclusive, seed=3)
    at_zero = bridge.marginal(x0, prior, times(0, 0, 0, 0), generator())
    assert torch.equal(at_zero, x0)
    at_end = bridge.marginal(x0, prior, times(T, T, T, T), generator())
    assert torch.equal(at_end, bridge.start(prior, generator()))  # same distribution, same numbers
    x_t = bridge.marginal(x0, prior, times(T, 3, 2, 1), generator())
    assert torch.equal(bridge.reverse(x_t, soft, prior, times(T, 3, 2, 1), times(0, 0, 0, 0), generator()), soft)


@pytest.mark.parametrize("exclusive", [True, False])
def test_discrete_marginal_has_the_mean_of_the_bridge(exclusive: bool) -> None:
    """Five binomial standard errors at each t, over one large volume per probability."""
    bridge, a = DiscreteBridge(T, "cosine", exclusive), bridge_schedule(T, "cosine")
    prior = torch.tensor([0.1, 0.25, 0.5]).view(1, 3, 1, 1, 1).expand(T + 1, 3, 30, 30, 30)
    x0 = torch.tensor([0.0, 0.0, 1.0]).view(1, 3, 1, 1, 1).expand_as(prior)
    found = bridge.marginal(x0, prior, torch.arange(T + 1), generator()).mean((2, 3, 4)).double()
    mean = (prior + a.view(-1, 1, 1, 1, 1) * (x0 - prior))[:, :, 0, 0, 0]
    standard_error = (mean * (1 - mean) / 27000).sqrt()
    assert ((found - mean).abs() <= 5 * standard_error + 1e-7).all()


def test_draws_from_quantised_classes_stay_one_hot_and_unbiased() -> None:
    """128/255 + 128/255 exceeds 1; the excess must not be taken from the last class alone."""
    prior = torch.full((1, 2, 40, 40, 40), 128 / 255)
    draw = DiscreteBridge(T, "linear", exclusive=True).start(prior, generator())
    assert torch.equal(draw.sum(1), torch.ones(1, 40, 40, 40))
    assert (draw.mean((0, 2, 3, 4)) - 0.5).abs().max() < 5 * (0.25 / 64000) ** 0.5


# Discrete: what stays one-hot, what stays nested


def test_exclusive_states_are_one_hot() -> None:
    bridge = DiscreteBridge(T, "linear", exclusive=True)
    x0, prior = random_mask(True), random_probabilities(True)
    x_t = bridge.marginal(x0, prior, times(2, 3, 5, 6), generator())
    x_s = bridge.reverse(
        x_t, random_probabilities(True, seed=9), prior, times(2, 3, 5, 6), times(1, 1, 3, 2), generator()
    )
    for state in (bridge.start(prior, generator()), x_t, x_s):
        assert set(state.unique().tolist()) == {0.0, 1.0}
        assert state.sum(1).max() == 1


def is_nested(regions: Tensor) -> bool:
    return bool((regions.diff(dim=1) >= 0).all())


def test_nested_regions_stay_nested_where_promised() -> None:
    bridge = DiscreteBridge(T, "linear", exclusive=False)
    x0, prior = random_mask(False), random_probabilities(False)
    assert is_nested(x0)
    assert is_nested(prior)
    assert is_nested(bridge.start(prior, generator()))
    assert is_nested(bridge.marginal(x0, prior, times(1, 2, 4, 5), generator()))
    x_t, soft = bridge.start(prior, generator()), random_probabilities(False, seed=9)
    assert is_nested(bridge.reverse(x_t, soft, prior, times(T, T, T, T), times(1, 2, 4, 5), generator()))


def test_posterior_is_nested_where_states_differ_or_priors_agree() -> None:
    bridge = DiscreteBridge(T, "cosine", exclusive=False)
    x0, prior = random_probabilities(False, seed=9), random_probabilities(False)
    t, s = times(2, 3, 5, 6), times(1, 1, 3, 2)
    for index, (child, parent) in enumerate([(0.0, 1.0), (0.0, 0.0), (1.0, 1.0)]):
        x_t = torch.tensor([child, parent]).view(1, 2, 1, 1, 1).expand(4, 2, 5, 6, 7)
        pair = prior[:, :2] if index == 0 else prior[:, :1].expand(-1, 2, -1, -1, -1)
        assert (bridge.posterior(x_t, x0[:, :2], pair, t, s).diff(dim=1) >= -1e-6).all()


# Discrete: the posterior, enumerated


def chain_posterior(x0: Tensor, prior: Tensor, t: int, s: int, schedule: str) -> tuple[Tensor, Tensor, Tensor]:
    """q(x_s), q(x_t) and q(x_s = i | x_t = j) as a matrix [j, i], by one-step transition matrices and Bayes."""
    a = bridge_schedule(T, schedule)
    step = [torch.eye(len(prior), dtype=torch.float64)]
    for k in range(1, T + 1):
        keep = a[k] / a[k - 1]
        step.append(keep * step[0] + (1 - keep) * prior.expand(len(prior), -1))  # rows: from, columns: to
    q_s, s_to_t = x0, step[0]
    for k in range(1, s + 1):
        q_s = q_s @ step[k]
    for k in range(s + 1, t + 1):
        s_to_t = s_to_t @ step[k]
    joint = q_s[:, None] * s_to_t
    return q_s, joint.sum(0), (joint / joint.sum(0)).T


def as_volume(outcomes: Tensor) -> Tensor:
    """Outcome probabilities with 'none' first -> channels (1, R, 1, 1, 1)."""
    return outcomes[1:].view(1, -1, 1, 1, 1)


OUTCOMES = {
    "hard": [1.0, 0.0, 0.0, 0.0],
    "hard foreground": [0.0, 0.0, 1.0, 0.0],
    "soft": [0.1, 0.2, 0.3, 0.4],
}
PAIRS = [(t, s) for t, s in itertools.product(range(1, T + 1), range(1, T)) if s < t]


@pytest.mark.parametrize("x0", OUTCOMES.values(), ids=list(OUTCOMES))
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("exclusive", [True, False])
def test_posterior_equals_enumeration_and_reproduces_the_marginal(
    exclusive: bool, schedule: str, x0: list[float]
) -> None:
    """Categorical over four outcomes; binary: the same numbers merged to two."""
    bridge = DiscreteBridge(T, schedule, exclusive)
    clean = torch.tensor(x0, dtype=torch.float64)
    prior = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    if not exclusive:
        clean, prior = (torch.stack((v[:2].sum(), v[2:].sum())) for v in (clean, prior))
    for t, s in PAIRS:
        q_s, q_t, expected = chain_posterior(clean, prior, t, s, schedule)
        total = torch.zeros_like(prior[1:])
        for j, one_hot in enumerate(torch.eye(len(prior), dtype=torch.float64)):
            found = bridge.posterior(
                as_volume(one_hot), as_volume(clean), as_volume(prior), times(t), times(s)
            ).flatten()
            torch.testing.assert_close(found, expected[j, 1:], atol=1e-12, rtol=0)
            total += q_t[j] * found
        torch.testing.assert_close(total, q_s[1:], atol=1e-12, rtol=0)


@pytest.mark.parametrize("exclusive", [True, False])
def test_impossible_states_fall_back_to_the_marginal(exclusive: bool) -> None:
    """x_t = 1 where prior and predicted x0 are both 0: nothing to condition on, and no NaN."""
    bridge = DiscreteBridge(T, "linear", exclusive)
    zero, one = torch.zeros(1, 1, 2, 2, 2), torch.ones(1, 1, 2, 2, 2)
    assert torch.equal(bridge.posterior(one, zero, zero, times(4), times(2)), zero)
    assert torch.equal(bridge.posterior(zero, one, one, times(4), times(2)), one)


@pytest.mark.parametrize("exclusive", [True, False])
def test_posterior_is_a_probability_for_hard_and_zero_inputs(exclusive: bool) -> None:
    bridge = DiscreteBridge(T, "cosine", exclusive)
    hard = [random_mask(exclusive, seed=k) for k in (4, 5, 6)]
    for x_t, x0, prior in itertools.product(hard, hard, [*hard, random_probabilities(exclusive)]):
        p = bridge.posterior(x_t, x0, prior, times(2, 3, 5, 6), times(0, 1, 4, 2))
        assert (p >= 0).all()
        assert (p <= 1).all()


@pytest.mark.parametrize("exclusive", [True, False])
def test_batch_elements_have_their_own_times(exclusive: bool) -> None:
    bridge = DiscreteBridge(T, "linear", exclusive)
    x_t, x0, prior = random_mask(exclusive), random_probabilities(exclusive, seed=3), random_probabilities(exclusive)
    t, s = times(1, 3, 5, 6), times(0, 2, 1, 5)
    together = bridge.posterior(x_t, x0, prior, t, s)
    for i in range(4):
        one = slice(i, i + 1)
        assert torch.equal(together[one], bridge.posterior(x_t[one], x0[one], prior[one], t[one], s[one]))
