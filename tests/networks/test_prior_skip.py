"""The skip from the prior to the output: an untrained refiner decides as stage one does, and it can be trained."""

import pytest
import torch

from tests.builders import LABELS, REGIONS, batch_of, generator, method_of, nnunet_loss
from tests.networks.planned_networks import denoiser_of

FOREGROUNDS = pytest.mark.parametrize("foreground", [LABELS, REGIONS], ids=["labels", "regions"])
SKIP = {"condition": {"skip": "prior"}}


def _refined(foreground, prior="soft"):
    method = method_of(foreground, condition={"skip": "prior", "prior": prior})
    batch = batch_of(foreground)
    return method.evidence(denoiser_of(method).eval(), batch.image, batch.prior, generator()), batch


@FOREGROUNDS
@pytest.mark.parametrize("prior", ["soft", "hard"])
def test_an_untrained_refiner_is_stage_one(foreground, prior):
    logits, batch = _refined(foreground, prior)
    stage_one = foreground.decide(foreground.logits(batch.prior))
    assert stage_one.any()
    assert torch.equal(foreground.decide(logits), stage_one)


@FOREGROUNDS
def test_a_sure_voxel_keeps_a_logit_that_training_can_overcome(foreground):
    logits, _ = _refined(foreground, "hard")
    assert logits.abs().max() < 4


@FOREGROUNDS
@pytest.mark.parametrize("kind", ["plain", "residual"])
def test_every_scale_gets_the_mean_logits_of_the_prior(foreground, kind):
    method, batch = method_of(foreground, **SKIP), batch_of(foreground)
    denoiser = denoiser_of(method, kind=kind, deep=True).eval()
    x = torch.cat((batch.image, batch.prior, batch.prior), 1)
    outputs = denoiser(x, torch.ones(len(x), dtype=torch.long))
    assert len(outputs) > 1
    for coarse in outputs[1:]:
        factor = [a // b for a, b in zip(outputs[0].shape[2:], coarse.shape[2:], strict=True)]
        torch.testing.assert_close(coarse, torch.nn.functional.avg_pool3d(outputs[0], factor))


@FOREGROUNDS
def test_it_learns(foreground):
    method, batch = method_of(foreground, **SKIP), batch_of(foreground)
    denoiser, loss = denoiser_of(method), nnunet_loss(foreground)
    optimizer = torch.optim.AdamW(denoiser.parameters(), 1e-2)
    values = []
    for _ in range(20):
        optimizer.zero_grad()
        value = method.loss(denoiser, batch, loss, generator())
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert values[-1] < 0.8 * values[0]


def test_stage_ones_weights_leave_the_output_layers_at_zero():
    method = method_of(LABELS, **SKIP)
    denoiser, other = denoiser_of(method), denoiser_of(method_of(LABELS), seed=1)
    assert denoiser.start_from(other.unet.state_dict()) > 0
    assert not any(p.any() for p in denoiser.unet.decoder.seg_layers.parameters())
    assert torch.equal(denoiser.unet.encoder.stages[0][0].convs[0].conv.weight,
                       other.unet.encoder.stages[0][0].convs[0].conv.weight)  # fmt: skip
