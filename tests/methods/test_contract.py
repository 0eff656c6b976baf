"""What every method promises: a perfect denoiser gives the reference back, ignored voxels do not count."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from nnunet_diffrefine.batch import Foreground, RefineBatch
from nnunet_diffrefine.methods import METHODS, AbstractRefineMethod
from nnunet_diffrefine.methods.base import draw_times, recycle
from tests.builders import (
    LABELS,
    REGIONS,
    TinyDenoiser,
    batch_of,
    generator,
    label_maps,
    method_of,
    nnunet_loss,
    stage_one_logits,
    true_output,
    with_ignore,
)

T = 4
FLAT = {"deep_supervision": False}
GAUSSIAN = {"kind": "gaussian", "timesteps": T, "schedule": "cosine", "input_scale": 0.5}
SETTINGS = {
    "bridge-deterministic": {"process": {"timesteps": T}},
    "bridge-cosine": {"process": {"timesteps": T, "schedule": "cosine"}},
    "bridge-discrete": {"process": {"timesteps": T, "state": "discrete"}},
    "bridge-discrete-seeds": {"process": {"timesteps": T, "state": "discrete"}, "sampling": {"samples": 3}},
    "mask_diffusion-x0": {"process": GAUSSIAN},
    "mask_diffusion-seeds": {"process": GAUSSIAN, "sampling": {"samples": 3, "eta": 1.0}},
    "mask_diffusion-epsilon": {"process": {**GAUSSIAN, "prediction": "epsilon"}},
    "mask_diffusion-v": {"process": {**GAUSSIAN, "prediction": "v"}, "sampling": {"samples": 2, "eta": 0.5}},
}
each_method = pytest.mark.parametrize("settings", list(SETTINGS))
predicting_masks = pytest.mark.parametrize("settings", [k for k in SETTINGS if not k.endswith(("epsilon", "v"))])
BOTH = pytest.mark.parametrize("foreground", [LABELS, REGIONS], ids=["labels", "regions"])


def build(settings: str, foreground: Foreground, steps: int = 1, **training: float) -> AbstractRefineMethod:
    values = SETTINGS[settings]
    sampling = {**values.get("sampling", {}), "steps": steps}
    return method_of(
        foreground, settings.split("-")[0], process=values["process"], sampling=sampling, training={**FLAT, **training}
    )


def test_every_method_is_here() -> None:
    assert {name.split("-")[0] for name in SETTINGS} == set(METHODS)


@BOTH
@each_method
def test_channels_are_what_the_denoiser_gets_and_gives(settings: str, foreground: Foreground) -> None:
    method, batch = build(settings, foreground), batch_of(foreground, image_channels=3)
    inputs, outputs = method.channels(3)
    network = TinyDenoiser(inputs, outputs)
    method.loss(network, batch, nnunet_loss(foreground), generator())
    refined = method.refine(network, batch.image, batch.prior, generator())
    assert refined.shape == (2, foreground.heads, *batch.image.shape[2:])


@BOTH
@each_method
@pytest.mark.parametrize("steps", [1, 2, T])
def test_a_perfect_denoiser_gives_back_the_reference(settings: str, foreground: Foreground, steps: int) -> None:
    method, batch = build(settings, foreground, steps), batch_of(foreground)
    calls: list[int] = []

    def oracle(x: Tensor, t: Tensor) -> Tensor:
        calls.append(int(t[0]))
        return true_output(method, batch.reference, x, t)

    assert not torch.equal(foreground.decide(foreground.logits(batch.prior)), batch.reference)
    refined = method.refine(oracle, batch.image, batch.prior, generator())
    assert torch.equal(foreground.decide(refined), batch.reference)
    seeds = SETTINGS[settings].get("sampling", {}).get("samples", 1)
    assert len(calls) == steps * seeds
    assert calls[::steps] == [T] * seeds


@BOTH
@predicting_masks
@pytest.mark.parametrize("steps", [1, 2, T])
def test_stage_ones_own_logits_give_back_its_decision(settings: str, foreground: Foreground, steps: int) -> None:
    method, batch = build(settings, foreground, steps), batch_of(foreground)
    logits = stage_one_logits(foreground, label_maps(foreground))
    torch.testing.assert_close(foreground.probabilities(logits), batch.prior)
    refined = method.refine(lambda x, t: logits, batch.image, batch.prior, generator())
    assert torch.equal(foreground.decide(refined), foreground.decide(logits))
    torch.testing.assert_close(foreground.probabilities(refined), batch.prior, atol=1e-4, rtol=0)


@BOTH
@each_method
def test_the_same_seed_gives_the_same_bytes(settings: str, foreground: Foreground) -> None:
    method, batch = build(settings, foreground, steps=2), batch_of(foreground)
    network = TinyDenoiser(*method.channels(1))
    with torch.no_grad():
        refined = [method.refine(network, batch.image, batch.prior, generator(seed)) for seed in (1, 1, 2)]
        losses = [method.loss(network, batch, nnunet_loss(foreground), generator(seed)) for seed in (1, 1, 2)]
    assert torch.equal(refined[0], refined[1])
    deterministic = SETTINGS[settings]["process"].get("kind") is None and "discrete" not in settings
    assert torch.equal(refined[0], refined[2]) == deterministic
    assert torch.equal(losses[0], losses[1])
    assert not torch.equal(losses[0], losses[2])


@BOTH
@each_method
def test_loss_is_finite_and_trains_every_parameter(settings: str, foreground: Foreground) -> None:
    for ignored in (foreground, with_ignore(foreground)):
        method, batch = build(settings, ignored, recycling=1.0, prior_end=0.0), batch_of(ignored, size=4)
        network = TinyDenoiser(*method.channels(1))
        loss = method.loss(network, batch, nnunet_loss(ignored), generator())
        assert loss.ndim == 0
        assert torch.isfinite(loss)
        loss.backward()
        for name, parameter in network.named_parameters():
            assert torch.isfinite(parameter.grad).all(), name
            assert parameter.grad.any(), name


@BOTH
@each_method
@pytest.mark.parametrize("recycling", [0.0, 1.0])
def test_a_perfect_denoiser_has_the_smallest_loss(settings: str, foreground: Foreground, recycling: float) -> None:
    method, batch = build(settings, foreground, recycling=recycling), batch_of(foreground, size=4)
    loss = nnunet_loss(foreground)

    def oracle(x: Tensor, t: Tensor) -> Tensor:
        return true_output(method, batch.reference[rows_of(x, batch)], x, t)

    best = method.loss(oracle, batch, loss, generator())
    if method.config.process.prediction == "x0":
        smallest = loss(foreground.logits(batch.reference), batch.target)
        torch.testing.assert_close(best, smallest, atol=1e-3, rtol=0)
        assert best < method.loss(lambda x, t: foreground.logits(x[:, 1:3]), batch, loss, generator()) - 0.1
    else:
        assert best < 1e-6
        assert method.loss(lambda x, t: 0 * x[:, -2:], batch, loss, generator()) > 0.1


def rows_of(x: Tensor, batch: RefineBatch) -> list[int]:
    """Which elements of the batch a denoiser's input holds, told by their images."""
    return [int((batch.image == one[None, :1]).flatten(1).all(1).nonzero()) for one in x]


