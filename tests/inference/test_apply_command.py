"""The command in this process, with a refiner that was never trained: results, bad input, interruptions."""

from __future__ import annotations

import json
import pickle
import resource
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from nnunet_diffrefine.inference import apply as module
from nnunet_diffrefine.inference import case_work
from nnunet_diffrefine.inference.checks import check_request
from nnunet_diffrefine.inference.geometry import Geometry
from nnunet_diffrefine.inference.prediction import from_labels
from nnunet_diffrefine.inference.request import Request
from nnunet_diffrefine.paths import StageOneId
from tests.inference.small import (
    ENDING,
    SHAPE,
    Everywhere,
    Folders,
    Identity,
    NeverFlips,
    model_of,
    read_volume,
    write_volume,
)

KINDS = pytest.mark.parametrize("kind", ["labels", "regions"])
SPACES = {"same grid": {}, "resampled": {"spacing": (4.0, 1.1, 0.9), "transpose": (1, 2, 0)}}


@pytest.fixture
def run(monkeypatch):
    """Apply a refiner to folders; plans are those of the model, whose checkpoints are stand-ins."""

    def apply(folders: Folders, denoiser=Identity, plans=None, folds=1, **options):
        model = replace(model_of(folders.kind, denoiser, folds, **(plans or {})), folder=folders.root / "model")
        for file in map(folders.checkpoint, range(folds)):
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch()
        monkeypatch.setattr(module, "load_model", lambda *_: model)
        values = {"folds": tuple(range(folds)), "device": "cpu", "npp": 0, "nps": 0, "progress": False, **options}
        refiner = StageOneId("DiffRefineTrainer", "nnUNetPlans", "3d_fullres")
        paths = {"images": folders.images, "predictions": folders.predictions, "output": folders.out}
        return module.apply(Request(**{**paths, "dataset": "777", "refiner": refiner, **values}))

    return apply


def files(folder: Path) -> list[str]:
    return sorted(f.relative_to(folder).as_posix() for f in folder.rglob("*") if f.is_file())


RECORDS = ["apply.json", "dataset.json", "plans.json"]
TABLE = ["qc.csv", "qc/.lock", "qc/case.json"]


class TestResults:
    @pytest.mark.parametrize("plans", SPACES.values(), ids=list(SPACES))
    @pytest.mark.parametrize("soft", [True, False], ids=["probabilities", "label maps"])
    @pytest.mark.parametrize("denoiser", [Identity, NeverFlips])
    @KINDS
    def test_a_refiner_that_returns_the_prior_gives_back_the_input(self, tmp_path, run, kind, denoiser, soft, plans):
        """Everywhere, through cropping, transposing and resampling: the same labels, probabilities and header."""
        folders = Folders(tmp_path, kind, (0.9, 1.0, 1.2), border=2)
        labels = folders.add("case", soft=soft)
        (result,) = run(folders, denoiser, plans, region={"everywhere": True}, save_probabilities=True)
        assert result.windows > 1
        assert np.array_equal(read_volume(folders.out / f"case{ENDING}"), labels)
        wanted = folders.probabilities("case") if soft else None
        if wanted is not None:
            assert np.array_equal(folders.probabilities("case", folders.out), wanted)
        paths = folders.images / f"case_0000{ENDING}", folders.out / f"case{ENDING}"
        image, mask = (sitk.ReadImage(str(file)) for file in paths)
        for of in ("GetSpacing", "GetOrigin", "GetDirection", "GetSize"):
            assert getattr(image, of)() == getattr(mask, of)()
        assert files(folders.out) == sorted([*RECORDS, *TABLE, f"case{ENDING}", "case.npz", "case.pkl"])

    @KINDS
    def test_only_the_region_changes(self, tmp_path, run, kind):
        folders = Folders(tmp_path, kind)
        labels = folders.add("case", soft=False)
        (result,) = run(folders, Everywhere, region={"margin": 1})
        found = read_volume(folders.out / f"case{ENDING}")
        band = np.zeros(SHAPE, bool)
        for axis in range(3):
            for a, b in ((slice(1, None), slice(None, -1)), (slice(None, -1), slice(1, None))):
                one, other = [slice(None)] * 3, [slice(None)] * 3
                one[axis], other[axis] = a, b
                band[tuple(one)] |= labels[tuple(one)] != labels[tuple(other)]
        assert (found[band] == 2).all()
        assert 0 < result.changed < result.region < 1
        assert result.changed == pytest.approx((found != labels).mean())

    def test_maps_lie_in_folders_of_their_own(self, tmp_path, run):
        folders = Folders(tmp_path)
        folders.add("case")
        run(folders, Everywhere, folds=2, save_error_map=True, save_uncertainty=True)
        maps = [f"{kind}/case{ENDING}" for kind in ("error_map", "uncertainty")]
        assert files(folders.out) == sorted([*RECORDS, *TABLE, f"case{ENDING}", *maps])
        error = read_volume(folders.out / "error_map" / f"case{ENDING}")
        labels, found = (read_volume(f / f"case{ENDING}") for f in (folders.predictions, folders.out))
        assert error[labels != found].min() > 0.9
        assert 0 <= error.min() <= error.max() <= 1

    def test_the_record_says_what_was_done(self, tmp_path, run):
        folders = Folders(tmp_path)
        folders.add("case")
        run(folders, region={"margin": 2})
        record = json.loads((folders.out / "apply.json").read_text())
        assert record["region"]["margin"] == 2
        assert record["sampling"]["seed"] == 0

    def test_softened_labels_keep_their_sum_and_spread_by_the_stated_sigma(self):
        labels = np.zeros((21, 21, 21), np.uint8)
        labels[10, 10, 10] = 1
        soft = from_labels(labels, [1, 2], (1.0, 0.5, 2.0), 1.5)
        assert soft.sum() == pytest.approx(1, abs=0.01)
        z = (np.arange(21) - 10.0)[:, None, None]
        assert np.sqrt((soft[0] * z**2).sum()) == pytest.approx(1.5, rel=0.05)
        assert from_labels(labels, [1, 2], (1.0, 0.5, 2.0), 0.0).sum() == 1

    def test_processes_of_their_own_give_the_same(self, tmp_path, run):
        folders = Folders(tmp_path)
        for k in range(3):
            folders.add(f"case_{k}", k)
        names = [r.case for r in run(folders, Everywhere, npp=1, nps=1)]
        assert names == folders.cases
        run(folders, Everywhere, output=tmp_path / "here")
        for case in folders.cases:
            name = f"{case}{ENDING}"
            assert (folders.out / name).read_bytes() == (tmp_path / "here" / name).read_bytes()


