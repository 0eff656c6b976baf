"""The command on folders as nnU-Net leaves them: what it writes, and what it refuses before it writes."""

import csv
import json
import math
from concurrent.futures.process import BrokenProcessPool

import numpy as np
import pytest

from nnunet_diffrefine.cli import main
from nnunet_diffrefine.evaluation import files, run
from nnunet_diffrefine.evaluation.definitions import metrics
from tests.evaluation.shapes import write, write_dataset_json

LABELS = {"background": 0, "head, left": 1, "tail": 2}
SPACING = (0.5, 1.0, 3.0)
CASES = ("case_001", "case_002", "003")


@pytest.fixture
def folders(tmp_path):
    """References, a validation folder with all that nnU-Net leaves there, dataset.json, and the output folder."""
    rng = np.random.default_rng(0)
    for case in CASES:
        labels = np.zeros((10, 12, 14), np.uint8)
        labels[2:6, 3:9, 3:9], labels[6:8, 3:9, 3:9] = 1, 2
        write(tmp_path / "labelsTr" / f"{case}.nii.gz", labels, SPACING)
        labels = np.roll(labels, rng.integers(0, 3), rng.integers(0, 3))
        if case == "003":
            labels[labels == 2] = 0
        write(tmp_path / "validation" / f"{case}.nii.gz", labels, SPACING)
    for name in ("summary.json", "case_001.npz", "case_001.pkl", "._case_001.nii.gz"):
        (tmp_path / "validation" / name).write_text(f"{name} as nnU-Net wrote it")
    write_dataset_json(tmp_path, LABELS)
    return tmp_path


def evaluate(folder, *more, output="out"):
    arguments = [folder / "labelsTr", folder / "validation", "-djfile", folder / "dataset.json", "-o", folder / output]
    with pytest.raises(SystemExit) as ended:
        main(["evaluate", *map(str, arguments), *more])
    return ended.value.code