@BOTH
@each_method
@pytest.mark.parametrize("recycling", [0.0, 0.5])
def test_labels_under_the_ignore_mask_do_not_count(settings: str, foreground: Foreground, recycling: float) -> None:
    foreground = with_ignore(foreground)
    method, batch = build(settings, foreground, recycling=recycling, prior_end=0.2), batch_of(foreground, size=4)
    other = replace(batch, reference=torch.where(batch.valid > 0, batch.reference, 1 - batch.reference))
    if not foreground.exclusive:  # label maps hold the ignore label itself there, region channels may hold anything
        changed = torch.where(batch.valid > 0, batch.target[:, :2], ~batch.target[:, :2])
        other = replace(other, target=torch.cat((changed, batch.target[:, 2:]), 1))
    assert (other.reference != batch.reference).any()
    results = []
    for one in (batch, other):
        network = TinyDenoiser(*method.channels(1), seed=3)
        loss = method.loss(network, one, nnunet_loss(foreground), generator())
        loss.backward()
        results.append([loss, *(p.grad for p in network.parameters())])
    for given, wanted in zip(*results, strict=True):
        assert torch.equal(given, wanted)
    if recycling == 0:
        counted = replace(batch, reference=torch.where(batch.valid > 0, 1 - batch.reference, batch.reference))
        network = TinyDenoiser(*method.channels(1), seed=3)
        assert not torch.equal(method.loss(network, counted, nnunet_loss(foreground), generator()), results[0][0])


@BOTH
@each_method
def test_no_voxel_but_ignored_ones_is_no_disaster(settings: str, foreground: Foreground) -> None:
    foreground = with_ignore(foreground)
    method, batch = build(settings, foreground), batch_of(foreground)
    everything = torch.full_like(label_maps(foreground), float(foreground.ignore_label))
    target = everything if foreground.exclusive else torch.cat((0 * everything, 0 * everything, everything > 0), 1)
    reference, valid = foreground.from_target(target)
    network = TinyDenoiser(*method.channels(1))
    nothing = RefineBatch(batch.image, batch.prior, reference, valid, target)
    loss = method.loss(network, nothing, nnunet_loss(foreground), generator())
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(p.grad).all() for p in network.parameters())


