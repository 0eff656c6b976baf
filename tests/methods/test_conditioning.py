"""What the denoiser is shown: how many channels, in which order, and what each holds."""

import math

import pytest
import torch
from torch import Tensor

from nnunet_diffrefine.batch import Foreground
from nnunet_diffrefine.config import ConditionConfig, ConfigError
from nnunet_diffrefine.methods.conditioning import Condition
from nnunet_diffrefine.networks.frequency import low_pass
from tests.builders import LABELS, REGIONS, batch_of

BOTH = pytest.mark.parametrize("foreground", [LABELS, REGIONS], ids=["labels", "regions"])
# Six voxels along one axis. Labels: background wins, class 1, class 2, class 1 (40 % is the most), background, class 2.
# Regions: none, first, second, none (nothing above one half), none, both.
PRIOR = [[0.1, 0.7, 0.1, 0.4, 0.0, 0.0], [0.2, 0.2, 0.8, 0.3, 0.0, 1.0]]
NESTED = [[0.1, 0.7, 0.8, 0.4, 0.0, 1.0], [0.1, 0.2, 0.7, 0.3, 0.0, 1.0]]
HARD = {
    True: [[0, 1, 0, 1, 0, 0], [0, 0, 1, 0, 0, 1]],
    False: [[0, 1, 1, 0, 0, 1], [0, 0, 1, 0, 0, 1]],
}


def voxels(rows: list[list[float]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float32).view(1, len(rows), 6, 1, 1)


def prior_of(foreground: Foreground) -> Tensor:
    return voxels(PRIOR if foreground.exclusive else NESTED)


def shown(foreground: Foreground, image: Tensor, prior: Tensor, /, **settings: object) -> Tensor:
    return Condition(ConditionConfig(**settings), foreground)(image, prior)


@BOTH
@pytest.mark.parametrize("image", ["plain", "masked", "none"])
@pytest.mark.parametrize("prior", ["soft", "hard", "none"])
@pytest.mark.parametrize("image_channels", [1, 4])
def test_channels_are_as_announced(foreground: Foreground, image: str, prior: str, image_channels: int) -> None:
    if image == prior == "none":
        with pytest.raises(ConfigError, match="condition.image"):
            ConditionConfig(image="none", prior="none")
        return
    condition, batch = Condition(ConditionConfig(image=image, prior=prior), foreground), batch_of(foreground)
    images = batch.image.expand(-1, image_channels, -1, -1, -1)
    expected = (image_channels if image != "none" else 0) + (2 if prior != "none" else 0)
    assert condition.channels(image_channels) == expected
    assert condition(images, batch.prior).shape == (2, expected, *batch.image.shape[2:])


@BOTH
def test_image_comes_first_and_both_are_untouched(foreground: Foreground) -> None:
    batch = batch_of(foreground, image_channels=3)
    seen = shown(foreground, batch.image, batch.prior)
    assert torch.equal(seen[:, :3], batch.image)
    assert torch.equal(seen[:, 3:], batch.prior)
    assert torch.equal(shown(foreground, batch.image, batch.prior, prior="none"), batch.image)
    assert torch.equal(shown(foreground, batch.image, batch.prior, image="none"), batch.prior)


@BOTH
def test_a_hard_prior_is_the_decision_and_not_each_channel_above_one_half(foreground: Foreground) -> None:
    hard = shown(foreground, voxels([[0.0] * 6]), prior_of(foreground), image="none", prior="hard")
    assert torch.equal(hard, voxels(HARD[foreground.exclusive]))


@BOTH
@pytest.mark.parametrize("outside", [0.0, 0.2, 1.0])
def test_a_masked_image_is_whole_inside_the_prior_and_weighted_outside(foreground: Foreground, outside: float) -> None:
    """Re-DiffiNet, Eq. 3: weight 1 wherever any class or region is decided, for every image channel alike."""
    image = voxels([[1.0, -2.0, 3.0, -4.0, 5.0, -6.0], [2.0, 2.0, 2.0, 2.0, 2.0, 2.0]])
    inside = torch.tensor(HARD[foreground.exclusive]).amax(0).view(1, 1, 6, 1, 1)
    expected = torch.where(inside > 0, image, outside * image)
    seen = shown(foreground, image, prior_of(foreground), image="masked", prior="none", outside=outside)
    torch.testing.assert_close(seen, expected, rtol=0, atol=1e-6)
    # the decision masks the image whatever form of the prior is shown beside it
    soft = shown(foreground, image, prior_of(foreground), image="masked", prior="soft", outside=outside)
    assert torch.equal(soft, torch.cat((seen, prior_of(foreground)), 1))


class TestLowPass:
    def test_the_finest_waves_are_damped_by_the_gaussian_and_a_constant_stays(self) -> None:
        """A checkerboard is at the Nyquist frequency of all three axes: gain exp(-3 / (2 cutoff²))."""
        cutoff = 0.5
        grid = torch.arange(8)
        board = (-1.0) ** (grid.view(-1, 1, 1) + grid.view(1, -1, 1) + grid.view(1, 1, -1))[None, None]
        prior = torch.zeros(1, 2, 8, 8, 8)
        seen = shown(REGIONS, board + 7, prior, prior="none", low_pass=cutoff)
        expected = 7 + math.exp(-1.5 / cutoff**2) * board
        torch.testing.assert_close(seen, expected, atol=1e-5, rtol=0)

    @BOTH
    def test_the_prior_is_not_filtered(self, foreground: Foreground) -> None:
        batch = batch_of(foreground)
        seen = shown(foreground, batch.image, batch.prior, low_pass=0.3)
        assert torch.equal(seen[:, :1], low_pass(batch.image, 0.3))
        assert not torch.allclose(seen[:, :1], batch.image, atol=0.1)
        assert torch.equal(seen[:, 1:], batch.prior)

    def test_the_image_is_filtered_before_it_is_masked(self) -> None:
        """The mask's edge stays as sharp as the prior: a constant image keeps exactly two values."""
        prior = voxels(NESTED)
        seen = shown(REGIONS, torch.full_like(prior[:, :1], 3.0), prior, image="masked", prior="none", low_pass=0.3)
        expected = torch.tensor([0.6, 3.0, 3.0, 0.6, 0.6, 3.0]).view_as(seen)
        torch.testing.assert_close(seen, expected, atol=1e-5, rtol=0)

    def test_no_cut_off_is_no_filter(self) -> None:
        batch = batch_of(LABELS)
        assert torch.equal(shown(LABELS, batch.image, batch.prior, low_pass=0.0)[:, :1], batch.image)
