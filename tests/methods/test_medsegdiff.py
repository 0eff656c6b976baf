"""MedSegDiff: image and state encoded apart, joined step by step; the printed loss and sampler as a switch."""

import pytest
import torch
from torch import Tensor

from nnunet_diffrefine.batch import Foreground
from nnunet_diffrefine.config import ConfigError
from nnunet_diffrefine.diffusion.process import per_sample
from nnunet_diffrefine.methods.medsegdiff import MedSegDiff
from nnunet_diffrefine.networks.fusion import DynamicFusion
from nnunet_diffrefine.plans import merge, shipped_settings
from tests.builders import LABELS, REGIONS, TinyDenoiser, batch_of, generator, method_of, nnunet_loss
from tests.methods.learning import mean_loss, train
from tests.networks.feature_modules import taught
from tests.networks.planned_networks import denoiser_of

BOTH = pytest.mark.parametrize("foreground", [LABELS, REGIONS], ids=["labels", "regions"])
FORMS = pytest.mark.parametrize("literal", [False, True], ids=["sound", "literal"])


def medsegdiff(foreground: Foreground, literal: bool = False, **changes: dict) -> MedSegDiff:
    shipped = shipped_settings("medsegdiff", {"paper_literal": literal})
    values = merge(shipped, {"training": {"deep_supervision": False}, **changes})
    return method_of(foreground, **{k: v for k, v in values.items() if k != "method"}, name="medsegdiff")


@BOTH
@FORMS
def test_the_image_encoder_sees_the_image_alone_and_once(foreground: Foreground, literal: bool) -> None:
    method, batch = medsegdiff(foreground, literal, sampling={"steps": 3, "samples": 2}), batch_of(foreground)
    denoiser, seen = denoiser_of(method), []
    denoiser.condition.register_forward_hook(lambda module, arguments, output: seen.append(arguments[0]))
    with torch.no_grad():
        method.evidence(denoiser, batch.image, batch.prior, generator())
    assert len(seen) == 1
    assert torch.equal(seen[0], batch.image)
    assert denoiser.unet.encoder.stages[0](torch.zeros(1, 1 + 2, 4, 4, 4)).shape[1] == 4  # image and state


@BOTH
def test_before_training_the_two_encodings_are_added(foreground: Foreground) -> None:
    """Eq. 2, D(E_I + E_x, t): what the fusion starts from."""
    dynamic, batch = denoiser_of(medsegdiff(foreground)), batch_of(foreground)
    method = medsegdiff(foreground)
    x = torch.cat((batch.image, torch.randn(batch.prior.shape, generator=generator())), 1)
    t, features = torch.tensor([3, 900]), dynamic.condition_features(batch.image)
    sums = []

    def add(module: DynamicFusion, arguments: tuple[Tensor, Tensor], output: Tensor) -> Tensor:
        sums.append(torch.equal(output, arguments[0] + arguments[1]))
        return output

    for fusion in dynamic.condition.fusions:
        assert isinstance(fusion, DynamicFusion)
        fusion.register_forward_hook(add)
    dynamic(x, t, features)
    assert sums == [True] * 3
    train(method, dynamic, batch, steps=2)
    sums.clear()
    dynamic(x, t, features)
    assert sums == [False] * 3


@BOTH
def test_once_taught_the_state_decides_how_much_of_the_image_counts(foreground: Foreground) -> None:
    """Eq. 3: what the image's features add depends on the state; with a sum alone it would not, at the first stage."""
    fusion = taught(denoiser_of(medsegdiff(foreground)).condition.fusions[0])
    f, *states = (torch.randn(1, 4, 4, 8, 8, generator=generator(i)) for i in range(3))
    first, second = (fusion(h, f) - h - f for h in states)
    assert not torch.allclose(first, second, atol=0.1)


@BOTH
def test_stage_one_has_no_part_in_it(foreground: Foreground) -> None:
    method, batch = medsegdiff(foreground), batch_of(foreground)
    network = TinyDenoiser(*method.channels(1))
    ours, other = (method.refine(network, batch.image, p, generator()) for p in (batch.prior, 1 - batch.prior))
    assert torch.equal(ours, other)
    assert method.config.sampling.min_foreground == 0


@BOTH
def test_the_printed_loss_is_the_squared_error_of_the_noise(foreground: Foreground) -> None:
    """Eq. 7: x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) epsilon, masks in {-1, 1}, t uniform."""
    method, batch, seen = medsegdiff(foreground, literal=True), batch_of(foreground, size=64), []
    network = TinyDenoiser(*method.channels(1))

    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        seen.append((x[:, -2:], t, network(x, t)))
        return seen[-1][2]

    loss = method.loss(denoiser, batch, nnunet_loss(foreground), generator())
    ((x_t, t, output),) = seen  # no second pass: nothing is recycled
    share = per_sample(method.process.alpha_bar(t), x_t)
    epsilon = (x_t - share.sqrt() * (2 * batch.reference - 1)) / (1 - share).sqrt()
    torch.testing.assert_close(loss, ((output - epsilon) ** 2).mean(), rtol=1e-4, atol=0)
    assert abs(epsilon.mean()) < 4 * epsilon.numel() ** -0.5
    assert abs(epsilon.std() - 1) < 4 * epsilon.numel() ** -0.5
    assert len(t.unique()) > 50
    assert method.process.timesteps == 1000


def test_the_printed_sampler_draws_noise_at_every_step_but_the_last() -> None:
    method = medsegdiff(LABELS, literal=True, sampling={"steps": 5, "samples": 1})
    batch, draws = batch_of(LABELS), generator()
    method.evidence(TinyDenoiser(*method.channels(1)), batch.image, batch.prior, draws)
    drawn = generator()
    for _ in range(6):  # the start, and one a step; the last is multiplied by zero
        torch.randn(batch.prior.shape, generator=drawn)
    assert torch.equal(torch.rand(4, generator=draws), torch.rand(4, generator=drawn))
    shipped = medsegdiff(LABELS, literal=True).config.sampling
    assert (shipped.steps, shipped.samples) == (100, 25)


@BOTH
@FORMS
def test_it_learns(foreground: Foreground, literal: bool) -> None:
    method, batch = medsegdiff(foreground, literal), batch_of(foreground)
    denoiser = denoiser_of(method)
    before = mean_loss(method, denoiser, batch)
    train(method, denoiser, batch)
    assert mean_loss(method, denoiser, batch) < before - 0.3


def test_what_it_is_not_is_refused() -> None:
    for change in (
        {"condition": {"encoder": False}},
        {"condition": {"fusion": "add"}},
        {"process": {"kind": "bernoulli"}},
    ):
        with pytest.raises(ConfigError, match="method medsegdiff needs"):
            medsegdiff(LABELS, **change)