class TestParts:
    def test_parts_share_the_cases(self, tmp_path, run):
        folders = Folders(tmp_path)
        for k in range(3):
            folders.add(f"case_{k}", k)
        done = [r.case for part in (0, 1) for r in run(folders, num_parts=2, part_id=part)]
        assert sorted(done) == folders.cases
        assert [f for f in files(folders.out) if f.endswith(ENDING)] == [f"{case}{ENDING}" for case in folders.cases]

    def test_continued_only_where_something_is_missing(self, tmp_path, run):
        folders = Folders(tmp_path)
        for k in range(3):
            folders.add(f"case_{k}", k)
        options = {"folds": 2, "save_uncertainty": True, "save_probabilities": True}
        run(folders, **options)
        (folders.out / f"case_0{ENDING}").unlink()
        (folders.out / "uncertainty" / f"case_2{ENDING}").unlink()
        results = run(folders, continue_prediction=True, **options)
        assert [r.case for r in results] == ["case_0", "case_2"]
        assert run(folders, continue_prediction=True, **options) == []


class TestInterruptions:
    def test_a_full_disk_leaves_no_half_file(self, tmp_path, run):
        """A limit of the size of files stands in for the disk."""
        folders = Folders(tmp_path)
        folders.add("case")
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (8000, hard))  # enough for the records
        try:
            with pytest.raises(OSError, match="disk full"):
                run(folders, save_probabilities=True)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert files(folders.out) == RECORDS
        assert len(run(folders, save_probabilities=True, continue_prediction=True)) == 1

    def test_a_writer_that_drops_bytes_is_noticed(self, tmp_path, run, monkeypatch):
        folders = Folders(tmp_path)
        folders.add("case")
        write = case_work._write_labels

        def loses(labels, properties, geometry, file):
            write(labels, properties, geometry, file)
            file.write_bytes(file.read_bytes()[:-30])
            case_work._require_same(geometry.reader.read_seg(str(file))[0][0], labels, file)

        monkeypatch.setattr(case_work, "_write_labels", loses)
        with pytest.raises(OSError, match="could not be written"):
            run(folders)
        assert files(folders.out) == [*RECORDS, "qc/case.json"]

    def test_what_a_killed_process_left_is_removed(self, tmp_path, run):
        folders = Folders(tmp_path)
        folders.add("case")
        (folders.out / ".partial").mkdir(parents=True)
        (folders.out / ".partial" / f"case{ENDING}").write_bytes(b"half")
        run(folders)
        assert not (folders.out / ".partial").exists()


