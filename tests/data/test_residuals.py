"""One channel is spared the changes of intensity, and the additional one is formed as at prediction."""

import torch
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform

from nnunet_diffrefine.data.residuals import ExtraChannelTransform, TargetChannelTransform
from nnunet_diffrefine.methods.recoseg import extra_channel, to_parts
from tests.builders import SPACE, generator


class BrightenAndMirror(BasicTransform):
    """Adds 5 to the image alone and mirrors everything."""

    def _apply_to_image(self, img, **params):
        return (img + 5).flip(-1)

    def _apply_to_regr_target(self, regression_target, **params):
        return regression_target.flip(-1)

    def _apply_to_segmentation(self, segmentation, **params):
        return segmentation.flip(-1)


def sample(channels):
    image = torch.randn(channels, *SPACE, generator=generator())
    return image, torch.randint(0, 3, (1, *SPACE), generator=generator())


def test_the_synthesised_channel_moves_but_keeps_its_intensities():
    image, labels = sample(3)
    out = TargetChannelTransform(BrightenAndMirror(), 1)(image=image.clone(), segmentation=labels)
    assert out.keys() == {"image", "segmentation"}
    assert torch.equal(out["image"][1], image[1].flip(-1))
    assert torch.equal(out["image"][[0, 2]], (image[[0, 2]] + 5).flip(-1))
    assert torch.equal(out["segmentation"], labels.flip(-1))


def test_the_additional_channel_is_formed_before_the_augmentation_and_moves_with_it():
    image, labels = sample(3)
    synthetic = image[1:2] + torch.randn(1, *SPACE, generator=generator(1))
    stacked = torch.cat((image, to_parts(synthetic, image[1:2], 8.0)))
    for kind in ("residual", "synthesis"):
        transform = ExtraChannelTransform(
            BrightenAndMirror(), lambda x, y, kind=kind: extra_channel(x, y, kind, 8.0), 1, 8.0
        )
        out = transform(image=stacked.clone(), segmentation=labels)
        assert out["image"].shape == (4, *SPACE)
        assert torch.equal(out["image"][:3], (image + 5).flip(-1))
        wanted = extra_channel(synthetic, image[1:2], kind, 8.0).flip(-1)
        torch.testing.assert_close(out["image"][3:], wanted, atol=1e-5, rtol=0)
