"""DMCIE: the signed error of Eq. 1, noise on it alone, the two terms of Eq. 13, and the printed form."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from nnunet_diffrefine.batch import Foreground, RefineBatch
from nnunet_diffrefine.config import ConfigError, RefineConfig
from nnunet_diffrefine.diffusion.schedule import gaussian_schedule
from nnunet_diffrefine.methods.dmcie import DMCIE
from nnunet_diffrefine.plans import merge, shipped_settings
from tests.builders import LABELS, REGIONS, TinyDenoiser, batch_of, for_seeds, generator, nnunet_loss, with_ignore

T = 8
BOTH = pytest.mark.parametrize("foreground", [LABELS, REGIONS], ids=["labels", "regions"])
EVERY = pytest.mark.parametrize("literal", [False, True], ids=["sound", "literal"])


def dmcie(foreground: Foreground, literal: bool = False, **changes: dict) -> DMCIE:
    """The shipped settings with few time steps and one scale."""
    few = {"process": {"timesteps": T}, "sampling": {"steps": T if literal else 2}}
    flat = {"training": {"deep_supervision": False, "recycling": 0.0, "prior_end": 0.0}, "paper_literal": literal}
    values = merge(merge(shipped_settings("dmcie", {"paper_literal": literal}), {**few, **flat}), changes)
    return DMCIE(RefineConfig.from_dict(values), foreground)


def hard(foreground: Foreground, prior: Tensor) -> Tensor:
    return foreground.decide(foreground.logits(prior))


def recorded(method: DMCIE, batch: RefineBatch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Input of the training pass, its times and output, and the loss."""
    network, seen = TinyDenoiser(*method.channels(1)), []

    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        output = network(x, t)
        seen.append((x.detach(), t, output.detach()))
        return output

    loss = method.loss(denoiser, batch, nnunet_loss(method.foreground), generator())
    return *seen[-1], loss.detach()


@BOTH
@EVERY
def test_noise_is_added_to_the_error_alone(foreground: Foreground, literal: bool) -> None:
    """Eq. 5 and 11; Fig. 1 noises the image as well."""
    foreground = with_ignore(foreground)
    method, batch = dmcie(foreground, literal), batch_of(foreground, size=32)
    x, t, _, _ = recorded(method, batch)
    known = batch.image if literal else torch.cat((batch.image, batch.prior), 1)
    assert torch.equal(x[:, :-2], known)
    schedule, scale = ("linear", 1.0) if literal else ("cosine", 0.5)
    alpha_bar = gaussian_schedule(T, schedule)[t].view(-1, 1, 1, 1, 1).float()
    error = (batch.reference - hard(foreground, batch.prior)) * batch.valid
    noise = (x[:, -2:] - alpha_bar.sqrt() * scale * error) / (1 - alpha_bar).sqrt()
    for part in (noise, noise[error > 0], noise[error < 0], noise[error == 0]):
        assert abs(part.mean()) < 5 * part.numel() ** -0.5
        assert abs(part.std() - 1) < 5 * part.numel() ** -0.5


