"""The region that is refined: its three parts, each against a plain definition, and its recall."""

import numpy as np
import pytest
import torch
from scipy.ndimage import distance_transform_cdt

from nnunet_diffrefine.calibration.voxels import gather
from nnunet_diffrefine.inference.region import RegionSettings, doubtful_region, entropy, surface_band
from tests.builders import LABELS, REGIONS

BOTH = pytest.mark.parametrize("foreground", [LABELS, REGIONS], ids=["labels", "regions"])
SHAPE = (16, 18, 20)
ONLY_SURFACE = {"entropy": 1.0, "candidates": 1.0}


def ball(radius: float = 5.0) -> torch.Tensor:
    grid = np.stack(np.meshgrid(*(np.arange(n) - n // 2 for n in SHAPE), indexing="ij"))
    return torch.from_numpy(np.sqrt((grid**2).sum(0)) <= radius)


def prior_of(mask: torch.Tensor, inside: float = 1.0, outside: float = 0.0) -> torch.Tensor:
    first = torch.where(mask, inside, outside)
    return torch.stack((first, torch.zeros_like(first)))


class TestSurface:
    @pytest.mark.parametrize("margin", [1, 2, 4])
    def test_band_is_all_voxels_within_the_margin_on_either_side(self, margin):
        """Chessboard distance to the nearest voxel of the other side, an independent definition."""
        mask = ball()
        outside = distance_transform_cdt(~mask.numpy(), "chessboard")
        inside = distance_transform_cdt(mask.numpy(), "chessboard")
        wanted = (outside + inside) <= margin  # one of the two is 0
        assert np.array_equal(surface_band(mask, margin).numpy(), wanted)

    @pytest.mark.parametrize("mask", [torch.zeros(SHAPE) > 0, torch.ones(SHAPE) > 0], ids=["empty", "full"])
    def test_no_surface_no_band(self, mask):
        assert not surface_band(mask, 3).any()

    def test_no_margin_no_band(self):
        assert not surface_band(ball(), 0).any()


class TestParts:
    @BOTH
    def test_a_sure_prior_is_doubtful_at_its_surface_only(self, foreground):
        settings = RegionSettings(margin=2, **ONLY_SURFACE)
        region = doubtful_region(prior_of(ball()), foreground, settings)
        assert torch.equal(region, surface_band(ball(), 2))

    @BOTH
    def test_entropy_is_1_at_most_and_0_where_sure(self, foreground):
        even = 1 / 3 if foreground.exclusive else 0.5
        assert entropy(torch.full((2, 2, 2, 2), even), foreground).allclose(torch.ones(2, 2, 2))
        assert entropy(prior_of(ball()), foreground).amax() == 0

    @BOTH
    def test_entropy_threshold_selects_what_it_says(self, foreground):
        prior = torch.rand(2, *SHAPE, generator=torch.Generator().manual_seed(1)) / 2
        region = doubtful_region(prior, foreground, RegionSettings(margin=0, entropy=0.6, candidates=1.0))
        assert torch.equal(region, entropy(prior, foreground) >= 0.6)
        assert 0 < region.float().mean() < 1

    @BOTH
    def test_candidates_far_from_any_mask_are_found_with_their_margin(self, foreground):
        prior = torch.zeros(2, *SHAPE)
        prior[0, 3, 4, 5] = 0.2
        region = doubtful_region(prior, foreground, RegionSettings(margin=1, entropy=1.0, candidates=0.1))
        assert region[2:5, 3:6, 4:7].all()
        assert region.sum() == 27
        assert not doubtful_region(prior, foreground, RegionSettings(margin=1, entropy=1.0, candidates=0.3)).any()

    @BOTH
    def test_everywhere(self, foreground):
        assert doubtful_region(torch.zeros(2, *SHAPE), foreground, RegionSettings(everywhere=True)).all()
        assert not doubtful_region(torch.zeros(2, *SHAPE), foreground, RegionSettings()).any()

    @pytest.mark.parametrize(
        ("settings", "flag"), [({"margin": -1}, "margin"), ({"entropy": 1.5}, "entropy"), ({"candidates": 0.0}, "cand")]
    )
    def test_settings_out_of_range(self, settings, flag):
        with pytest.raises(ValueError, match=f"--{flag}.* must be"):
            RegionSettings(**settings)


class TestRecall:
    @staticmethod
    def counts(region, prior, reference, valid, foreground):
        """Numbers of wrong voxels in the region and altogether, as calibration counts them."""
        volumes = {
            "logits": foreground.logits(prior[None])[0], "prior": prior, "region": region,
            "reference": reference > 0, "valid": valid,
        }  # fmt: skip
        case = gather("case", 0, foreground, volumes)
        found = int(case.errors(foreground).sum())
        return found, found + case.outside_errors

    @BOTH
    def test_counts_wrong_voxels_inside_and_altogether(self, foreground):
        """The reference is a larger ball: errors form a shell, two voxels thick along the axes."""
        prior, truth = prior_of(ball(4)), prior_of(ball(6))
        everything = ball(6) & ~ball(4)
        for margin in (1, 3):
            region = surface_band(ball(4), margin)
            found, total = self.counts(region, prior, truth, torch.ones(SHAPE) > 0, foreground)
            assert total == everything.sum()
            assert found == (everything & region).sum()
        assert found == total

    def test_ignored_voxels_do_not_count(self):
        valid = ~ball(9)
        assert self.counts(ball(9), prior_of(ball(4)), prior_of(ball(6)), valid, LABELS) == (0, 0)

    def test_a_wrong_class_is_one_error(self):
        mask = ball(4)
        swapped = prior_of(mask).flip(0)
        for region, inside in ((mask, mask.sum()), (~mask, 0)):
            counts = self.counts(region, prior_of(mask), swapped, torch.ones(SHAPE) > 0, LABELS)
            assert counts == (inside, mask.sum())
