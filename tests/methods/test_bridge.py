"""The bridge: its states, where they end, and what recycling hides from the denoiser."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from nnunet_diffrefine.batch import Foreground, RefineBatch
from nnunet_diffrefine.config import ConfigError, RefineConfig
from nnunet_diffrefine.methods.bridge import Bridge
from tests.builders import (
    LABELS,
    REGIONS,
    SPACE,
    TinyDenoiser,
    batch_of,
    generator,
    method_of,
    nnunet_loss,
    with_ignore,
)

T = 4
BOTH = pytest.mark.parametrize("foreground", [LABELS, REGIONS], ids=["labels", "regions"])
STATES = pytest.mark.parametrize("state", ["deterministic", "discrete"])


class Recording:
    """A denoiser that keeps its inputs and whether gradients were on."""

    def __init__(self, method: Bridge) -> None:
        self.network = TinyDenoiser(*method.channels(1))
        self.inputs: list[Tensor] = []
        self.times: list[Tensor] = []
        self.gradients: list[bool] = []

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        self.inputs.append(x.detach())
        self.times.append(t)
        self.gradients.append(torch.is_grad_enabled())
        return self.network(x, t)


def bridge(
    foreground: Foreground, state: str = "deterministic", steps: int = 1, samples: int = 1, **training
) -> Bridge:
    process, sampling = {"timesteps": T, "state": state}, {"steps": steps, "samples": samples}
    return method_of(foreground, process=process, sampling=sampling, training=training)


def record(method: Bridge, batch: RefineBatch, seed: int = 0) -> Recording:
    denoiser = Recording(method)
    method.loss(denoiser, batch, nnunet_loss(method.foreground), generator(seed))
    return denoiser


def with_other_labels(batch: RefineBatch) -> RefineBatch:
    """The same image and prior with another reference."""
    other = replace(batch, reference=batch.reference.flip(2))
    assert not torch.equal(other.reference, batch.reference)
    return other


@BOTH
@STATES
def test_at_the_end_the_denoiser_learns_nothing_of_the_reference(foreground: Foreground, state: str) -> None:
    method, batch = bridge(foreground, state, prior_end=1.0), batch_of(foreground, size=4)
    first, second = record(method, batch), record(method, with_other_labels(batch))
    assert (first.times[-1] == T).all()
    assert len(first.inputs) == 1  # nothing to recycle
    assert torch.equal(first.inputs[0], second.inputs[0])
    image, prior, state_at_end = first.inputs[0].split((1, 2, 2), 1)
    assert torch.equal(image, batch.image)
    assert torch.equal(prior, batch.prior)
    if state == "deterministic":
        assert torch.equal(state_at_end, batch.prior)


@BOTH
@STATES
@pytest.mark.parametrize("recycling", [0.0, 1.0])
def test_before_the_end_recycling_hides_the_reference(foreground: Foreground, state: str, recycling: float) -> None:
    method = bridge(foreground, state, prior_end=0.0, recycling=recycling)
    batch = batch_of(foreground, size=8)
    first, second = record(method, batch), record(method, with_other_labels(batch))
    before_end = first.times[-1] < T
    assert before_end.any()
    states = first.inputs[-1][before_end, -2:], second.inputs[-1][before_end, -2:]
    assert torch.equal(*states) == (recycling == 1.0)
    assert not torch.equal(states[0], batch.prior[before_end])


@BOTH
@STATES
def test_recycled_predictions_are_made_at_the_end_without_gradient(foreground: Foreground, state: str) -> None:
    method, batch = bridge(foreground, state, prior_end=0.3, recycling=1.0), batch_of(foreground, size=8)
    denoiser = record(method, batch)
    rows = denoiser.times[1] < T
    assert 0 < rows.sum() < 8
    assert denoiser.gradients == [False, True]
    assert (denoiser.times[0] == T).all()
    image, prior, end = denoiser.inputs[0].split((1, 2, 2), 1)
    assert torch.equal(image, batch.image[rows])
    assert torch.equal(prior, batch.prior[rows])
    if state == "deterministic":
        assert torch.equal(end, prior)
        with torch.no_grad():
            own = foreground.probabilities(denoiser.network(denoiser.inputs[0], denoiser.times[0]))
        a = (1 - denoiser.times[1][rows] / T).view(-1, 1, 1, 1, 1)
        torch.testing.assert_close(denoiser.inputs[1][rows, -2:], prior + a * (own - prior))
    else:
        assert set(end.unique().tolist()) == {0.0, 1.0}


@BOTH
def test_states_lie_between_reference_and_prior(foreground: Foreground) -> None:
    foreground = with_ignore(foreground)
    method, batch = bridge(foreground, prior_end=0.0, recycling=0.0), batch_of(foreground, size=8)
    denoiser = record(method, batch)
    t = denoiser.times[0]
    assert set(t.tolist()) >= {1, 2, T}
    a = (1 - t / T).view(-1, 1, 1, 1, 1)
    error = (batch.reference - batch.prior) * batch.valid
    torch.testing.assert_close(denoiser.inputs[0][:, -2:], batch.prior + a * error)


@BOTH
def test_discrete_states_are_draws_of_the_deterministic_ones(foreground: Foreground) -> None:
    draws, one = 400, batch_of(foreground, size=1)
    many = {name: value.expand(draws, *value.shape[1:]) for name, value in vars(one).items()}
    denoiser = record(bridge(foreground, "discrete", prior_end=0.0, recycling=0.0), RefineBatch(**many))
    x_t, t = denoiser.inputs[0][:, -2:], denoiser.times[0]
    assert set(x_t.unique().tolist()) == {0.0, 1.0}
    for time in range(1, T + 1):
        mean, n = x_t[t == time].mean(0), (t == time).sum()
        expected = (one.prior + (1 - time / T) * (one.reference - one.prior))[0]
        assert (mean - expected).abs().max() < 5.5 * 0.5 / n**0.5
        assert abs((mean - expected).mean()) < 0.01


@BOTH
def test_the_deterministic_bridge_mirrors_with_its_denoiser(foreground: Foreground) -> None:
    method, batch = bridge(foreground, steps=3), batch_of(foreground)
    pointwise = TinyDenoiser(*method.channels(1), kernel=1)
    result = method.refine(pointwise, batch.image, batch.prior, generator())
    for axes in ((2,), (3, 4), (2, 3, 4)):
        mirrored = method.refine(pointwise, batch.image.flip(axes), batch.prior.flip(axes), generator())
        torch.testing.assert_close(mirrored.flip(axes), result)


@BOTH
def test_a_deterministic_state_needs_one_pass_a_step_however_many_samples_are_set(foreground: Foreground) -> None:
    batch = batch_of(foreground)
    single, many = bridge(foreground, steps=3), bridge(foreground, steps=3, samples=5)
    denoiser = Recording(many)
    expected = single.refine(denoiser.network, batch.image, batch.prior, generator())
    assert torch.equal(many.refine(denoiser, batch.image, batch.prior, generator()), expected)
    assert [int(t[0]) for t in denoiser.times] == [4, 2, 1]
    last = denoiser.inputs[-1]
    assert torch.equal(expected, denoiser.network(last, denoiser.times[-1]))


@BOTH
def test_samples_of_a_discrete_state_are_averaged_in_probability(foreground: Foreground) -> None:
    batch = batch_of(foreground)
    many = bridge(foreground, "discrete", steps=1, samples=3)
    denoiser = Recording(many)
    result = many.refine(denoiser, batch.image, batch.prior, generator(5))
    assert len(denoiser.inputs) == 1
    passes = denoiser.network(denoiser.inputs[0], denoiser.times[0]).chunk(3)
    assert not torch.equal(passes[0], passes[1])
    mean = torch.stack([foreground.probabilities(logits) for logits in passes]).mean(0)
    torch.testing.assert_close(foreground.probabilities(result), mean, atol=3e-4, rtol=0)


@BOTH
def test_deep_supervision_reaches_the_loss_and_the_finest_output_is_refined(foreground: Foreground) -> None:
    method, batch = bridge(foreground, recycling=1.0, prior_end=0.0), batch_of(foreground, size=4)
    network = TinyDenoiser(*method.channels(1))

    def deep(x: Tensor, t: Tensor) -> list[Tensor]:
        finest = network(x, t)
        return [finest, finest[..., ::2, ::2, ::2]]

    seen: list = []
    target = [batch.target, batch.target[..., ::2, ::2, ::2]]
    method.loss(deep, replace(batch, target=target), lambda out, wanted: seen.extend((out, wanted)), generator())
    assert [y.shape[2:] for y in seen[0]] == [SPACE, tuple(n // 2 for n in SPACE)]
    assert seen[1] is target
    refined = [method.refine(d, batch.image, batch.prior, generator()) for d in (deep, network)]
    assert torch.equal(*refined)


def test_another_process_is_refused() -> None:
    config = RefineConfig.from_dict({"process": {"kind": "gaussian"}})
    with pytest.raises(ConfigError, match=r"process.kind.*bridge needs 'bridge'"):
        Bridge(config, LABELS)


@BOTH
def test_channels(foreground: Foreground) -> None:
    assert bridge(foreground).channels(4) == (4 + 2 + 2, foreground.heads)
