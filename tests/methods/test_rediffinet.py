"""Re-DiffiNet: what is noised, what the denoiser sees, its loss, its seeds and its flip (Ren et al. 2024, Eq. 5)."""

import pytest
import torch
from monai.losses import DiceLoss
from torch import Tensor
from torch.nn import functional

from nnunet_diffrefine.batch import Foreground, RefineBatch
from nnunet_diffrefine.config import ConfigError
from nnunet_diffrefine.methods.composition import ComposedMethod
from tests.builders import LABELS, TinyDenoiser, batch_of, generator, nnunet_loss
from tests.methods.rediffinet_family import NESTED, Recording, denoiser_of, errors_left, preset_of

BOTH = pytest.mark.parametrize("foreground", [LABELS, NESTED], ids=["labels", "regions"])
FLAT = {"deep_supervision": False}


def rediffinet(foreground: Foreground, literal: bool = False, **changes: dict) -> ComposedMethod:
    return preset_of(foreground, "rediffinet", literal, **changes)


def masks(foreground: Foreground, batch: RefineBatch) -> Tensor:
    """U(I), decided by hand."""
    if not foreground.exclusive:
        return (batch.prior > 0.5).float()
    background = 1 - batch.prior.sum(1, keepdim=True)
    winner = torch.cat((background, batch.prior), 1).argmax(1)
    return torch.stack([winner == 1, winner == 2], 1).float()


@BOTH
@pytest.mark.parametrize("literal", [False, True])
def test_the_discrepancy_of_the_hard_mask_is_noised_beside_mask_and_image(
    foreground: Foreground, literal: bool
) -> None:
    method = rediffinet(foreground, literal, training={**FLAT, "recycling": 0.0, "prior_end": 0.0})
    batch = batch_of(foreground, size=32, image_channels=2)
    denoiser = Recording(TinyDenoiser(*method.channels(2)))
    method.loss(denoiser, batch, nnunet_loss(foreground), generator())
    image, mask, x_t = denoiser.inputs[0].split(2, 1)
    assert torch.equal(image, batch.image)
    assert torch.equal(mask, masks(foreground, batch))
    delta = (mask - batch.reference).abs()
    beta = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    share = torch.cumprod(1 - beta, 0)[denoiser.times[0] - 1].float().view(-1, 1, 1, 1, 1)
    noise = (x_t - share.sqrt() * (1.0 if literal else 0.5) * (2 * delta - 1)) / (1 - share).sqrt()
    for part in (noise, noise[delta > 0], noise[share.expand_as(noise) > 0.5]):
        error = part.numel() ** -0.5
        assert abs(part.mean()) < 4 * error
        assert abs(part.std() - 1) < 4 * error


@pytest.mark.reference
@BOTH
def test_the_loss_is_dice_and_binary_cross_entropy_and_squared_error_of_the_discrepancy(foreground: Foreground) -> None:
    method, batch = rediffinet(foreground, training=FLAT), batch_of(foreground, size=3)
    logits = torch.randn(batch.prior.shape, generator=generator(7))
    delta = (masks(foreground, batch) - batch.reference).abs()
    expected = DiceLoss(sigmoid=True, smooth_nr=1.0, smooth_dr=1.0)(logits, delta)
    expected = expected + functional.binary_cross_entropy_with_logits(logits, delta)
    expected = expected + functional.mse_loss(logits.sigmoid(), delta)
    loss = method.loss(lambda x, t: logits[: len(x)], batch, nnunet_loss(foreground), generator())
    torch.testing.assert_close(loss, expected)