@BOTH
@EVERY
def test_the_condition_stays_clean_and_the_start_is_noise(foreground: Foreground, literal: bool) -> None:
    """Eq. 12 would move the image channels at every step too."""
    method, batch, seen = dmcie(foreground, literal), batch_of(foreground, size=8), []
    network = TinyDenoiser(*method.channels(1))
    method.refine(lambda x, t: seen.append((x, int(t[0]))) or network(x, t), batch.image, batch.prior, generator())
    known = batch.image if literal else torch.cat((batch.image, batch.prior), 1)
    assert all(torch.equal(x[:, :-2], for_seeds(known, x)) for x, _ in seen)
    assert [t for _, t in seen] == (list(range(T, 0, -1)) if literal else [T, T // 2])
    start = seen[0][0][:, -2:]
    assert abs(start.mean()) < 5 * start.numel() ** -0.5
    assert abs(start.std() - 1) < 5 * start.numel() ** -0.5


@BOTH
def test_the_error_is_what_has_to_be_added(foreground: Foreground) -> None:
    """Eq. 1 with the sign that Eq. 14 needs: M + E is the reference; M + (M - G) is not."""
    method, batch = dmcie(foreground), batch_of(foreground)
    error, mask = method.target.clean(batch), hard(foreground, batch.prior)
    assert set(error.unique().tolist()) == {-1.0, 0.0, 1.0}
    assert torch.equal(mask + error, batch.reference)
    thresholds = method.initial_thresholds()
    corrected = method.decide(method.target.evidence(error, batch.prior), batch.prior, thresholds)
    assert torch.equal(foreground.decide(corrected), batch.reference)
    printed = method.decide(method.target.evidence(-error, batch.prior), batch.prior, thresholds)
    assert torch.equal(foreground.decide(printed), mask)  # all of it in directions that are not open


@BOTH
@pytest.mark.parametrize("weight", [0.0, 1.0, 2.5])
def test_eq_13_is_cross_entropy_and_lambda_dice_of_the_error(foreground: Foreground, weight: float) -> None:
    foreground = with_ignore(foreground)
    method, batch = dmcie(foreground, error={"dice": weight}), batch_of(foreground, size=4)
    _, _, output, loss = recorded(method, batch)
    error = (batch.reference - hard(foreground, batch.prior)) * batch.valid
    ways = output.view(4, 3, 2, *error.shape[2:])
    valid = batch.valid.expand_as(error) > 0
    entropy = F.cross_entropy(ways.movedim(1, -1)[valid], error[valid].long() + 1)
    dice = []
    for way, sign in ((0, -1), (2, 1)):
        p, wanted = ways.softmax(1)[:, way] * batch.valid, (error == sign) * batch.valid
        dice.append((2 * (p * wanted).sum((2, 3, 4)) + 1) / (p.sum((2, 3, 4)) + wanted.sum((2, 3, 4)) + 1))
    torch.testing.assert_close(loss, entropy + weight * (1 - torch.stack(dice).mean()))


@BOTH
def test_the_literal_loss_is_the_mean_squared_error_of_the_noise(foreground: Foreground) -> None:
    """A constant error c costs c squared, whatever lambda."""
    for weight in (0.0, 3.0):
        method, batch = dmcie(foreground, literal=True, error={"dice": weight}), batch_of(foreground, size=4)
        error = batch.reference - hard(foreground, batch.prior)

        def denoiser(x: Tensor, t: Tensor, error: Tensor = error) -> Tensor:
            alpha_bar = gaussian_schedule(T, "linear")[t].view(-1, 1, 1, 1, 1).float()
            return (x[:, -2:] - alpha_bar.sqrt() * error) / (1 - alpha_bar).sqrt() + 0.3

        loss = method.loss(denoiser, batch, nnunet_loss(foreground), generator())
        torch.testing.assert_close(loss, torch.tensor(0.09), atol=1e-4, rtol=0)


def test_a_literal_step_is_eq_10() -> None:
    """x_{t-1} of alpha_t, alpha_bar_t and epsilon as printed, sigma_t^2 being the posterior's variance."""
    method, t = dmcie(LABELS, literal=True), torch.tensor([2, 5, T])
    alpha_bar = gaussian_schedule(T, "linear")
    x_t, epsilon = (torch.randn(3, 2, 3, 4, 5, generator=generator(k), dtype=torch.float64) for k in (1, 2))
    now, before = (alpha_bar[k].view(-1, 1, 1, 1, 1) for k in (t, t - 1))
    alpha, z = now / before, torch.randn(x_t.shape, generator=generator(), dtype=x_t.dtype)
    sigma = ((1 - before) / (1 - now) * (1 - alpha)).sqrt()
    printed = (x_t - (1 - alpha) / (1 - now).sqrt() * epsilon) / alpha.sqrt() + sigma * z
    x0 = method.process.predicted_x0("epsilon", epsilon, x_t, t)
    found = method.process.reverse(x_t, x0, x0, t, t - 1, generator())
    torch.testing.assert_close(found, printed, atol=1e-9, rtol=0)


@BOTH
@EVERY
def test_the_printed_form_does_not_see_the_prior_until_the_end(foreground: Foreground, literal: bool) -> None:
    batch, method = batch_of(foreground), dmcie(foreground, literal)
    network, seen = TinyDenoiser(*method.channels(1)), []
    for prior in (batch.prior, batch.prior.flip(2)):
        method.refine(lambda x, t: seen.append(x) or network(x, t), batch.image, prior, generator())
    first, second = seen[: len(seen) // 2], seen[len(seen) // 2 :]
    assert torch.equal(torch.cat(first), torch.cat(second)) == literal


def test_thresholds_are_calibrated_unless_the_paper_is_taken_literally() -> None:
    assert dmcie(LABELS).config.error.calibration == 0.1
    assert dmcie(LABELS, literal=True).config.error.calibration == 0
    assert dmcie(LABELS).flips


def test_what_defines_the_method_cannot_be_changed() -> None:
    with pytest.raises(ConfigError, match=r"error.target.*needs 'three_way'"):
        dmcie(LABELS, error={"target": "mask"})
    with pytest.raises(ConfigError, match=r"process.kind.*needs 'gaussian'"):
        dmcie(LABELS, process={"kind": "bridge"})
