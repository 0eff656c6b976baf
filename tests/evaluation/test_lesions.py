"""The BraTS 2023 rule on lesions made by hand; 1 mm voxels unless said otherwise."""

import numpy as np
import pytest

from nnunet_diffrefine.evaluation.lesions import MISSED_HD95, LesionRule, lesion_scores
from nnunet_diffrefine.evaluation.surface import surface_distances
from tests.evaluation.shapes import box

SHAPE = (20, 20, 80)
FIRST = ((5, 10), (5, 10), (5, 10))  # 125 mm3
SECOND = ((5, 10), (5, 10), (40, 45))
THIRD = ((5, 10), (5, 10), (60, 65))
ISO = (1.0, 1.0, 1.0)
EMPTY = np.zeros(SHAPE, bool)


def scores(reference, prediction, spacing=ISO, **rule):
    return lesion_scores(reference, prediction, spacing, LesionRule(**rule))


def test_all_lesions_found():
    mask = box(SHAPE, FIRST, SECOND)
    found = scores(mask, mask)
    assert (found.dice, found.hd95, found.lesions, found.missed, found.false) == (1.0, 0.0, 2, 0, 0)


def test_a_missed_lesion_counts_0_and_374_mm():
    found = scores(box(SHAPE, FIRST, SECOND), box(SHAPE, FIRST))
    assert (found.dice, found.hd95) == (0.5, MISSED_HD95 / 2)
    assert (found.lesions, found.missed, found.false) == (2, 1, 0)


def test_false_positives_count_whatever_their_size():
    speck = ((15, 16), (15, 16), (70, 71))
    found = scores(box(SHAPE, FIRST), box(SHAPE, FIRST, SECOND, speck))
    assert (found.dice, found.hd95) == (pytest.approx(1 / 3), pytest.approx(2 * MISSED_HD95 / 3))
    assert (found.lesions, found.missed, found.false) == (1, 0, 2)


def test_neither_lesion_nor_false_positive_is_perfect():
    assert scores(EMPTY, EMPTY).dice == 1.0
    assert scores(EMPTY, EMPTY).hd95 == 0.0


@pytest.mark.parametrize(("reference", "prediction"), [((), (FIRST,)), ((FIRST,), ())])
def test_one_empty_mask_is_the_penalty(reference, prediction):
    found = scores(box(SHAPE, *reference), box(SHAPE, *prediction))
    assert (found.dice, found.hd95) == (0.0, 374.0)


def test_scores_of_a_lesion_are_those_of_its_own_box():
    """Each lesion is compared with its own components; the mean does not see how large a lesion is."""
    half = ((5, 10), (5, 10), (40, 43))
    found = scores(box(SHAPE, FIRST, SECOND), box(SHAPE, FIRST, half))
    alone = surface_distances(box(SHAPE, SECOND), box(SHAPE, half), ISO).hd95
    assert found.dice == pytest.approx((1 + 2 * 75 / (125 + 75)) / 2)
    assert found.hd95 == pytest.approx((0 + alone) / 2)


@pytest.mark.parametrize(("gap", "lesions"), [(6, 1), (7, 2)])
def test_parts_that_meet_once_dilated_are_one_lesion(gap, lesions):
    """Three dilations of either side close a gap of six voxels (they touch), not of seven."""
    mask = box(SHAPE, FIRST, ((5, 10), (5, 10), (10 + gap, 15 + gap)))
    found = scores(mask, mask)
    assert (found.lesions, found.dice) == (lesions, 1.0)


def test_dilation_uses_the_18_neighbourhood():
    """One dilation of two voxels that are (2, 2, 2) apart meets with 26 neighbours at their common corner only.

    With 18, each reaches (1, 1, 0) and the like but not (1, 1, 1); those of both still touch, as components are
    26-connected. At (3, 3, 3) a cube's corner would touch and the 18-neighbourhood does not.
    """
    for step, lesions in ((2, 1), (3, 2)):
        near = box(SHAPE, ((5, 6),) * 3, ((5 + step, 6 + step),) * 3)
        assert scores(near, near, dilation=1, minimum_volume=0).lesions == lesions


def test_all_components_near_a_lesion_are_pooled():
    """Two halves of a prediction, one of them only in the dilated rim, belong to the one lesion."""
    inside, rim = ((5, 10), (5, 10), (5, 9)), ((5, 10), (5, 10), (11, 12))
    found = scores(box(SHAPE, FIRST), box(SHAPE, inside, rim))
    assert (found.lesions, found.missed, found.false) == (1, 0, 0)
    assert found.dice == pytest.approx(2 * 100 / (125 + 125))


@pytest.mark.parametrize(("gap", "false"), [(2, 0), (3, 1)])
def test_a_component_belongs_to_a_lesion_within_its_dilation(gap, false):
    near = ((5, 10), (5, 10), (10 + gap, 12 + gap))
    found = scores(box(SHAPE, FIRST), box(SHAPE, FIRST, near))
    assert found.false == false  # dilated three times the lesion covers 10, 11 and 12


def test_one_component_over_two_lesions_belongs_to_both():
    """The prediction bridges two lesions: each is found, each pays for the whole component."""
    bridge = ((5, 10), (5, 10), (5, 45))
    found = scores(box(SHAPE, FIRST, SECOND), box(SHAPE, bridge))
    assert (found.lesions, found.missed, found.false) == (2, 0, 0)
    assert found.dice == pytest.approx(2 * 125 / (125 + 1000))


@pytest.mark.parametrize(("spacing", "lesions"), [((1, 1, 1), 0), ((1, 1, 1.01), 1)])
def test_lesions_of_at_most_the_minimum_volume_are_not_scored(spacing, lesions):
    """50 voxels are 50 mm3, which is not more than 50 mm3. What is predicted there is no false positive."""
    small = box(SHAPE, ((5, 10), (5, 10), (5, 7)))
    found = scores(small, small, spacing)
    assert (found.lesions, found.false, found.dice) == (lesions, 0, 1.0)
    assert scores(small, EMPTY, spacing).missed == lesions


def test_spacing_sets_distances_and_volumes():
    shifted = ((5, 10), (5, 10), (6, 11))
    found = scores(box(SHAPE, FIRST), box(SHAPE, shifted), (1, 1, 7))
    assert found.hd95 == pytest.approx(7.0)
    assert scores(box(SHAPE, FIRST), box(SHAPE, FIRST), (0.1, 0.1, 0.1)).lesions == 0


def test_dilation_0_separates_what_does_not_touch():
    mask = box(SHAPE, FIRST, ((5, 10), (5, 10), (11, 16)))
    assert scores(mask, mask, dilation=0).lesions == 2


def test_lesions_at_the_border_and_shuffled_axes_score_alike():
    reference = box(SHAPE, ((0, 5), (0, 5), (0, 5)), THIRD)
    prediction = box(SHAPE, ((0, 5), (1, 6), (0, 5)), SECOND)
    one = scores(reference, prediction, (1, 2, 3))
    other = scores(reference.transpose(2, 0, 1), prediction.transpose(2, 0, 1), (3, 1, 2))
    assert one == other
    assert (one.lesions, one.missed, one.false) == (2, 1, 1)


@pytest.mark.parametrize("rule", [{"dilation": -1}, {"minimum_volume": -1.0}, {"minimum_volume": float("nan")}])
def test_impossible_parameters_are_refused(rule):
    with pytest.raises(ValueError, match="--lesion_"):
        LesionRule(**rule)
