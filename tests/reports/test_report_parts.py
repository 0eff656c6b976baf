"""Closed forms of what a report measures, and where its pictures are taken from."""

import math
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from scipy import stats

from nnunet_diffrefine.image_files import Header
from nnunet_diffrefine.reports import reliability
from nnunet_diffrefine.reports.metrics_table import MetricsTable
from nnunet_diffrefine.reports.reliability import histogram, surface_band
from nnunet_diffrefine.reports.selection import Review, choose
from nnunet_diffrefine.reports.sizes import size_groups
from nnunet_diffrefine.reports.slices import find_plane
from nnunet_diffrefine.reports.volumes import read_map, to_lps


def test_a_calibrated_map_has_no_calibration_error_and_the_brier_score_of_its_spread():
    p = np.repeat([0.25, 0.75], 400)
    wrong = np.concatenate([np.arange(400) % 4 == 0, np.arange(400) % 4 != 0])
    found = histogram(p, wrong)
    assert found.ece == pytest.approx(0)
    assert found.brier == pytest.approx(0.25 * 0.75)


@pytest.mark.parametrize(("p", "share", "ece"), [(0.9, 0.5, 0.4), (0.1, 0.5, 0.4), (1.0, 0.0, 1.0), (0.0, 1.0, 1.0)])
def test_ece_of_one_probability_is_its_distance_to_the_share(p, share, ece):
    wrong = np.arange(100) < 100 * share
    assert histogram(np.full(100, p), wrong).ece == pytest.approx(ece)


def test_auroc_is_the_mann_whitney_statistic():
    rng = np.random.default_rng(0)
    wrong = rng.random(500) < 0.3
    p = np.round(np.clip(rng.normal(0.4 + 0.2 * wrong, 0.2), 0, 0.999), 2) + 0.0005  # ties, but none across fine bins
    u = stats.mannwhitneyu(p[wrong], p[~wrong]).statistic / (wrong.sum() * (~wrong).sum())
    assert histogram(p, wrong).auroc == pytest.approx(u)
    assert histogram(p, np.zeros_like(wrong)).auroc is None


def test_histograms_add_up():
    rng = np.random.default_rng(1)
    p, wrong = rng.random(200), rng.random(200) < 0.5
    both, halves = histogram(p, wrong), histogram(p[:80], wrong[:80]) + histogram(p[80:], wrong[80:])
    assert (halves.ece, halves.brier, halves.auroc) == pytest.approx((both.ece, both.brier, both.auroc))


def test_the_band_is_measured_in_millimetres():
    mask = np.zeros((21, 21, 41), bool)
    mask[10, 10, 20] = True
    band = surface_band([mask], (2.0, 1.0, 0.5))
    reach = [np.ptp(np.flatnonzero(band.any(tuple({0, 1, 2} - {axis})))) / 2 for axis in range(3)]
    assert reach == [int(reliability.BAND / s) for s in (2.0, 1.0, 0.5)]
    assert not surface_band([np.zeros_like(mask)], (1, 1, 1)).any()


def test_cases_are_chosen_by_change_and_by_value():
    change = {"a": 0.3, "b": -0.2, "c": 0.0, "d": 0.1, "e": math.nan}
    dice = {"a": 0.9, "b": 0.8, "c": 0.7, "d": 0.95, "e": 0.1}
    assert choose(change, dice, None, 1) == {
        "a": ["most improved"],
        "b": ["most harmed"],
        "c": ["median"],
        "e": ["worst Dice"],
    }
    by_review = choose(change, dice, Review(("d", "e", "c", "b", "a"), {}), 2)
    assert [case for case, why in by_review.items() if "first to review" in why] == ["d", "e"]
    assert not any("worst Dice" in why for why in by_review.values())
    # nothing improved: no case is called so
    assert choose({"a": -0.1, "b": -0.2}, {"a": 0.5, "b": 0.4}, None, 2) == {
        "b": ["most harmed", "median", "worst Dice"],
        "a": ["most harmed", "median", "worst Dice"],
    }