def sagittal(array):
    return np.ascontiguousarray(array.transpose(2, 0, 1))


class TestBadInput:
    """Nothing is refined: no case, and no record, is in the output folder."""

    @pytest.fixture
    def folders(self, tmp_path):
        folders = Folders(tmp_path)
        for k in range(2):
            folders.add(f"case_{k}", k)
        return folders

    @pytest.fixture
    def refused(self, run, folders):
        def check(match, kind=ValueError, **options):
            with pytest.raises(kind, match=match):
                run(folders, **options)
            assert not folders.out.is_dir() or files(folders.out) == []

        return check

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"array": sagittal}, r"shape \(18, 14, 16\) instead of \(16, 18, 14\) voxels, by \(2, -4, 2\)"),
            ({"spacing": (1.0, 1.0, 1.5)}, r"spacing .*1\.5.* mm, by up to 0\.5 mm"),
            ({"origin": (5.0, -7.0, 14.0)}, r"origin .*14.* instead of .*11.* mm, by up to 3 mm"),
            ({"direction": (1.0, 0, 0, 0, 1.0, 0, 0, 0, 1.0)}, r"direction .* by up to 1"),
        ],
        ids=["shape", "spacing", "origin", "direction"],
    )
    def test_prediction_on_another_grid(self, folders, refused, change, message):
        file = folders.predictions / f"case_1{ENDING}"
        array = change.pop("array", lambda x: x)(read_volume(file))
        write_volume(file, array, **change)
        refused(rf"case_1.* does not lie on the grid of .*case_1_0000.*{message}")

    @pytest.mark.parametrize("axes", [2, 4])
    def test_images_that_are_not_3d(self, folders, refused, axes):
        file = folders.images / f"case_1_0000{ENDING}"
        array = read_volume(file)
        write_volume(file, array[0] if axes == 2 else np.stack([array, array]), (1.0,) * axes)
        refused(rf"case_1_0000.* has {axes} axes .*2D and 4D")

    def test_channel_missing(self, folders, refused):
        (folders.images / f"case_1_0000{ENDING}").rename(folders.images / f"case_1_0001{ENDING}")
        refused(r"needs 1 channel\(s\).*case_1 has \[1\]")

    def test_case_in_one_folder_only(self, folders, refused):
        (folders.predictions / f"case_1{ENDING}").unlink()
        refused(r"1 case\(s\) have an image but no prediction .*: case_1")
        (folders.images / f"case_1_0000{ENDING}").unlink()
        (folders.images / f"case_0_0000{ENDING}").rename(folders.images / f"case_7_0000{ENDING}")
        refused(r"have an image but no prediction .*: case_7")

    def test_prediction_without_image(self, folders, refused):
        (folders.images / f"case_0_0000{ENDING}").unlink()
        refused(r"1 prediction\(s\) have no image .*: case_0")

    def test_probabilities_of_some_cases_only(self, folders, refused):
        (folders.predictions / "case_0.npz").unlink()
        refused(r"probabilities \(.npz\) of some cases but not of: case_0")

    def test_label_that_is_not_in_the_dataset(self, folders, refused):
        file = folders.predictions / f"case_1{ENDING}"
        labels = read_volume(file)
        labels[0, 0, 0] = 7
        write_volume(file, labels)
        refused(r"case_1.* holds labels \['7'\].* its labels are \[0, 1, 2\]")

    def test_truncated_label_map(self, folders, refused):
        file = folders.predictions / f"case_1{ENDING}"
        file.write_bytes(file.read_bytes()[:-20])
        refused("case_1.*(truncated|cannot be read)")

    def test_truncated_image(self, folders, refused):
        file = folders.images / f"case_1_0000{ENDING}"
        file.write_bytes(file.read_bytes()[:-20])
        refused("case_1_0000.* truncated")

    @pytest.mark.parametrize("folder", ["images", "predictions"])
    def test_nan_that_would_be_read_as_zero(self, folders, refused, folder):
        name = f"case_1_0000{ENDING}" if folder == "images" else f"case_1{ENDING}"
        array = read_volume(getattr(folders, folder) / name).astype(np.float32)
        array[3, 3, 3] = np.nan
        write_volume(getattr(folders, folder) / name, array)
        refused(f"{name} holds 1 NaN")

    def test_probabilities_of_another_class_count(self, folders, refused):
        folders.replace_probabilities("case_1", folders.probabilities("case_1")[:2])
        refused(r"case_1.npz holds 2 channels; .* has 3 classes")

    def test_probabilities_that_do_not_sum_to_one(self, folders, refused):
        p = folders.probabilities("case_1")
        p[:, 3, 3, 3] = (0.2, 0.2, 0.2)
        folders.replace_probabilities("case_1", p)
        refused(r"case_1.npz: probabilities do not sum to 1.* off by up to 0\.4")

    def test_logits_instead_of_probabilities(self, folders, refused):
        folders.replace_probabilities("case_1", 10 * folders.probabilities("case_1") - 5)
        refused(r"case_1.npz holds values from -5 .*logits")

    def test_nan_in_a_probability(self, folders, refused):
        p = folders.probabilities("case_1")
        p[0, 0, 0, 0] = np.nan
        folders.replace_probabilities("case_1", p)
        refused("case_1.npz holds 1 NaN")

    def test_probabilities_of_another_shape(self, folders, refused):
        folders.replace_probabilities("case_1", folders.probabilities("case_1")[:, 1:])
        refused(r"case_1.npz has shape \(13, 18, 16\), its label map \(14, 18, 16\)")

    def test_an_npz_that_is_none(self, folders, refused):
        (folders.predictions / "case_1.npz").write_bytes(pickle.dumps("code"))
        refused("case_1.npz cannot be read as nnU-Net's probabilities")

    def test_predictions_of_another_dataset(self, folders, refused):
        folders.describe({"background": 0, "liver": 1})
        refused("predictions of another dataset: labels .*liver")
        folders.describe({"background": 0, "edema": 1, "core": 2})

    def test_nan_in_the_image(self, folders, run, monkeypatch):
        """Known only once the image is read; no result of this case is written. (NIfTI files: before.)"""
        read = Geometry.preprocessed

        def with_nan(self, images):
            image, properties = read(self, images)
            image[0, 5, 5, 5] = np.nan if "case_1" in images[0].name else 0
            return image, properties

        monkeypatch.setattr(Geometry, "preprocessed", with_nan)
        with pytest.raises(ValueError, match=r"image of case case_1 .* NaN"):
            run(folders)
        assert not (folders.out / f"case_1{ENDING}").exists()

    def test_output_is_an_input(self, folders, run):
        for flag, folder in (("-i", folders.images), ("-s", folders.predictions)):
            before = files(folder)
            with pytest.raises(ValueError, match=f"-o is the folder of {flag}"):
                run(folders, output=folder / ".." / folder.name)
            assert files(folder) == before

    def test_images_and_predictions_in_one_folder(self, folders, refused):
        refused("-i and -s are the same folder", predictions=folders.images)

    @pytest.mark.parametrize("output", ["/proc/nothing/here", "{root}/file/out"], ids=["read-only", "file"])
    def test_output_that_cannot_be_written(self, folders, refused, output):
        (folders.root / "file").touch()
        refused("Nothing can be written into", output=Path(output.format(root=folders.root)))

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"num_parts": 2, "part_id": 2}, "-part_id is 2 of -num_parts 2"),
            ({"num_parts": 0}, "-num_parts 0"),
            ({"npp": -1}, "-npp is -1"),
            ({"soften": -1.0}, "--soften is -1"),
            ({"region": {"margin": -2}}, "--margin is -2"),
            ({"save_uncertainty": True}, "--save_uncertainty is the spread"),
            ({"images": Path("/nowhere")}, "-i is /nowhere, which is no folder"),
        ],
        ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
    )
    def test_arguments(self, refused, options, message):
        refused(message, **options)

    def test_a_fold_twice(self, folders):
        refiner = StageOneId("DiffRefineTrainer", "nnUNetPlans", "3d_fullres")
        request = Request(folders.images, folders.predictions, folders.out, "777", refiner, (0, 1, 0), device="cpu")
        with pytest.raises(ValueError, match="name every fold once"):
            check_request(request)

    def test_maps_by_a_reader_that_turns_images(self, folders, run, monkeypatch):
        model = model_of("labels")
        model.plans["image_reader_writer"] = "NibabelIOWithReorient"
        monkeypatch.setitem(globals(), "model_of", lambda *_, **__: model)
        with pytest.raises(ValueError, match="Maps cannot be saved .*NibabelIOWithReorient"):
            run(folders, save_error_map=True)