@BOTH
def test_the_mean_of_the_seeds_is_flipped_where_it_exceeds_one_half(foreground: Foreground) -> None:
    """Eq. 5 for regions that flip one by one; exclusive classes settle on the likeliest."""
    method, batch = rediffinet(foreground, literal=True, sampling={"steps": 2, "samples": 3}), batch_of(foreground)
    denoiser = Recording(TinyDenoiser(*method.channels(1)))
    refined = foreground.decide(method.refine(denoiser, batch.image, batch.prior, generator()))
    assert [int(t[0]) for t in denoiser.times] == [1000, 500]
    mean = torch.stack(denoiser.outputs[1].sigmoid().chunk(3)).mean(0)
    mask = masks(foreground, batch)
    assert 0.1 < (mean > 0.5).float().mean() < 0.9
    if not foreground.exclusive:
        assert torch.equal(refined, (mask - (mean > 0.5).float()).abs())
        return
    corrected = torch.where(mask > 0, 1 - mean, mean)  # probability that the class is there, by its own channel alone
    best = corrected.max(1)
    assert torch.equal(refined.sum(1) > 0, best.values > 0.5)
    wins = torch.nn.functional.one_hot(best.indices, 2).movedim(-1, 1)
    assert torch.equal(refined, wins * (best.values > 0.5)[:, None].float())


def test_regions_flipped_out_of_their_parents_are_cut_back_unless_literal() -> None:
    method, literal = (rediffinet(NESTED, literal, sampling={"samples": 1, "steps": 1}) for literal in (False, True))
    prior = torch.full((1, 2, 4, 4, 4), 0.1)  # neither region
    flips_core_only = torch.tensor([-3.0, 3.0]).view(1, 2, 1, 1, 1).expand_as(prior)
    whole, core = (NESTED.decide(method.decide(flips_core_only, prior, torch.zeros(2))))[0]
    assert not whole.any()
    assert not core.any()
    whole, core = (NESTED.decide(literal.decide(flips_core_only, prior, torch.zeros(2))))[0]
    assert not whole.any()
    assert core.all()


@BOTH
def test_the_conditions_features_are_computed_once_a_window(foreground: Foreground) -> None:
    method, batch = rediffinet(foreground, sampling={"steps": 3, "samples": 2}), batch_of(foreground, size=1)
    denoiser, calls = denoiser_of(method), []
    assert denoiser.condition is not None
    denoiser.condition.register_forward_hook(lambda module, inputs, output: calls.append(inputs[0]))
    once = method.refine(denoiser, batch.image, batch.prior, generator())
    assert len(calls) == 1
    assert torch.equal(calls[0], torch.cat((batch.image, masks(foreground, batch)), 1))
    again = method.refine(lambda x, t: denoiser(x, t), batch.image, batch.prior, generator())  # computed anew each time
    assert [len(x) for x in calls[1:]] == [2, 2, 2]
    torch.testing.assert_close(once, again)


def test_features_of_every_level_are_added() -> None:
    method, batch = rediffinet(LABELS, training=FLAT), batch_of(LABELS, size=1)
    denoiser = denoiser_of(method)
    condition = method.condition(batch.image, batch.prior)
    x, t = torch.cat((condition, torch.zeros_like(batch.prior)), 1), torch.tensor([500])
    features = denoiser.condition_features(condition)
    assert [f.shape[1] for f in features] == [4, 6, 8]
    base = denoiser(x, t, features)
    for level in range(3):
        changed = [2 * f if i == level else f for i, f in enumerate(features)]
        assert (denoiser(x, t, changed) - base).abs().max() > 1e-3
    nothing = denoiser(x, t, [torch.zeros_like(f) for f in features])
    denoiser.condition = None
    assert torch.equal(nothing, denoiser(x, t))


@pytest.mark.slow
@BOTH
def test_it_corrects_mistakes_that_the_image_shows(foreground: Foreground) -> None:
    assert errors_left(foreground, "rediffinet", steps=200) < 0.5


@pytest.mark.parametrize(
    ("group", "values"),
    [("error", {"target": "mask"}), ("condition", {"encoder": False}), ("process", {"kind": "bridge"})],
)
def test_settings_of_another_method_are_refused(group: str, values: dict) -> None:
    with pytest.raises(ConfigError, match=rf"{group}\.{next(iter(values))}.*rediffinet needs"):
        rediffinet(LABELS, **{group: values})


def test_its_threshold_is_calibrated_and_one_half_if_literal() -> None:
    sound, literal = rediffinet(LABELS), rediffinet(LABELS, literal=True)
    assert sound.config.error.calibration > 0
    assert literal.config.error.calibration == 0
    assert torch.equal(literal.initial_thresholds(), torch.zeros(2))
