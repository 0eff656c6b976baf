"""Discrepancy U-Net: Re-DiffiNet's target, loss and flip in one pass without state, noise and time."""

import pytest
import torch

from nnunet_diffrefine.batch import Foreground
from nnunet_diffrefine.config import ConfigError
from tests.builders import LABELS, TinyDenoiser, batch_of, generator, nnunet_loss
from tests.methods.rediffinet_family import NESTED, Recording, errors_left, preset_of

BOTH = pytest.mark.parametrize("foreground", [LABELS, NESTED], ids=["labels", "regions"])
FLAT = {"deep_supervision": False}


@BOTH
def test_one_pass_over_image_and_hard_mask_whatever_the_sampling(foreground: Foreground) -> None:
    method = preset_of(foreground, "discrepancy_unet", sampling={"steps": 3, "samples": 4})
    batch = batch_of(foreground, image_channels=2)
    denoiser = Recording(TinyDenoiser(*method.channels(2)))
    first, second = (method.refine(denoiser, batch.image, batch.prior, generator(seed)) for seed in (0, 1))
    assert torch.equal(first, second)
    assert len(denoiser.inputs) == 2
    hard = foreground.decide(foreground.logits(batch.prior))
    assert torch.equal(denoiser.inputs[0], torch.cat((batch.image, hard), 1))
    assert not denoiser.times[0].any()


@BOTH
@pytest.mark.parametrize("literal", [False, True])
def test_loss_and_decision_are_those_of_rediffinet(foreground: Foreground, literal: bool) -> None:
    control, diffusion = (
        preset_of(foreground, name, literal, training=FLAT) for name in ("discrepancy_unet", "rediffinet")
    )
    batch = batch_of(foreground, size=3)
    logits = torch.randn(batch.prior.shape, generator=generator(7))
    losses = [
        m.loss(lambda x, t: logits[: len(x)], batch, nnunet_loss(foreground), generator()) for m in (control, diffusion)
    ]
    assert torch.equal(*losses)
    thresholds = torch.tensor([0.5, -0.5])
    decisions = [m.decide(logits, batch.prior, thresholds) for m in (control, diffusion)]
    assert torch.equal(*decisions)
    assert not torch.equal(foreground.decide(decisions[0]), foreground.decide(foreground.logits(batch.prior)))


@BOTH
def test_evidence_is_the_output(foreground: Foreground) -> None:
    method, batch = preset_of(foreground, "discrepancy_unet"), batch_of(foreground)
    denoiser = Recording(TinyDenoiser(*method.channels(1)))
    evidence = method.evidence(denoiser, batch.image, batch.prior, generator())
    torch.testing.assert_close(evidence, denoiser.outputs[0], atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@BOTH
def test_it_corrects_mistakes_that_the_image_shows(foreground: Foreground) -> None:
    assert errors_left(foreground, "discrepancy_unet", steps=160) < 0.5


def test_a_process_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"process\.kind.*discrepancy_unet needs 'none'"):
        preset_of(LABELS, "discrepancy_unet", process={"kind": "gaussian"})
