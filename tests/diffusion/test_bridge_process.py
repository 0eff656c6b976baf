"""Bridges: end points, means, and the posterior and its calibration against enumerations of the Markov chain."""

import itertools

import pytest
import torch
from torch import Tensor

from nnunet_diffrefine.diffusion import DeterministicBridge, DiscreteBridge, timestep_sequence
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
    """Twelve equal classes round up to 22/255, 1.035 in all; the excess must not be taken from the last class alone."""
    prior = torch.full((1, 12, 40, 40, 40), 22 / 255)
    draw = DiscreteBridge(T, "linear", exclusive=True).start(prior, generator())
    assert torch.equal(draw.sum(1), torch.ones(1, 40, 40, 40))
    p = 1 / 12
    assert (draw.mean((0, 2, 3, 4)) - p).abs().max() < 5 * (p * (1 - p) / 64000) ** 0.5


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


def transition(prior: Tensor, s: int, t: int, a: Tensor) -> Tensor:
    """q(x_t = j | x_s = i) as a matrix [i, j], multiplied from one-step matrices."""
    matrix = torch.eye(len(prior), dtype=torch.float64)
    for k in range(s + 1, t + 1):
        keep = a[k] / a[k - 1]
        matrix = keep * matrix + (1 - keep) * matrix @ prior.expand(len(prior), -1)
    return matrix


def chain_joint(prior: Tensor, t: int, s: int, a: Tensor) -> Tensor:
    """q(x_s = i, x_t = j | x_0 = k) as [k, i, j]."""
    return transition(prior, 0, s, a)[:, :, None] * transition(prior, s, t, a)


def mixture(x0: Tensor, joint: Tensor) -> Tensor:
    """sum_k x0_k q(x_s = i | x_t = j, x_0 = k) as [j, i]: each clean value's posterior by Bayes, then their mean."""
    return torch.einsum("k,kij->ji", x0, joint / joint.sum(1, keepdim=True))


def plug_in(x0: Tensor, joint: Tensor) -> Tensor:
    """D3PM Eq. 4 as [j, i]: the joint summed over clean values, then normalised."""
    summed = torch.einsum("k,kij->ji", x0, joint)
    return summed / summed.sum(1, keepdim=True)


def calibrated_x0(truth: Tensor, prior: Tensor, t: int, a: Tensor) -> Tensor:
    """The exact p(x_0 = k | x_t = j) as [j, k]: what a perfect denoiser that sees x_t answers."""
    joint = truth[:, None] * transition(prior, 0, t, a)
    return (joint / joint.sum(0)).T


def as_volume(outcomes: Tensor) -> Tensor:
    """Outcome probabilities with 'none' first -> channels (1, R, 1, 1, 1)."""
    return outcomes[1:].view(1, -1, 1, 1, 1)


OUTCOMES = {
    "hard": [1.0, 0.0, 0.0, 0.0],
    "hard foreground": [0.0, 0.0, 1.0, 0.0],
    "soft": [0.1, 0.2, 0.3, 0.4],
}
PAIRS = [(t, s) for t, s in itertools.product(range(1, T + 1), range(1, T)) if s < t]


def found_posterior(bridge: DiscreteBridge, state: int, x0: Tensor, prior: Tensor, t: int, s: int) -> Tensor:
    """Outcome probabilities of x_s with 'none' first, for one voxel."""
    x_t = torch.eye(len(prior), dtype=torch.float64)[state]
    found = bridge.posterior(as_volume(x_t), as_volume(x0), as_volume(prior), times(t), times(s)).flatten()
    return torch.cat((1 - found.sum(0, keepdim=True), found))


@pytest.mark.parametrize("x0", OUTCOMES.values(), ids=list(OUTCOMES))
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("exclusive", [True, False])
def test_posterior_equals_the_enumerated_mixture(exclusive: bool, schedule: str, x0: list[float]) -> None:
    """Categorical over four outcomes; binary: the same numbers merged to two."""
    bridge, a = DiscreteBridge(T, schedule, exclusive), bridge_schedule(T, schedule)
    clean = torch.tensor(x0, dtype=torch.float64)
    prior = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    if not exclusive:
        clean, prior = (torch.stack((v[:2].sum(), v[2:].sum())) for v in (clean, prior))
    for t, s in PAIRS:
        found = torch.stack([found_posterior(bridge, j, clean, prior, t, s) for j in range(len(prior))])
        torch.testing.assert_close(found, mixture(clean, chain_joint(prior, t, s, a)), atol=1e-12, rtol=0)


# Discrete: several steps with a calibrated denoiser

CALIBRATION_T = 10
TRUTH_AND_PRIOR = {  # 'none' first; outcome 1 is truly 0.3 and 0.6 in the prior
    "classes, binary": (True, [0.7, 0.3], [0.4, 0.6]),
    "classes, categorical": (True, [0.5, 0.3, 0.2], [0.1, 0.6, 0.3]),
    "region": (False, [0.7, 0.3], [0.4, 0.6]),
}