def table(folder):
    with open(folder / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def snapshot(folder):
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_one_row_for_every_case_label_and_metric(folders):
    before = snapshot(folders)
    assert evaluate(folders, "-np", "1", "--tolerances", "0.5", "1", "2") == 0
    rows = table(folders / "out")
    kinds = metrics((0.5, 1, 2))
    expected = [(c, label, k.name, k.unit) for c in sorted(CASES) for label in ("head, left", "tail") for k in kinds]
    assert [(row["case"], row["label"], row["metric"], row["unit"]) for row in rows] == expected
    assert all(math.isfinite(float(row["value"])) for row in rows)
    assert {file: content for file, content in snapshot(folders).items() if file in before} == before
    assert sorted(file.name for file in (folders / "out").iterdir()) == ["metrics.csv", "metrics.json"]


def test_metrics_json_says_what_the_numbers_are(folders):
    assert evaluate(folders, "-np", "1") == 0
    content = json.loads((folders / "out" / "metrics.json").read_text())
    assert content["settings"]["tolerances_mm"] == [1.0, 2.0]
    assert content["settings"]["classes"] == {"head, left": [1], "tail": [2]}
    assert set(content["metrics"]) == {row["metric"] for row in table(folders / "out")}
    assert content["cases"]["case_001"]["spacing_mm"] == list(SPACING)
    none = {"both_empty": 0, "only_reference_empty": 0, "only_prediction_empty": 0}
    assert content["empty"]["counts"] == {"head, left": none, "tail": {**none, "only_prediction_empty": 1}}
    assert {"nnunet-diffrefine", "surface-distance", "numpy", "scipy", "SimpleITK"} == set(content["versions"])
    values = [float(r["value"]) for r in table(folders / "out") if r["label"] == "tail" and r["metric"] == "HD95"]
    assert content["summary"]["tail"]["HD95"] == {"mean": pytest.approx(np.mean(values)), "n": 3, "n_without_value": 0}


def test_cases_without_a_value_stay_in_the_table(folders):
    for folder in ("labelsTr", "validation"):
        write(folders / folder / "003.nii.gz", np.zeros((10, 12, 14), np.uint8), SPACING)
    assert evaluate(folders, "-np", "1") == 0
    rows = table(folders / "out")
    assert len(rows) == len(CASES) * 2 * len(metrics((1, 2)))
    assert [r["value"] for r in rows if r["case"] == "003" and r["metric"] in ("Dice", "HD95")] == [""] * 4
    content = json.loads((folders / "out" / "metrics.json").read_text())
    assert content["empty"]["counts"]["tail"]["both_empty"] == 1
    assert content["summary"]["tail"]["Dice"]["n_without_value"] == 1
    assert evaluate(folders, "-np", "1", "--empty", "brats") == 0
    assert [r["value"] for r in table(folders / "out") if r["case"] == "003" and r["metric"] == "Dice"] == ["1.0"] * 2


def test_processes_do_not_change_a_byte(folders):
    assert evaluate(folders, "-np", "1", output="one") == 0
    assert evaluate(folders, "-np", "2", output="two") == 0
    for name in ("metrics.csv", "metrics.json"):
        assert (folders / "one" / name).read_bytes() == (folders / "two" / name).read_bytes()


def test_without_o_the_tables_go_beside_summary_json(folders):
    arguments = ["evaluate", str(folders / "labelsTr"), str(folders / "validation"), "-np", "1"]
    with pytest.raises(SystemExit, match="0"):
        main([*arguments, "-djfile", str(folders / "dataset.json")])
    assert len(table(folders / "validation")) == len(CASES) * 2 * len(metrics((1, 2)))
    assert (folders / "validation" / "summary.json").read_text() == "summary.json as nnU-Net wrote it"


def refused(folders, capsys, *more):
    """The message of a run that ends with status 1 and leaves no output."""
    assert evaluate(folders, "-np", "1", *more) == 1
    assert not list((folders / "out").glob("*"))
    return capsys.readouterr().err


def test_the_arguments_of_nnunetv2_evaluate_folder_are_taken(folders, capsys):
    assert evaluate(folders, "-np", "1", "-pfile", "plans.json", "--chill") == 0
    assert len(table(folders / "out")) == len(CASES) * 2 * len(metrics((1, 2)))
    # but -o is a folder here and a file there
    assert evaluate(folders, "-np", "1", output="summary.json") == 1
    assert "summary.json; wanted a folder, for metrics.csv and metrics.json" in capsys.readouterr().err
    assert not (folders / "summary.json").exists()


def tiff_folders(folders, reference=True, prediction=True):
    """A TIFF data set of one case, the prediction one slice, 3 mm, above the reference; which of them have spacings."""
    labels = np.zeros((10, 12, 14), np.uint8)
    labels[2:6, 3:9, 3:9], labels[6:8, 3:9, 3:9] = 1, 2
    for name, moved, has_spacing in (("labelsTr", 0, reference), ("validation", 1, prediction)):
        write(folders / name / "case.tif", np.roll(labels, moved, 0))
        if has_spacing:
            (folders / name / "case.json").write_text(json.dumps({"spacing": SPACING[::-1]}))
    write_dataset_json(folders, LABELS, ".tif")


@pytest.mark.parametrize("with_spacing", [(True, True), (False, True), (True, False)])
def test_tiff_files_are_measured_in_mm(folders, with_spacing):
    """References in nnUNet_preprocessed have no CASE.json, predictions have."""
    tiff_folders(folders, *with_spacing)
    assert evaluate(folders, "-np", "1") == 0
    values = {row["metric"]: float(row["value"]) for row in table(folders / "out") if row["label"] == "tail"}
    assert values["HD95"] == pytest.approx(3.0)
    assert values["reference_volume"] == pytest.approx(2 * 6 * 6 * 0.5 * 1 * 3 / 1000)
    content = json.loads((folders / "out" / "metrics.json").read_text())
    assert content["cases"]["case"]["spacing_mm"] == list(SPACING)


def test_tiff_files_without_spacing_are_refused(folders, capsys):
    tiff_folders(folders, reference=False, prediction=False)
    assert "case.tif has no spacing" in refused(folders, capsys)


def test_tiff_files_of_other_spacing_are_refused(folders, capsys):
    tiff_folders(folders)
    (folders / "validation" / "case.json").write_text('{"spacing": [1, 1, 1]}')
    assert "spacing (1.0, 1.0, 1.0) instead of (0.5, 1.0, 3.0) mm" in refused(folders, capsys)


def test_cases_in_one_folder_only_are_listed(folders, capsys):
    (folders / "validation" / "003.nii.gz").unlink()
    message = refused(folders, capsys)
    assert "1 of 3 references have no prediction: 003. --chill" in message
    (folders / "labelsTr" / "case_002.nii.gz").unlink()
    message = refused(folders, capsys)
    assert "1 of 2 references have no prediction: 003." in message
    assert "1 of 2 predictions have no reference: case_002." in message
    assert "have no reference: case_002." in refused(folders, capsys, "--chill")


def test_chill_evaluates_what_was_predicted_and_names_the_rest(folders):
    (folders / "validation" / "003.nii.gz").unlink()
    assert evaluate(folders, "-np", "1", "--chill") == 0
    assert {row["case"] for row in table(folders / "out")} == {"case_001", "case_002"}
    content = json.loads((folders / "out" / "metrics.json").read_text())
    assert content["references_without_prediction"] == ["003"]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"shape": (10, 12, 13)}, "shape (13, 12, 10) instead of (14, 12, 10) voxels, by (-1, 0, 0)"),
        (
            {"spacing": (0.5, 1.0, 3.25)},
            "spacing (0.5, 1.0, 3.25) instead of (0.5, 1.0, 3.0) mm, by up to 0.25",
        ),
        (
            {"origin": (0.0, -4.0, 0.0)},
            "origin (0.0, -4.0, 0.0) instead of (0.0, 0.0, 0.0) mm, by up to 4 mm",
        ),
        ({"direction": (-1.0, 0, 0, 0, 1, 0, 0, 0, 1)}, "direction (-1.0, "),
    ],
)
def test_geometries_that_differ_are_refused_saying_by_how_much(folders, capsys, change, expected):
    shape = change.pop("shape", (10, 12, 14))
    write(folders / "validation" / "003.nii.gz", np.zeros(shape, np.uint8), **{"spacing": SPACING, **change})
    message = refused(folders, capsys)
    assert "1 of 3 predictions" in message
    assert f"003: {expected}" in message


