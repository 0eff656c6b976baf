"""Mask U-Net: the mask in one pass, with nnU-Net's loss, from image and prior or from the image alone."""

import pytest
import torch

from nnunet_diffrefine.batch import Foreground
from nnunet_diffrefine.config import ConfigError
from tests.builders import LABELS, TinyDenoiser, batch_of, generator, nnunet_loss
from tests.methods.rediffinet_family import NESTED, Recording, preset_of

BOTH = pytest.mark.parametrize("foreground", [LABELS, NESTED], ids=["labels", "regions"])


@BOTH
@pytest.mark.parametrize("prior", ["soft", "none"])
def test_one_pass_whose_output_is_the_result(foreground: Foreground, prior: str) -> None:
    changes = {"condition": {"prior": prior}, "sampling": {"steps": 3, "samples": 4}}
    method, batch = preset_of(foreground, "mask_unet", **changes), batch_of(foreground, image_channels=2)
    denoiser = Recording(TinyDenoiser(*method.channels(2)))
    refined = method.refine(denoiser, batch.image, batch.prior, generator())
    assert len(denoiser.inputs) == 1
    seen = torch.cat((batch.image, batch.prior), 1) if prior == "soft" else batch.image
    assert torch.equal(denoiser.inputs[0], seen)
    assert torch.equal(foreground.decide(refined), foreground.decide(denoiser.outputs[0]))


@BOTH
def test_without_prior_it_is_trained_as_any_network_of_nnunet(foreground: Foreground) -> None:
    method = preset_of(foreground, "mask_unet", condition={"prior": "none"}, training={"deep_supervision": False})
    batch, loss = batch_of(foreground, size=3), nnunet_loss(foreground)
    denoiser = Recording(TinyDenoiser(*method.channels(1)))
    value = method.loss(denoiser, batch, loss, generator())
    assert torch.equal(value, loss(denoiser.outputs[0], batch.target))


def test_a_process_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"process\.kind.*mask_unet needs 'none'"):
        preset_of(LABELS, "mask_unet", process={"kind": "gaussian"})
