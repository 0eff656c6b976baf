"""Metrics of one case: overlap, volumes, empty policy; labels, regions and the ignore label."""

import math

import numpy as np
import pytest

from nnunet_diffrefine.evaluation.case_metrics import Settings, evaluate_case, measure
from nnunet_diffrefine.evaluation.cases import Case
from nnunet_diffrefine.evaluation.classes import read_classes
from nnunet_diffrefine.evaluation.definitions import find_metric, metrics
from nnunet_diffrefine.image_files import read_header, read_labels
from tests.evaluation.shapes import box, write, write_dataset_json

SHAPE = (16, 16, 16)
CUBE = box(SHAPE, ((4, 12),) * 3)
EMPTY = np.zeros(SHAPE, bool)
SPACING = (2.0, 1.0, 0.5)
DIAGONAL = 99.0


def measured(reference, prediction, **settings):
    return measure(reference, prediction, SPACING, Settings(**settings), DIAGONAL)


def test_every_metric_has_a_value_under_its_name_and_is_documented():
    settings = Settings(tolerances=(0.5, 3.0))
    kinds = metrics(settings.tolerances)
    assert set(measure(CUBE, CUBE, SPACING, settings, DIAGONAL)) == {kind.name for kind in kinds}
    assert [find_metric(kind.name) for kind in kinds] == list(kinds)
    with pytest.raises(ValueError, match="no metric 'dice'; there are Dice"):
        find_metric("dice")


def test_overlap_of_a_shifted_cube():
    """Moved by 2 of 8 voxels: 6/8 of each is common."""
    values = measured(CUBE, np.roll(CUBE, 2, 1))
    assert values["Dice"] == pytest.approx(6 / 8)
    assert values["IoU"] == pytest.approx(6 / 10)
    assert values["HD95"] == pytest.approx(2.0)
    assert values["volume_error"] == values["relative_volume_error"] == 0.0


def test_volumes_are_in_millilitres_with_their_sign():
    smaller = box(SHAPE, ((4, 12), (4, 12), (4, 10)))
    values = measured(CUBE, smaller)
    assert values["reference_volume"] == pytest.approx(512 / 1000)  # 1 mm3 voxels
    assert values["volume_error"] == pytest.approx(-128 / 1000)
    assert values["relative_volume_error"] == pytest.approx(-25.0)
    assert measured(smaller, CUBE)["volume_error"] == pytest.approx(128 / 1000)


@pytest.mark.parametrize(("policy", "overlap", "distance"), [("nnunet", math.nan, math.nan), ("brats", 1.0, 0.0)])
def test_both_empty(policy, overlap, distance):
    values = measured(EMPTY, EMPTY, policy=policy)
    assert [values[k] for k in ("Dice", "IoU", "NSD@1mm")] == pytest.approx([overlap] * 3, nan_ok=True)
    assert [values[k] for k in ("HD95", "ASSD")] == pytest.approx([distance] * 2, nan_ok=True)
    assert values["volume_error"] == 0.0
    assert math.isnan(values["relative_volume_error"])


@pytest.mark.parametrize(("policy", "distance"), [("nnunet", DIAGONAL), ("brats", 374.0)])
@pytest.mark.parametrize("masks", [(CUBE, EMPTY), (EMPTY, CUBE)])
def test_one_empty(masks, policy, distance):
    values = measured(*masks, policy=policy)
    assert [values[k] for k in ("Dice", "IoU", "NSD@1mm", "NSD@2mm")] == [0.0] * 4
    assert [values[k] for k in ("HD95", "ASSD")] == [distance] * 2
    assert abs(values["volume_error"]) == pytest.approx(0.512)


@pytest.mark.parametrize("settings", [{"tolerances": (0.0,)}, {"tolerances": (1, 1.0)}, {"policy": "zero"}])
def test_impossible_settings_are_refused(settings):
    with pytest.raises(ValueError, match="wanted"):
        Settings(**settings)


@pytest.fixture
def evaluated(tmp_path):
    """Evaluate one case of the given labels."""

    def run(reference, prediction, labels):
        classes = read_classes(write_dataset_json(tmp_path, labels))
        files = [tmp_path / name / "case.nii.gz" for name in ("reference", "prediction")]
        for file, array in zip(files, (reference, prediction), strict=True):
            write(file, array, spacing=SPACING[::-1])
        return evaluate_case(Case("case", *files, read_header(files[0])), classes, Settings())

    return run


