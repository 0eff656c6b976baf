"""What an error map has to beat: stage one's own confidence and the spread, beside it in the report."""

import json
import re
import shutil

import numpy as np
import pytest
import SimpleITK as sitk
from scipy import stats

from nnunet_diffrefine.evaluation.classes import Classes, EvaluatedClass
from nnunet_diffrefine.reports.confidence import own_doubt
from nnunet_diffrefine.reports.reliability import MAP, OWN, SPREAD, measure
from nnunet_diffrefine.reports.volumes import Folders, find_volumes
from tests.reports import study
from tests.reports.test_report_command import Page, report, tables_of

LABELS = Classes((EvaluatedClass("tail", (2,)), EvaluatedClass("head", (1,))), None, ".nii.gz")  # not in order
REGIONS = Classes((EvaluatedClass("whole", (1, 2)), EvaluatedClass("core", (2,))), None, ".nii.gz")
SHAPE = (2, 1, 2)
DECIDED = np.array([0, 1, 2, 1]).reshape(SHAPE)


def doubt(folder, classes, p):
    p = np.asarray(p, np.float32).reshape(len(p), *SHAPE)
    np.savez_compressed(folder / "case.npz", probabilities=p)
    return own_doubt(folder / "case.npz", classes.masks(DECIDED), classes).ravel()


def test_the_doubt_of_labels_is_one_less_the_probability_of_the_label_decided(tmp_path):
    """Channels are in the order of the labels. The last voxel was decided against the probabilities."""
    p = [[0.7, 0.1, 0.1, 0.2], [0.2, 0.8, 0.3, 0.2], [0.1, 0.1, 0.6, 0.6]]
    assert doubt(tmp_path, LABELS, p) == pytest.approx([0.3, 0.2, 0.4, 0.8])


def test_the_doubt_of_regions_is_the_largest_difference_to_the_decision(tmp_path):
    p = [[0.2, 0.9, 0.7, 1.0], [0.1, 0.3, 0.8, 0.0]]
    assert doubt(tmp_path, REGIONS, p) == pytest.approx([0.2, 0.3, 0.3, 0.0])


@pytest.mark.parametrize(
    ("p", "message"),
    [
        ([[1.0] * 4] * 2, r"case\.npz has shape \(2, 2, 1, 2\); .* want \(3, 2, 1, 2\)"),
        ([[1.5] * 4] * 3, "values from 1.5 to 1.5; wanted probabilities"),
        ([[-0.5] * 4] * 3, "values from -0.5"),
        ([[np.nan] * 4] * 3, "values from nan"),
    ],
)
def test_what_are_no_probabilities_of_the_case_is_refused(tmp_path, p, message):
    with pytest.raises(ValueError, match=message):
        doubt(tmp_path, LABELS, p)


def test_a_damaged_file_is_refused_by_name(tmp_path):
    (tmp_path / "case.npz").write_bytes(b"PK nothing")
    with pytest.raises(ValueError, match=r"case\.npz cannot be read as nnU-Net's probabilities"):
        own_doubt(tmp_path / "case.npz", LABELS.masks(DECIDED), LABELS)


def test_rounding_of_half_precision_is_no_fault(tmp_path):
    found = doubt(tmp_path, LABELS, [[1.0005] * 4, [-0.0005] * 4, [0.0] * 4])
    assert found == pytest.approx([0, 1, 1, 1])


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    options = study.build(tmp_path_factory.mktemp("study"))
    study.write_probabilities(options["-s"], sure=0.8)
    return options


def folders(given, **changes):
    return Folders(given["-gt"], given["-s"], given["-djfile"], error_maps=given["--error_maps"], **changes)