def _table(name, dice, volumes):
    cases = [f"c{i:02d}" for i in range(len(dice))]
    columns = {("l", "Dice"): dice, ("l", "reference_volume"): volumes}
    return MetricsTable(name, {key: dict(zip(cases, map(float, v), strict=True)) for key, v in columns.items()}, None)


def test_thirds_partition_the_cases_by_volume():
    volumes = [0, 0, *range(1, 12)]
    old = _table("old", np.full(13, 0.5), volumes)
    new = _table("new", [0.5, 0.5, *(0.5 + 0.1 * (v > 8) for v in range(1, 12))], volumes)
    groups = {group.name: group for group in size_groups(old, new, ["Dice"], 0)}
    assert list(groups) == ["present", "small third", "middle third", "large third", "absent from reference"]
    parts = [groups[f"{size} third"] for size in ("small", "middle", "large")]
    assert sorted(sum((part.cases for part in parts), ())) == sorted(groups["present"].cases)
    assert [part.volumes for part in parts] == [(1, 4), (5, 8), (9, 11)]
    assert [part.results["Dice"].difference for part in parts] == pytest.approx([0, 0, 0.1])
    assert groups["absent from reference"].volumes is None
    few = size_groups(_table("a", [0.5] * 3, [1, 2, 3]), _table("b", [0.5] * 3, [1, 2, 3]), ["Dice"], 0)
    assert [group.name for group in few] == ["present"]


@pytest.mark.parametrize("value", [np.nan, np.inf, -0.1, 1.1])
def test_a_map_outside_its_range_is_refused(tmp_path, value):
    array = np.zeros((2, 3, 4), np.float32)
    array[1, 1, 1] = value
    sitk.WriteImage(sitk.GetImageFromArray(array), str(tmp_path / "map.mha"))
    with pytest.raises(ValueError, match=r"holds 1 values such as .*; wanted 0 to 1"):
        read_map(tmp_path / "map.mha", largest=1)


@pytest.mark.parametrize(
    ("direction", "corner"),
    [
        ((1, 0, 0, 0, 1, 0, 0, 0, 1), (0, 0, 0)),
        ((-1, 0, 0, 0, -1, 0, 0, 0, 1), (0, 3, 4)),
        ((0, 0, 1, 1, 0, 0, 0, 1, 0), (0, 0, 0)),
        ((1, 0, 0, 0, 1, 0, 0, 0, -1), (2, 0, 0)),
    ],
)
def test_volumes_are_turned_to_the_patient_not_to_the_file(direction, corner):
    """A voxel at the patient's right, anterior, inferior corner ends at index 0 whatever the header's direction."""
    axes = np.array(direction).reshape(3, 3)
    size = np.abs(axes.T @ (5, 4, 3)).astype(int)  # x, y, z of the file, for a patient of 5 x 4 x 3 voxels
    spacing = np.abs(axes.T @ (1.0, 2.0, 3.0))
    array = np.zeros(size[::-1], np.float32)
    first = [0 if axes[:, i].sum() > 0 else size[i] - 1 for i in range(3)]
    array[tuple(first[::-1])] = 1
    turned, mm = to_lps(array, Header(tuple(map(int, size)), tuple(map(float, spacing)), (0, 0, 0), direction))
    assert turned.shape == (3, 4, 5)
    assert mm == pytest.approx((3, 2, 1))
    assert np.argmax(turned) == 0
    assert tuple(first[::-1]) == corner


def test_the_slice_is_the_one_with_most_and_lies_in_the_acquired_plane():
    mask = np.zeros((6, 7, 8), bool)
    mask[4, 1:3, :] = True
    mask[2, 0, 0] = True
    assert find_plane(mask, (1.0, 1.0, 1.0)) == (0, 4)
    assert find_plane(mask, (1.0, 3.0, 1.0))[0] == 1
    assert find_plane(mask, (1.0, 1.0, 5.0))[0] == 2


@pytest.mark.slow
def test_the_wheel_holds_the_templates(tmp_path):
    repository = Path(__file__).resolve().parents[2]
    command = (sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path))
    subprocess.run(command, cwd=repository, check=True, capture_output=True)
    names = zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist()
    folder = "nnunet_diffrefine/reports/templates"
    assert {f"{folder}/report.{ending}" for ending in ("html", "css", "js")} <= {*names}