def test_rounding_of_headers_is_no_difference(folders):
    near = tuple(s + 1e-6 for s in SPACING)
    write(folders / "validation" / "003.nii.gz", np.zeros((10, 12, 14), np.uint8), near, origin=(1e-4, 0, 0))
    assert evaluate(folders, "-np", "1") == 0


@pytest.mark.parametrize("shape", [(12, 14), (2, 10, 12, 14)])
def test_only_3d_label_maps_are_read(folders, capsys, shape):
    for folder in ("labelsTr", "validation"):
        write(folders / folder / "003.nii.gz", np.zeros(shape, np.uint8))
    assert f"003.nii.gz has {len(shape)} axes" in refused(folders, capsys)


def test_files_that_cannot_be_read_are_named(folders, capsys):
    (folders / "validation" / "003.nii.gz").write_bytes(b"not an image")
    assert "003.nii.gz cannot be read" in refused(folders, capsys)


def test_a_truncated_file_is_named(folders, capsys):
    file = folders / "validation" / "003.nii.gz"
    write(file, np.random.default_rng(0).integers(0, 2, (60, 60, 60)).astype(np.uint8), SPACING)
    write(folders / "labelsTr" / "003.nii.gz", np.zeros((60, 60, 60), np.uint8), SPACING)
    file.write_bytes(file.read_bytes()[:-6000])
    assert "003.nii.gz cannot be read" in refused(folders, capsys)


def test_an_error_in_a_worker_is_reported_as_in_one_process(folders, capsys):
    write(folders / "validation" / "003.nii.gz", np.full((10, 12, 14), 9, np.uint8), SPACING)
    assert "003.nii.gz holds label(s) [9]" in refused(folders, capsys)
    assert "003.nii.gz holds label(s) [9]" in refused(folders, capsys, "-np", "2")


def test_wrong_arguments_are_refused(folders, capsys):
    assert "-np is 0; wanted at least 1" in refused(folders, capsys, "-np", "0")
    assert "--tolerances are [-1.0]" in refused(folders, capsys, "--tolerances", "-1")
    assert "--lesion_dilation is -2" in refused(folders, capsys, "--lesion_dilation", "-2")
    (folders / "validation").rename(folders / "moved")
    assert "validation is not a folder" in refused(folders, capsys)
    (folders / "validation").mkdir()
    assert "no *.nii.gz" in refused(folders, capsys, "--chill")


def test_an_output_folder_that_cannot_be_written_is_refused_before_the_work(folders, capsys, monkeypatch):
    monkeypatch.setattr(run, "_evaluate", lambda *_: pytest.fail("started to evaluate"))
    (folders / "out").write_text("a file")
    assert evaluate(folders) == 1
    assert "Cannot write to the output folder" in capsys.readouterr().err


def test_a_killed_worker_is_explained(folders, capsys, monkeypatch):
    def killed(*_, **__):
        raise BrokenProcessPool

    monkeypatch.setattr(run, "as_completed", killed)
    assert "A worker process was killed" in refused(folders, capsys, "-np", "2")


def test_a_full_disk_leaves_the_old_table_whole(folders, monkeypatch):
    assert evaluate(folders, "-np", "1") == 0
    before = snapshot(folders / "out")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    assert evaluate(folders, "-np", "1", "--empty", "brats") == 1
    assert snapshot(folders / "out") == before