def test_each_is_judged_by_the_same_errors(given, tmp_path):
    """A spread of any size counts by its order alone."""
    rng = np.random.default_rng(0)
    for case in study.CASES:
        spread = rng.gamma(0.5, 3, study.SHAPE).astype(np.float32)
        study.write(tmp_path / f"{case}.nii.gz", spread)
    found = measure(find_volumes(folders(given, uncertainty=tmp_path), study.CASES))
    assert list(found) == [MAP, OWN, SPREAD]
    assert found[OWN].everywhere.ece == pytest.approx(
        abs(0.2 - found[OWN].everywhere.wrong.sum() / found[OWN].everywhere.n.sum())
    )
    spreads, wrong = [], []
    for case in study.CASES:
        read = [sitk.GetArrayFromImage(sitk.ReadImage(str(given[o] / f"{case}.nii.gz"))) for o in ("-gt", "-s")]
        spreads.append(sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / f"{case}.nii.gz"))).ravel())
        wrong.append((read[0] != read[1]).ravel())
    u, y = np.concatenate(spreads), np.concatenate(wrong)
    auroc = stats.mannwhitneyu(u[y], u[~y]).statistic / (y.sum() * (~y).sum())
    assert found[SPREAD].everywhere.auroc == pytest.approx(auroc, abs=2e-3)
    assert {int(known.everywhere.wrong.sum()) for known in found.values()} == {int(y.sum())}


def test_the_report_shows_all_three_and_a_spread_has_only_its_order(given, tmp_path):
    options = {key: given[key] for key in ("-gt", "-s", "--error_maps", "--uncertainty", "-djfile")}
    assert report(tmp_path, *tables_of(given), options) == 0
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    table = next(table for table in Page(text).tables if "ECE" in table[0])
    names = [MAP, OWN, SPREAD]
    assert [row[1] for row in table[1:]] == names * 2
    assert [row[0] for row in table[1:]] == ["within 5 mm of stage one's surface"] * 3 + ["all"] * 3
    for row in table[1:]:
        _, judged, _, _, probability, ece, brier, auroc = row
        assert ([probability, ece, brier] == ["–"] * 3) == (judged == SPREAD)
        assert 0 <= float(auroc) <= 1
    assert all(float(row[4]) == pytest.approx(0.2) for row in table[1:] if row[1] == OWN)
    chart = re.search(r'aria-label="Reliability".*?</svg>', text, re.S)[0]
    assert OWN in chart
    assert SPREAD not in chart


def test_without_probabilities_the_report_says_what_is_missing(given, tmp_path):
    bare = shutil.copytree(given["-s"], tmp_path / "s", ignore=shutil.ignore_patterns("*.npz"))
    options = {key: given[key] for key in ("-gt", "--error_maps", "-djfile")} | {"-s": bare}
    assert report(tmp_path / "out", *tables_of(given), options) == 0
    text = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "is not shown: it needs probabilities (.npz) beside stage one" in text
    assert SPREAD not in text


def test_probabilities_of_some_cases_are_refused(given, tmp_path, capsys):
    part = shutil.copytree(given["-s"], tmp_path / "s")
    (part / "case_b.npz").unlink()
    options = {key: given[key] for key in ("-gt", "--error_maps", "-djfile")} | {"-s": part}
    assert report(tmp_path / "out", *tables_of(given), options) == 1
    assert "has probabilities (.npz) of some cases, but not of 1 such as case_b" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_probabilities_are_left_aside_where_the_reader_turned_the_images(given, tmp_path):
    """Their axes are not those of the label maps."""
    content = json.loads(given["-djfile"].read_text()) | {"overwrite_image_reader_writer": "NibabelIOWithReorient"}
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    turned = find_volumes(folders({**given, "-djfile": tmp_path / "dataset.json"}), study.CASES)
    assert all(case.probabilities is None for case in turned.cases.values())
    kept = find_volumes(folders(given), study.CASES)
    assert all(case.probabilities is not None for case in kept.cases.values())


def test_maps_of_a_tiff_dataset_need_no_spacing_of_their_own(tmp_path):
    """Apply writes CASE.tif alone; the spacing is that beside the references."""
    for name in ("gt", "s", "error_map"):
        study.write(
            tmp_path / name / "case.tif", study.labels().astype(np.float32 if name == "error_map" else np.uint8)
        )
    (tmp_path / "gt" / "case.json").write_text('{"spacing": [2, 1, 1]}')
    content = {"channel_names": {"0": "T1"}, "labels": {"background": 0, "head": 1, "tail": 2}, "file_ending": ".tif"}
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    given = Folders(tmp_path / "gt", tmp_path / "s", tmp_path / "dataset.json", error_maps=tmp_path / "error_map")
    assert find_volumes(given, ["case"]).cases["case"].header.spacing == (1, 1, 2)