def test_labels_are_measured_one_by_one(evaluated):
    reference, prediction = np.zeros(SHAPE, np.uint8), np.zeros(SHAPE, np.uint8)
    reference[2:8, 2:8, 2:8], reference[10:14, 2:8, 2:8] = 1, 3
    prediction[2:8, 2:8, 2:5] = 1
    result = evaluated(reference, prediction, {"background": 0, "left": 1, "right": 3})
    assert list(result.values) == ["left", "right"]
    assert result.values["left"]["Dice"] == pytest.approx(2 / 3)
    assert result.empty == {"left": "neither", "right": "prediction"}
    diagonal = math.sqrt(sum((16 * s) ** 2 for s in SPACING))
    assert result.values["right"]["HD95"] == pytest.approx(diagonal)


def test_spacing_is_in_the_order_of_the_axes(evaluated):
    """A shift by 3 along the first array axis, z, is 6 mm."""
    reference = np.zeros(SHAPE, np.uint8)
    reference[4:12, 4:12, 4:12] = 1
    for axis, spacing in enumerate(SPACING):
        result = evaluated(reference, np.roll(reference, 3, axis), {"background": 0, "cube": 1})
        assert result.values["cube"]["HD95"] == pytest.approx(3 * spacing)


def test_regions_are_unions_of_labels(evaluated):
    """Confusing the parts of a region costs the parts, not the region."""
    reference, prediction = np.zeros(SHAPE, np.uint8), np.zeros(SHAPE, np.uint8)
    reference[4:12, 4:12, 4:8], reference[4:12, 4:12, 8:12] = 1, 2
    prediction[4:12, 4:12, 4:12] = 2
    result = evaluated(reference, prediction, {"background": 0, "whole": [1, 2], "core": [2]})
    assert result.values["whole"]["Dice"] == 1.0
    assert result.values["whole"]["HD95"] == 0.0
    assert result.values["core"]["Dice"] == pytest.approx(2 * 256 / (256 + 512))


def test_what_is_predicted_under_the_ignore_label_does_not_matter(evaluated):
    labels = {"background": 0, "organ": 1, "ignore": 2}
    reference, prediction = np.zeros(SHAPE, np.uint8), np.zeros(SHAPE, np.uint8)
    reference[4:8, 4:12, 4:12], prediction[4:8, 4:12, 4:12] = 1, 1
    reference[10:] = 2
    results = []
    for junk in (0, 1, 2):
        prediction[10:] = junk
        results.append(evaluated(reference, prediction, labels).values)
    assert results[0] == results[1] == results[2]
    assert results[0]["organ"]["Dice"] == 1.0
    assert list(results[0]) == ["organ"]


def test_labels_that_are_not_in_dataset_json_are_refused(evaluated):
    labels = {"background": 0, "organ": 1, "ignore": 2}
    good, bad, ignored = (np.full(SHAPE, k, np.uint8) for k in (1, 7, 2))
    with pytest.raises(
        ValueError, match=r"reference.case\.nii\.gz holds label\(s\) \[7\]; dataset\.json has \[0, 1, 2\]"
    ):
        evaluated(bad, good, labels)
    with pytest.raises(ValueError, match=r"prediction.case\.nii\.gz holds label\(s\) \[7\]"):
        evaluated(good, bad, labels)
    with pytest.raises(ValueError, match=r"prediction.case\.nii\.gz holds label\(s\) \[2\]"):
        evaluated(good, ignored, labels)


@pytest.mark.parametrize("wrong", [0.5, float("nan")])
def test_float_label_maps_must_hold_whole_numbers(tmp_path, wrong):
    array = CUBE.astype(np.float32)
    write(tmp_path / "whole.mha", array)
    np.testing.assert_array_equal(read_labels(tmp_path / "whole.mha"), CUBE)
    array[0, 0, 0] = wrong
    write(tmp_path / "interpolated.mha", array)
    with pytest.raises(ValueError, match="interpolated.mha holds 1 values that are no labels"):
        read_labels(tmp_path / "interpolated.mha")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("no json", "is not JSON"),
        ('{"labels": {"background": 0, "a": 1}}', "lacks file_ending"),
        ('{"file_ending": ".nii.gz", "labels": {"0": "background", "1": "a"}}', "v1 had name and value"),
        ('{"file_ending": ".nii.gz", "labels": {"background": 0, "ignore": 1}}', "no foreground label"),
        ('{"file_ending": ".nii.gz", "labels": {"background": 0, "a": 1, "ignore": [2, 3]}}', "wanted one integer"),
        ("[]", "lacks labels and file_ending"),
    ],
)
def test_what_is_no_dataset_json_is_refused(tmp_path, content, message):
    (tmp_path / "dataset.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_classes(tmp_path / "dataset.json")
