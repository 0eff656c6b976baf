"""One output folder for one run: what another run, another part or a killed process left there."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from filelock import FileLock
from nnunetv2.imageio.tif_reader_writer import Tiff3DIO

from nnunet_diffrefine.image_files import read_header
from nnunet_diffrefine.inference import apply as module
from nnunet_diffrefine.inference.files import LOCK, OutputFolder
from tests.inference.small import ENDING, Folders
from tests.inference.test_apply_command import run  # noqa: F401 (a fixture)


@pytest.fixture
def folders(tmp_path):
    folders = Folders(tmp_path)
    for k in range(2):
        folders.add(f"case_{k}", k)
    return folders


def contents(folder) -> dict[str, bytes]:
    return {f.relative_to(folder).as_posix(): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


class TestAnotherRun:
    OTHERS = {
        "region": {"region": {"margin": 7}},
        "soften": {"soften": 1.0},
        "folds": {"folds": 2},
        "part": {"region": {"margin": 7}, "num_parts": 2, "part_id": 1},
    }

    @pytest.mark.parametrize("flag", [True, False], ids=["continued", "begun anew"])
    @pytest.mark.parametrize("other", OTHERS.values(), ids=list(OTHERS))
    def test_other_settings_are_refused_and_nothing_is_touched(self, folders, run, other, flag):  # noqa: F811
        run(folders)
        before = contents(folders.out)
        message = r"out \(-o\) was begun with other settings: \w+ was .*, is now .* Use the same, or another -o"
        with pytest.raises(ValueError, match=message):
            run(folders, continue_prediction=flag, **other)
        assert contents(folders.out) == before

    def test_the_message_shows_both_settings(self, folders, run):  # noqa: F811
        run(folders)
        with pytest.raises(ValueError, match=r"settings: region was .*'margin': 4.*, is now .*'margin': 7"):
            run(folders, region={"margin": 7})

    def test_other_images_are_another_run(self, folders, run):  # noqa: F811
        run(folders)
        moved = folders.images.rename(folders.root / "others")
        with pytest.raises(ValueError, match=r"settings: images was \S+/images, is now \S+/others"):
            run(folders, images=moved, continue_prediction=True)

    @pytest.mark.parametrize("flag", [True, False], ids=["continued", "begun anew"])
    def test_weights_trained_again_under_the_same_name_are_another_run(self, folders, run, flag):  # noqa: F811
        run(folders, folds=2)
        (folders.out / f"case_1{ENDING}").unlink()
        before = contents(folders.out)
        folders.checkpoint(1).write_bytes(b"trained again")
        with pytest.raises(ValueError, match=r"other settings: checkpoint_sha256 was \{'0': .*, is now \{'0': .*'1': "):
            run(folders, folds=2, continue_prediction=flag)
        assert contents(folders.out) == before

    def test_a_record_without_the_weights_is_continued(self, folders, run):  # noqa: F811
        run(folders)
        (folders.out / f"case_1{ENDING}").unlink()
        record = json.loads((folders.out / "apply.json").read_text())
        del record["checkpoint_sha256"]
        (folders.out / "apply.json").write_text(json.dumps(record))
        assert [r.case for r in run(folders, continue_prediction=True)] == ["case_1"]

    def test_the_same_settings_may_be_run_again(self, folders, run):  # noqa: F811
        run(folders)
        before = contents(folders.out)
        assert [r.case for r in run(folders)] == folders.cases
        assert contents(folders.out) == before

    @pytest.mark.parametrize("flag", [True, False], ids=["continued", "begun anew"])
    def test_masks_of_which_no_record_tells(self, folders, run, flag):  # noqa: F811
        run(folders)
        (folders.out / "apply.json").unlink()
        before = contents(folders.out)
        with pytest.raises(ValueError, match=rf"holds 2 label map\(s\) but no apply.json.*: case_0{ENDING}, case_1"):
            run(folders, continue_prediction=flag)
        assert contents(folders.out) == before

    def test_a_damaged_record(self, folders, run):  # noqa: F811
        run(folders)
        (folders.out / "apply.json").write_text("{")
        with pytest.raises(ValueError, match=r"apply.json is damaged .*Choose another -o"):
            run(folders)

    def test_a_part_of_another_run_that_begins_during_the_checks(self, folders, run, monkeypatch):  # noqa: F811
        inner = module.check_content

        def slow(case, geometry):
            folders.out.mkdir(exist_ok=True)
            (folders.out / "apply.json").write_text(json.dumps({"soften": 3.0}))
            inner(case, geometry)

        monkeypatch.setattr(module, "check_content", slow)
        with pytest.raises(ValueError, match=r"soften was 3.0, is now 0.0"):
            run(folders)
        assert list(contents(folders.out)) == ["apply.json"]


class TestTiff:
    def test_the_spacing_comes_along(self, tmp_path):
        """In nnU-Net's JSON file beside the label map; that of ``qc`` with the same name stays."""
        out, labels = OutputFolder(tmp_path / "out"), np.arange(210, dtype=np.uint8).reshape(5, 6, 7)
        spacing = (3.0, 1.0, 0.5)  # z, y, x
        with out.begun():
            out.write("qc/case.json", lambda file: file.write_text("{}"))
            out.write("case.tif", lambda file: Tiff3DIO().write_seg(labels, str(file), {"spacing": spacing}))
        found = contents(out.folder)
        assert sorted(found) == ["case.json", "case.tif", "qc/case.json"]
        assert found["qc/case.json"] == b"{}"
        assert np.array_equal(Tiff3DIO().read_seg(str(out.folder / "case.tif"))[0][0], labels)
        assert read_header(out.folder / "case.tif").spacing == spacing[::-1]


