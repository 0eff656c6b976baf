"""What every method promises: a perfect denoiser gives the reference back, ignored voxels do not count."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from nnunet_diffrefine.batch import Foreground, RefineBatch
from nnunet_diffrefine.methods import METHODS, AbstractRefineMethod
from nnunet_diffrefine.methods.base import draw_times, recycle
from nnunet_diffrefine.paths import resource_folder
from nnunet_diffrefine.plans import PAPER_LITERAL, merge, shipped_settings
from tests.builders import (
    LABELS,
    REGIONS,
    TinyDenoiser,
    batch_of,
    for_seeds,
    generator,
    label_maps,
    method_of,
    nnunet_loss,
    stage_one_logits,
    true_output,
    with_ignore,
)

T = 40
FLAT = {"deep_supervision": False}
GAUSSIAN = {"kind": "gaussian", "timesteps": T, "schedule": "cosine", "input_scale": 0.5}
VARIANTS = {
    "bridge-cosine": {"process": {"schedule": "cosine"}},
    "bridge-discrete": {"process": {"state": "discrete"}},
    "bridge-discrete-seeds": {"process": {"state": "discrete"}, "sampling": {"samples": 3}},
    "bridge-surface": {"error": {"surface": 1.0}},
    "mask_diffusion-one-seed": {"process": GAUSSIAN, "sampling": {"samples": 1}},
    "mask_diffusion-ddpm": {"process": GAUSSIAN, "sampling": {"samples": 3, "eta": 1.0}},
    "mask_diffusion-epsilon": {"process": {**GAUSSIAN, "prediction": "epsilon"}},
    "mask_diffusion-v": {"process": {**GAUSSIAN, "prediction": "v"}, "sampling": {"samples": 2, "eta": 0.5}},
}
LITERAL = [
    f"{name}-{PAPER_LITERAL}"
    for name in METHODS
    if (resource_folder("plans") / f"{name}.{PAPER_LITERAL}.json").is_file()
]
SETTINGS = [*METHODS, *sorted(LITERAL), *VARIANTS]
each_method = pytest.mark.parametrize("settings", SETTINGS)
BOTH = pytest.mark.parametrize("foreground", [LABELS, REGIONS], ids=["labels", "regions"])


def values_of(settings: str, **changes: dict[str, object]) -> dict:
    """The preset of a method, shortened to a few time steps and seeds, with the changes of its variant."""
    name = settings.split("-")[0]
    values = shipped_settings(name, {PAPER_LITERAL: settings.endswith(PAPER_LITERAL)})
    process, sampling = values.get("process", {}), values.get("sampling", {})
    few = T if process.get("truncation", 1) == 1 else int(T / process["truncation"] + 1)
    short = {"process": {"timesteps": few}, "sampling": {"steps": 1, "samples": min(sampling.get("samples", 1), 2)}}
    return merge(merge(merge(values, short), VARIANTS.get(settings, {})), {"training": FLAT, **changes})


def build(settings: str, foreground: Foreground, steps: int = 1, **training: float) -> AbstractRefineMethod:
    values = values_of(settings, sampling={"steps": steps}, training={**FLAT, **training})
    return method_of(foreground, settings.split("-")[0], **{k: v for k, v in values.items() if k != "method"})


def step_counts(settings: str) -> list[int]:
    process = build(settings, LABELS).process
    return [1] if process is None else sorted({min(n, process.timesteps) for n in (1, 2, 10, process.timesteps)})


each_method_and_steps = pytest.mark.parametrize(
    ("settings", "steps"), [(settings, steps) for settings in SETTINGS for steps in step_counts(settings)]
)


def predicts_x0(method: AbstractRefineMethod) -> bool:
    return method.config.process.prediction == "x0"


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
@each_method_and_steps
def test_a_perfect_denoiser_gives_back_the_reference(settings: str, foreground: Foreground, steps: int) -> None:
    method, batch = build(settings, foreground, steps), batch_of(foreground)
    calls: list[int] = []

    def oracle(x: Tensor, t: Tensor) -> Tensor:
        calls.extend([int(t[0])] * (len(x) // len(batch.image)))
        return true_output(method, method.target.clean(batch), x, t)

    assert not torch.equal(foreground.decide(foreground.logits(batch.prior)), batch.reference)
    refined = method.refine(oracle, batch.image, batch.prior, generator())
    assert torch.equal(foreground.decide(refined), batch.reference)
    if method.process is not None:
        assert len(calls) == steps * method.seeds
        assert calls[: method.seeds] == [method.process.timesteps] * method.seeds


@BOTH
@each_method_and_steps
def test_no_error_gives_back_stage_one(settings: str, foreground: Foreground, steps: int) -> None:
    method, batch = build(settings, foreground, steps), batch_of(foreground)
    decided = foreground.decide(foreground.logits(batch.prior))
    unchanged = replace(batch, reference=decided, prior=decided)
    oracle = lambda x, t: true_output(method, method.target.clean(unchanged), x, t)  # noqa: E731
    refined = method.refine(oracle, batch.image, decided, generator())
    assert torch.equal(foreground.decide(refined), decided)


@BOTH
@each_method_and_steps
def test_stage_ones_own_logits_give_back_its_probabilities(settings: str, foreground: Foreground, steps: int) -> None:
    method, batch = build(settings, foreground, steps), batch_of(foreground)
    if method.flips or not predicts_x0(method):
        return
    logits = stage_one_logits(foreground, label_maps(foreground))
    torch.testing.assert_close(foreground.probabilities(logits), batch.prior)
    refined = method.refine(lambda x, t: for_seeds(logits, x), batch.image, batch.prior, generator())
    assert torch.equal(foreground.decide(refined), foreground.decide(logits))
    torch.testing.assert_close(foreground.probabilities(refined), batch.prior, atol=1e-4, rtol=0)


@BOTH
@each_method
def test_the_same_seed_gives_the_same_bytes(settings: str, foreground: Foreground) -> None:
    method, batch = build(settings, foreground, steps=step_counts(settings)[-1]), batch_of(foreground)
    network = TinyDenoiser(*method.channels(1))
    with torch.no_grad():
        refined = [method.refine(network, batch.image, batch.prior, generator(seed)) for seed in (1, 1, 2)]
        losses = [method.loss(network, batch, nnunet_loss(foreground), generator(seed)) for seed in (1, 1, 2)]
    assert torch.equal(refined[0], refined[1])
    process = method.config.process
    deterministic = process.kind == "none" or (process.kind == "bridge" and process.state == "deterministic")
    assert torch.equal(refined[0], refined[2]) == deterministic
    assert torch.equal(losses[0], losses[1])
    assert torch.equal(losses[0], losses[2]) == (method.process is None)


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
            assert parameter.grad.any() != timeless(method, name), name


@BOTH
@each_method
@pytest.mark.parametrize("recycling", [0.0, 1.0])
def test_a_perfect_denoiser_has_the_smallest_loss(settings: str, foreground: Foreground, recycling: float) -> None:
    method, batch = build(settings, foreground, recycling=recycling), batch_of(foreground, size=4)
    loss = nnunet_loss(foreground)

    clean = method.target.clean(batch)

    def oracle(x: Tensor, t: Tensor) -> Tensor:
        return true_output(method, clean[rows_of(x, method, batch)], x, t)

    best = method.loss(oracle, batch, loss, generator())
    if not predicts_x0(method):
        assert best < 1e-5
    elif not method.flips:
        torch.testing.assert_close(
            best, method.target.loss(foreground.logits(batch.reference), batch, loss), atol=1e-3, rtol=0
        )
    anything = TinyDenoiser(*method.channels(1))
    assert best < method.loss(anything, batch, loss, generator()) - 0.1


def rows_of(x: Tensor, method: AbstractRefineMethod, batch: RefineBatch) -> list[int]:
    """Which elements of the batch a denoiser's input holds, told by their conditions."""
    first = method.condition(batch.image, batch.prior)[:, :1]
    return [int((first - one[None, :1]).flatten(1).abs().sum(1).argmin()) for one in x]


def timeless(method: AbstractRefineMethod, parameter: str) -> bool:
    """Whether a parameter of TinyDenoiser never matters, because t = 0 throughout."""
    return method.process is None and parameter == "time.weight"


def mistaken(batch: RefineBatch, foreground: Foreground) -> Tensor:
    """nnU-Net's target with another label, or the other answer of every region, at each voxel that counts."""
    if foreground.exclusive:
        return torch.where(batch.valid > 0, (batch.target + 1) % foreground.heads, batch.target)
    regions = foreground.channels
    changed = torch.where(batch.valid > 0, ~batch.target[:, :regions], batch.target[:, :regions])
    return torch.cat((changed, batch.target[:, regions:]), 1)


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
        counted = replace(counted, target=mistaken(batch, foreground))
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
    method, batch = build(settings, foreground, steps=step_counts(settings)[-1]), batch_of(foreground)
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
    assert all(p.grad.any() for name, p in network.named_parameters() if not timeless(method, name))


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
