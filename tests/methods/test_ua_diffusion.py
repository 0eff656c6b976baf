"""UA-Diffusion: its three conditions (Ren et al. 2024, section 2.1.2) and its loss."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from nnunet_diffrefine.batch import Foreground
from nnunet_diffrefine.config import ConfigError
from tests.builders import LABELS, TinyDenoiser, batch_of, generator, nnunet_loss, with_ignore
from tests.methods.rediffinet_family import NESTED, Recording, denoiser_of, errors_left, preset_of

BOTH = pytest.mark.parametrize("foreground", [LABELS, NESTED], ids=["labels", "regions"])
FLAT = {"deep_supervision": False}
FORMS = ("ua_diffusion", "ua_diffusion_prior_only", "ua_diffusion_masked")
each_form = pytest.mark.parametrize("name", FORMS)


def condition_of(name: str, foreground: Foreground, image: Tensor, prior: Tensor, literal: bool = False) -> Tensor:
    """What the denoiser sees at prediction beside the state, as its encoder gets it."""
    method, seen = preset_of(foreground, name, literal, sampling={"steps": 1, "samples": 1}), []
    denoiser = denoiser_of(method, image.shape[1])
    denoiser.condition.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    method.refine(denoiser, image, prior, generator())
    return seen[0]


@BOTH
def test_mask_and_image_are_concatenated(foreground: Foreground) -> None:
    batch = batch_of(foreground, image_channels=2)
    seen = condition_of("ua_diffusion", foreground, batch.image, batch.prior)
    assert torch.equal(seen, torch.cat((batch.image, batch.prior), 1))


@BOTH
def test_the_mask_alone_leaves_the_image_out(foreground: Foreground) -> None:
    batch = batch_of(foreground, image_channels=2)
    assert torch.equal(condition_of("ua_diffusion_prior_only", foreground, batch.image, batch.prior), batch.prior)


@BOTH
def test_the_image_is_weighted_by_the_mask(foreground: Foreground) -> None:
    """Eq. 3: 1 where any channel of the decided mask is foreground, 0.2 elsewhere, every image channel alike."""
    batch = batch_of(foreground, image_channels=2)
    seen = condition_of("ua_diffusion_masked", foreground, batch.image, batch.prior)
    inside = batch.prior.amax(1) > (1 - batch.prior.sum(1) if foreground.exclusive else 0.5)
    assert 0.1 < inside.float().mean() < 0.9
    for channel in range(2):
        weight = torch.where(inside, 1.0, 0.2)
        assert torch.equal(seen[:, channel], batch.image[:, channel] * weight)


@pytest.mark.parametrize("name", FORMS[:2])
def test_the_papers_mask_is_a_decided_one(name: str) -> None:
    batch = batch_of(NESTED)
    seen = condition_of(name, NESTED, batch.image, batch.prior, literal=True)
    assert torch.equal(seen[:, -2:], (batch.prior > 0.5).float())


@BOTH
@each_form
def test_the_loss_is_nnunets_and_the_squared_error_where_the_reference_is_valid(
    name: str, foreground: Foreground
) -> None:
    foreground = with_ignore(foreground)
    method, batch = preset_of(foreground, name, training=FLAT), batch_of(foreground, size=3)
    logits = torch.randn((3, foreground.heads, *batch.prior.shape[2:]), generator=generator(7))
    assert 0 < batch.valid.mean() < 1
    probabilities = logits.softmax(1)[:, 1:] if foreground.exclusive else logits.sigmoid()
    squared = ((probabilities - batch.reference) ** 2)[batch.valid.expand_as(batch.reference) > 0].mean()
    nnunet = nnunet_loss(foreground)
    loss = method.loss(lambda x, t: logits[: len(x)], batch, nnunet, generator())
    torch.testing.assert_close(loss, nnunet(logits, batch.target) + squared)


@BOTH
@each_form
def test_the_reference_is_noised(name: str, foreground: Foreground) -> None:
    training = {**FLAT, "recycling": 0.0, "prior_end": 0.0}
    method, batch = preset_of(foreground, name, True, training=training), batch_of(foreground, size=32)
    states = []
    for reference in (batch.reference, 1 - batch.reference):
        denoiser = Recording(TinyDenoiser(*method.channels(1)))
        method.loss(denoiser, replace(batch, reference=reference), nnunet_loss(foreground), generator())
        states.append(denoiser.inputs[0][:, -2:])
    share = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)[denoiser.times[0] - 1]
    signal = share.sqrt().float().view(-1, 1, 1, 1, 1) * (2 * batch.reference - 1)
    torch.testing.assert_close(states[0] - states[1], 2 * signal)  # the same noise in both
    noise = (states[0] + states[1]) / 2 / (1 - share).sqrt().float().view(-1, 1, 1, 1, 1)
    assert abs(noise.std() - 1) < 4 * noise.numel() ** -0.5


@BOTH
@pytest.mark.parametrize(("name", "left"), [(FORMS[0], 0.5), (FORMS[1], 0.9), (FORMS[2], 0.5)])
def test_it_corrects_mistakes_that_its_condition_shows(name: str, left: float, foreground: Foreground) -> None:
    """Without the image, only what neighbours tell."""
    assert errors_left(foreground, name) < left


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("ua_diffusion", {"image": "none"}),
        ("ua_diffusion_prior_only", {"image": "plain"}),
        ("ua_diffusion_masked", {"prior": "soft"}),
        ("ua_diffusion", {"encoder": False}),
    ],
)
def test_a_condition_of_another_form_is_refused(name: str, values: dict) -> None:
    with pytest.raises(ConfigError, match=rf"condition\.{next(iter(values))}.*{name} needs"):
        preset_of(LABELS, name, condition=values)