class TestParts:
    def test_a_part_that_has_no_cases_says_so(self, folders, run, capsys):  # noqa: F811
        run(folders)
        assert run(folders, num_parts=3, part_id=2) == []
        assert "there are 2 case(s) for 3 parts, and none for -part_id 2" in capsys.readouterr().out

    def test_a_part_whose_cases_are_complete_says_so(self, folders, run, capsys):  # noqa: F811
        run(folders)
        assert run(folders, num_parts=2, part_id=1, continue_prediction=True) == []
        assert "every case of -part_id 1 is complete in" in capsys.readouterr().out
        assert run(folders, continue_prediction=True) == []
        assert "every case is complete in" in capsys.readouterr().out

    def test_the_same_part_twice_at_once_is_refused(self, tmp_path):
        with OutputFolder(tmp_path, "_1").begun():
            with OutputFolder(tmp_path, "_2").begun():
                pass
            with pytest.raises(ValueError, match=r"same part \(-part_id\). Wait for it; if there is none, delete .*_1"):
                with OutputFolder(tmp_path, "_1").begun():
                    pass
            OutputFolder(tmp_path, "_1").write("file", lambda file: file.write_text("whole"))
        assert list(contents(tmp_path)) == ["file"]


HOLDS = """
import sys, time
from pathlib import Path
from nnunet_diffrefine.inference.files import OutputFolder
with OutputFolder(Path(sys.argv[1]), "_1").begun():
    print("begun", flush=True)
    time.sleep(600)
"""


class TestLeftByKilledProcesses:
    def test_a_part_begins_again_after_kill_9_and_not_before(self, tmp_path):
        process = subprocess.Popen([sys.executable, "-c", HOLDS, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        assert process.stdout.readline() == "begun\n"
        (tmp_path / ".partial_1" / "half").touch()
        OutputFolder(tmp_path, "_2").clear_up()
        with pytest.raises(ValueError, match="Another process writes into"):
            with OutputFolder(tmp_path, "_1").begun():
                pass
        assert (tmp_path / ".partial_1" / "half").exists()
        process.kill()
        process.communicate()
        with OutputFolder(tmp_path, "_1").begun():
            assert [file.name for file in (tmp_path / ".partial_1").iterdir()] == [LOCK]
        assert list(tmp_path.iterdir()) == []

    @pytest.fixture
    def left(self, folders):
        """A folder of part 7, with half a file."""
        left = folders.out / ".partial_7"
        left.mkdir(parents=True)
        (left / f"case_0{ENDING}").write_bytes(b"half")
        (left / LOCK).touch()
        return left

    def test_gone_when_every_case_is_complete(self, folders, run, left):  # noqa: F811
        run(folders, num_parts=2, part_id=0)
        assert left.exists()
        run(folders, num_parts=2, part_id=1, continue_prediction=True)
        assert not left.exists()
        assert not [f for f in folders.out.iterdir() if f.name.startswith(".partial")]

    def test_gone_when_there_is_nothing_left_to_do(self, folders, run, left):  # noqa: F811
        run(folders)
        left.mkdir(exist_ok=True)
        run(folders, continue_prediction=True)
        assert not left.exists()

    def test_what_a_running_part_is_writing_stays(self, folders, run, left):  # noqa: F811
        with FileLock(left / LOCK):
            run(folders)
            assert (left / f"case_0{ENDING}").read_bytes() == b"half"
        run(folders, continue_prediction=True)
        assert not left.exists()
