"""Surface distances: closed forms, invariances, and an independent implementation."""

import numpy as np
import pytest

from nnunet_diffrefine.evaluation.surface import surface_distances
from tests.evaluation.shapes import ball, box

SPACINGS = [(1.0, 1.0, 1.0), (3.0, 1.0, 2.0), (0.7, 0.8, 5.0)]


def test_equal_masks_have_no_distance():
    mask = ball((20, 20, 20), (9, 10, 9), 6)
    found = surface_distances(mask, mask, (2.0, 1.0, 0.5))
    assert (found.hd95, found.assd, found.nsd(1e-6)) == (0.0, 0.0, 1.0)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_shifted_cube_is_as_far_as_it_was_shifted(axis, spacing):
    """The leading face is the shift away from the cube behind, and is more than 5 % of its surface."""
    mask = box((30, 30, 30), ((8, 18),) * 3)
    found = surface_distances(mask, np.roll(mask, 3, axis), spacing)
    assert found.hd95 == pytest.approx(3 * spacing[axis])


def test_parallel_plates_have_exact_distances():
    """Two plates one voxel thick, seven voxels apart in the thick direction: every point of either is 35 mm away."""
    first, second = (box((14, 20, 20), ((k, k + 1), (0, 20), (0, 20))) for k in (2, 9))
    found = surface_distances(first, second, (5.0, 1.0, 1.0))
    # the nearer of a plate's two faces is one voxel nearer than the farther one: 30 and 35 mm, of equal area
    assert found.hd95 == pytest.approx(35.0)
    assert found.assd == pytest.approx(32.5, rel=0.05)
    assert found.nsd(29.9) == 0.0
    assert found.nsd(35.0) == 1.0
    assert found.nsd(30.0) == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (2.0, 1.0, 1.0)])
def test_concentric_balls_are_as_far_as_their_radii_differ(spacing):
    shape = tuple(int(np.ceil(52 / s)) for s in spacing)
    centre = [25 / s for s in spacing]
    small, large = (ball(shape, centre, radius, spacing) for radius in (18, 23))
    found = surface_distances(small, large, spacing)
    voxel = float(np.linalg.norm(spacing))
    assert 5 - voxel <= found.assd <= 5 + voxel
    assert 5 - voxel / 2 <= found.hd95 <= 5 + voxel
    assert found.nsd(5 + voxel) == 1.0
    assert found.nsd(5 - voxel) == 0.0


def test_area_counts_not_elements():
    """A slab grown by two voxels on one side: beyond are 1.5 columns of its faces (corners at 1 and 2) and its rim."""
    reference = box((6, 30, 30), ((2, 4), (5, 25), (5, 25)))
    prediction = box((6, 30, 30), ((2, 4), (5, 25), (5, 27)))
    shares = []
    for thickness in (0.01, 100.0):
        found = surface_distances(reference, prediction, (thickness, 1.0, 1.0))
        shares.append(found.area_prediction[found.to_reference > 0.5].sum() / found.area_prediction.sum())
    # thin slices have faces only, thick ones rims only; the number of elements beyond is the same
    assert shares == pytest.approx([1.5 / 22, (20 + 2 * 1.5) / (2 * 22 + 2 * 20)], abs=0.02)


def test_a_far_false_positive_is_not_hidden():
    """One percentile of both directions together would give 0 here: docs/metrics.md."""
    lesion = ball((30, 30, 160), (14, 14, 14), 10)
    found = surface_distances(lesion, lesion | ball((30, 30, 160), (14, 14, 140), 3), (1, 1, 1))
    assert found.hd95 > 100


def test_exchanging_the_masks_changes_nothing():
    first, second = ball((24, 24, 24), (10, 11, 12), 7), box((24, 24, 24), ((5, 15), (4, 18), (8, 20)))
    one, other = (surface_distances(*pair, (2, 1, 1.5)) for pair in ((first, second), (second, first)))
    assert one.hd95 == other.hd95
    assert one.assd == pytest.approx(other.assd)
    assert one.nsd(2) == pytest.approx(other.nsd(2))


def test_distances_scale_with_the_spacing():
    first, second = ball((24, 24, 24), (10, 11, 12), 7), ball((24, 24, 24), (12, 11, 12), 8)
    one, tenfold = (surface_distances(first, second, np.multiply(k, (2, 1, 1.5))) for k in (1, 10))
    assert tenfold.hd95 == pytest.approx(10 * one.hd95)
    assert tenfold.assd == pytest.approx(10 * one.assd)
    assert tenfold.nsd(20) == pytest.approx(one.nsd(2))


def test_the_rest_of_the_image_does_not_matter():
    """Empty space may be added or cut, up to masks that touch the border."""
    first, second = ball((20, 20, 20), (9, 9, 9), 6), ball((20, 20, 20), (10, 9, 9), 5)
    tight = (slice(3, 16), slice(3, 16), slice(3, 16))
    padded = [np.pad(mask, 7) for mask in (first, second)]
    values = [
        (found.hd95, found.assd, found.nsd(1))
        for found in (
            surface_distances(*m, (1, 2, 3)) for m in (padded, (first, second), (first[tight], second[tight]))
        )
    ]
    assert values[0] == values[1] == values[2]


@pytest.mark.parametrize("which", ["reference", "prediction", "both"])
def test_empty_masks_are_refused_for_a_policy_to_decide(which):
    mask, empty = box((8, 8, 8), ((2, 4),) * 3), np.zeros((8, 8, 8), bool)
    masks = {"reference": (empty, mask), "prediction": (mask, empty), "both": (empty, empty)}[which]
    with pytest.raises(ValueError, match="empty policy"):
        surface_distances(*masks, (1, 1, 1))


@pytest.mark.reference
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_monai_agrees(spacing):
    """NSD to rounding (MONAI's sub-voxel surfaces are the same); HD95 and ASSD, of border voxels, within a voxel."""
    torch = pytest.importorskip("torch")
    from monai.metrics import compute_average_surface_distance, compute_hausdorff_distance, compute_surface_dice

    rng = np.random.default_rng(3)
    for _ in range(3):
        centre, radius = rng.uniform(14, 18, 3), rng.uniform(6, 10, 2)
        first, second = (
            ball((32, 32, 32), centre, radius[0]),
            ball((32, 32, 32), centre + rng.uniform(-3, 3, 3), radius[1]),
        )
        found = surface_distances(first, second, spacing)
        y, y_pred = (torch.from_numpy(mask[None, None].astype(np.float32)) for mask in (first, second))
        same = {"include_background": True, "spacing": spacing}
        for tolerance in (1.0, 2.6):  # no distance equals these, so that rounding decides nothing
            theirs = float(compute_surface_dice(y_pred, y, [tolerance], use_subvoxels=True, **same))
            assert found.nsd(tolerance) == pytest.approx(theirs, abs=1e-5)
        voxel = float(np.linalg.norm(spacing))
        assert found.hd95 == pytest.approx(
            float(compute_hausdorff_distance(y_pred, y, percentile=95, **same)), abs=voxel
        )
        theirs = float(compute_average_surface_distance(y_pred, y, symmetric=True, **same))
        assert found.assd == pytest.approx(theirs, abs=voxel / 2)