@pytest.mark.parametrize("steps", [1, 3, 10])
@pytest.mark.parametrize(("exclusive", "truth", "prior"), TRUTH_AND_PRIOR.values(), ids=list(TRUTH_AND_PRIOR))
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_reversal_with_a_calibrated_denoiser_keeps_every_marginal(
    schedule: str, exclusive: bool, truth: list[float], prior: list[float], steps: int
) -> None:
    """The distribution is propagated exactly; x_s must be that of the forward process, down to the truth at 0."""
    bridge, a = DiscreteBridge(CALIBRATION_T, schedule, exclusive), bridge_schedule(CALIBRATION_T, schedule)
    clean, end = (torch.tensor(v, dtype=torch.float64) for v in (truth, prior))
    distribution = end
    for t, s in itertools.pairwise(timestep_sequence(CALIBRATION_T, steps)):
        x0 = calibrated_x0(clean, end, t, a)
        rows = [found_posterior(bridge, j, x0[j], end, t, s) for j in range(len(end))]
        distribution = distribution @ torch.stack(rows)
        torch.testing.assert_close(distribution, clean @ transition(end, 0, s, a), atol=1e-12, rtol=0)
    assert distribution[1].item() == pytest.approx(0.3, abs=1e-12)


@pytest.mark.parametrize(("steps", "last_x0"), [(1, 0.300), (3, 0.314), (10, 0.369)])
def test_the_plug_in_of_d3pm_drifts_to_the_prior_as_documented(steps: int, last_x0: float) -> None:
    """Why the posterior is a mixture: with the same calibrated denoiser, Eq. 4 misses the truth of 0.3."""
    a = bridge_schedule(CALIBRATION_T, "linear")
    truth, prior = (torch.tensor(v, dtype=torch.float64) for v in ([0.7, 0.3], [0.4, 0.6]))
    distribution = prior
    for t, s in itertools.pairwise(timestep_sequence(CALIBRATION_T, steps)):
        x0, joint = calibrated_x0(truth, prior, t, a), chain_joint(prior, t, s, a)
        rows = x0 if s == 0 else torch.stack([plug_in(x0[j], joint)[j] for j in range(2)])  # at 0, x0 is returned
        distribution = distribution @ rows
    assert distribution[1].item() == pytest.approx(last_x0, abs=5e-4)


# Discrete: the posterior at its edges


@pytest.mark.parametrize("exclusive", [True, False])
def test_posterior_at_zero_is_the_predicted_x0(exclusive: bool) -> None:
    """As :meth:`reverse` returns it there, whatever x_t is, where the prior rules nothing out."""
    bridge = DiscreteBridge(T, "cosine", exclusive)
    x0, prior = random_probabilities(exclusive, seed=3), random_probabilities(exclusive)
    found = bridge.posterior(random_mask(exclusive), x0, prior, times(1, 2, 4, T), times(0, 0, 0, 0))
    torch.testing.assert_close(found, x0, atol=1e-6, rtol=0)


def test_clean_values_that_cannot_have_led_to_x_t_are_left_out() -> None:
    """The prior never draws outcome 2, so x_t = 2 stems from x_0 = 2, however small its predicted probability."""
    bridge = DiscreteBridge(T, "linear", exclusive=True)
    x0, prior = (torch.tensor(v, dtype=torch.float64) for v in ([0.6, 0.3, 0.1], [0.5, 0.5, 0.0]))
    found = found_posterior(bridge, 2, x0, prior, 4, 2)
    torch.testing.assert_close(found, torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64), atol=1e-12, rtol=0)


@pytest.mark.parametrize("exclusive", [True, False])
def test_impossible_states_fall_back_to_the_marginal(exclusive: bool) -> None:
    """x_t = 1 where prior and predicted x0 are both 0: nothing to condition on, and no NaN."""
    bridge = DiscreteBridge(T, "linear", exclusive)
    zero, one = torch.zeros(1, 1, 2, 2, 2), torch.ones(1, 1, 2, 2, 2)
    assert torch.equal(bridge.posterior(one, zero, zero, times(4), times(2)), zero)
    assert torch.equal(bridge.posterior(zero, one, one, times(4), times(2)), one)


@pytest.mark.parametrize("exclusive", [True, False])
def test_posterior_is_a_probability_for_hard_and_vanishing_inputs(exclusive: bool) -> None:
    bridge = DiscreteBridge(T, "cosine", exclusive)
    hard = [random_mask(exclusive, seed=k) for k in (4, 5, 6)]
    soft, subnormal = random_probabilities(exclusive), torch.full_like(hard[0], 1e-40)
    for x_t, x0, prior in itertools.product(hard, [*hard, soft], [*hard, soft, subnormal]):
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