@BOTH
@each_method
def test_nothing_given_is_changed(settings: str, foreground: Foreground) -> None:
    foreground = with_ignore(foreground)
    method, batch = build(settings, foreground, steps=2), batch_of(foreground)
    given = (batch.image, batch.prior, batch.reference, batch.valid, batch.target)
    before = [tensor.clone() for tensor in given]
    network = TinyDenoiser(*method.channels(1))
    method.loss(network, batch, nnunet_loss(foreground), generator())
    method.refine(network, batch.image, batch.prior, generator())
    assert all(torch.equal(a, b) for a, b in zip(before, given, strict=True))


@each_method
def test_recycling_costs_no_gradient_under_mixed_precision(settings: str) -> None:
    """Autocast keeps casts of weights; made without gradient they would cut the training pass off from its weights."""
    method, batch = build(settings, LABELS, recycling=1.0, prior_end=0.0), batch_of(LABELS, size=4)
    network = TinyDenoiser(*method.channels(1))
    with torch.autocast("cpu", torch.bfloat16):
        loss = method.loss(network, batch, nnunet_loss(LABELS), generator())
    loss.float().backward()
    assert all(p.grad is not None and p.grad.any() for p in network.parameters())


class TestDrawTimes:
    def test_share_at_the_end_and_uniform_elsewhere(self) -> None:
        n, end = 40_000, 0.3
        times = draw_times(n, 5, end, generator())
        shares = torch.bincount(times, minlength=6)[1:] / n
        expected = torch.tensor([0.7 / 5] * 4 + [0.3 + 0.7 / 5])
        assert times.shape == (n,)
        assert times.dtype == torch.int64
        assert (times >= 1).all()
        torch.testing.assert_close(shares, expected, atol=4 * (0.44 * 0.56 / n) ** 0.5, rtol=0)

    def test_neighbours_are_independent(self) -> None:
        at_end = (draw_times(40_000, 1000, 0.5, generator()) == 1000).float()
        assert abs((at_end[1:] * at_end[:-1]).mean() - 0.25) < 0.01

    @pytest.mark.parametrize(("end", "expected"), [(1.0, {7}), (0.0, set(range(1, 8)))])
    def test_extremes(self, end: float, expected: set[int]) -> None:
        assert set(draw_times(500, 7, end, generator()).tolist()) == expected

    def test_one_timestep_leaves_no_choice(self) -> None:
        assert set(draw_times(50, 1, 0.2, generator()).tolist()) == {1}


class TestRecycle:
    reference = torch.arange(4000.0).view(1000, 1, 2, 2)
    t = torch.arange(1000) % T + 1

    def predict(self, rows: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        assert (self.t[rows] < T).all()
        return -rows.float().view(-1, 1, 1, 1).expand(-1, 1, 2, 2).double()

    @pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
    def test_a_share_of_the_rows_before_the_end_becomes_predictions(self, share: float) -> None:
        copy = self.reference.clone()
        mixed = recycle(self.reference, self.t, T, share, self.predict, generator())
        own = (mixed != self.reference).flatten(1).any(1)
        assert not own[self.t == T].any()
        assert abs(own[self.t < T].float().mean() - share) < 0.06
        rows = own.nonzero().flatten()
        assert torch.equal(mixed[rows], -rows.float().view(-1, 1, 1, 1).expand(-1, 1, 2, 2))
        assert torch.equal(mixed[~own], self.reference[~own])
        assert mixed.dtype == self.reference.dtype
        assert torch.equal(self.reference, copy)

    @pytest.mark.parametrize(("share", "t"), [(0.0, 1), (1.0, T)])
    def test_the_model_is_not_asked_in_vain(self, share: float, t: int) -> None:
        def never(rows: Tensor) -> Tensor:
            raise AssertionError(f"asked for {len(rows)} rows")

        times = torch.full((1000,), t)
        assert torch.equal(recycle(self.reference, times, T, share, never, generator()), self.reference)

    def test_it_is_asked_once_for_all_rows(self) -> None:
        asked: list[Tensor] = []

        def predict(rows: Tensor) -> Tensor:
            asked.append(rows)
            return self.reference[rows]

        recycle(self.reference, self.t, T, 1.0, predict, generator())
        assert len(asked) == 1
        assert torch.equal(asked[0], (self.t < T).nonzero().flatten())
