"""``nnUNetv2_diffrefine doctor`` tells a sound installation from the ways in which real ones are broken."""

import argparse
import errno
import json
import os
import re
import sys
import sysconfig
from importlib import metadata
from pathlib import Path

import pytest

from nnunet_diffrefine import doctor
from nnunet_diffrefine.doctor import Result
from nnunet_diffrefine.environment import VARIABLE
from nnunet_diffrefine.paths import resource_folder

REPOSITORY = Path(__file__).resolve().parents[1]
OURS = str(resource_folder("trainers"))
TRAINER_CODE = """
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
class UnloadedTrainer(nnUNetTrainer):
    pass
"""


@pytest.fixture
def versions(monkeypatch):
    """Installed versions that a test makes up; None means not installed."""
    made_up = {}

    def version(distribution):
        if made_up[distribution] is None:
            raise metadata.PackageNotFoundError(distribution)
        return made_up[distribution]

    monkeypatch.setattr(doctor.metadata, "version", version)
    return made_up


@pytest.mark.parametrize(
    ("version", "status"),
    [("2.8.1", "ok"), ("2.8.10", "ok"), ("2.8.0", "fail"), ("2.9", "fail"), ("2.10.1", "fail"), (None, "fail")],
)
def test_nnunet_must_be_in_the_range_of_pyproject(versions, version, status):
    versions["nnunetv2"] = version
    result = doctor.check_nnunet()
    assert result.status == status
    assert (status == "ok") == (result.mend == "")
    requirement = re.search(r'"(nnunetv2[^"]*)"', (REPOSITORY / "pyproject.toml").read_text())[1]
    assert status == "ok" or requirement in result.mend


@pytest.mark.parametrize(
    ("version", "status"),
    [("2.8.0", "ok"), ("2.9.0", "fail"), ("2.9.1+cu130", "fail"), ("2.10.0", "ok"), ("2.15.0", "ok"), (None, "fail")],
)
def test_torch_2_9_is_refused(versions, version, status):
    versions["torch"] = version
    assert doctor.check_torch().status == status


def test_the_running_python_is_named():
    assert (doctor.check_python().status, sys.executable in doctor.check_python().found) == ("ok", True)


@pytest.mark.parametrize(
    ("torch", "torchvision", "status"),
    [
        ("2.15.0+cu132", "0.29.2+cu132", "ok"),
        ("2.15.0", "0.29.2", "ok"),
        ("2.15.0+cpu", "0.29.2+cu132", "warn"),
        ("2.15.0+cpu", "0.29.2", "warn"),
    ],
)
def test_builds_of_different_indices_are_noticed(monkeypatch, torch, torchvision, status):
    monkeypatch.setattr(doctor, "_probe", lambda code: {"torch": torch, "torchvision": torchvision, "timm": "1"})
    assert doctor.check_torchvision().status == status


@pytest.fixture
def broken_torchvision(tmp_path, monkeypatch):
    """The torchvision of another index: its import raises what a CUDA build beside CPU torch raises."""
    package = tmp_path / "broken" / "torchvision"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')\n")
    monkeypatch.setenv("PYTHONPATH", str(package.parent))


def test_a_torchvision_that_cannot_be_imported_fails(broken_torchvision):
    result = doctor.check_torchvision()
    assert result.status == "fail"
    assert "operator torchvision::nms does not exist" in result.found
    assert "same index" in result.mend


@pytest.mark.slow
@pytest.mark.nnunet
def test_a_broken_torchvision_hides_the_trainer_and_is_named_as_the_cause(broken_torchvision, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([os.environ["PYTHONPATH"], str(REPOSITORY)]))
    result = doctor.check_trainer_look_up()
    assert result.status == "fail"
    assert "torchvision" in result.found
    assert "same index" in result.mend


def test_the_trainer_path_is_sound_with_our_folder_alone_or_among_others(monkeypatch, tmp_path):
    for value in (OURS, f"{OURS}/", os.pathsep.join([str(tmp_path), "", OURS])):
        monkeypatch.setenv(VARIABLE, value)
        assert doctor.check_trainer_path().status == "ok"


def test_a_trainer_path_without_our_folder_fails_and_says_how_to_set_it(monkeypatch, tmp_path):
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    assert doctor.check_trainer_path().status == "fail"
    monkeypatch.delenv(VARIABLE)
    result = doctor.check_trainer_path()
    assert result.status == "fail"
    assert 'eval "$(nnUNetv2_diffrefine env)"' in result.mend


@pytest.mark.parametrize(
    "folder",
    [
        doctor.PACKAGE.parent,
        doctor.PACKAGE.parent.parent,
        doctor.PACKAGE,
        doctor.PACKAGE / "training",
        Path(sysconfig.get_path("purelib")),
    ],
    ids=["package root", "above it", "package", "sub-package", "site-packages"],
)
def test_folders_whose_classes_nnunet_would_unload_fail(monkeypatch, folder):
    monkeypatch.setenv(VARIABLE, os.pathsep.join([OURS, str(folder)]))
    result = doctor.check_trainer_path()
    assert result.status == "fail"
    assert str(folder) in result.found


def test_a_listed_folder_that_does_not_exist_is_worth_a_warning(monkeypatch, tmp_path):
    monkeypatch.setenv(VARIABLE, os.pathsep.join([OURS, str(tmp_path / "gone")]))
    result = doctor.check_trainer_path()
    assert result.status == "warn"
    assert "gone" in result.found


@pytest.mark.slow
@pytest.mark.nnunet
def test_a_trainer_that_nnunet_unloads_fails(tmp_path, monkeypatch):
    """A package with a trainer, and the variable naming the folder above it."""
    package = tmp_path / "some_package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "impl.py").write_text(TRAINER_CODE)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(REPOSITORY)]))
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    monkeypatch.setattr(doctor, "TRAINER", "UnloadedTrainer")
    result = doctor.check_trainer_look_up()
    assert result.status == "fail"
    assert "cannot be pickled" in result.found


def test_a_trainer_of_another_copy_of_the_package_fails(monkeypatch, tmp_path):
    seen = {"same": True, "pickles": True, "module": "nnunet_diffrefine.training.trainer"}
    file = tmp_path / "nnunet_diffrefine" / "training" / "trainer.py"
    monkeypatch.setattr(doctor, "_probe", lambda *_, environment: {**seen, "file": str(file)})
    result = doctor.check_trainer_look_up()
    assert result.status == "fail"
    assert str(file) in result.found
    assert "Two copies" in result.mend


@pytest.mark.parametrize(
    ("error", "mend"),
    [
        ("ModuleNotFoundError: No module named 'nnunet_diffrefine'", f"{sys.executable} -m pip install"),
        ("ModuleNotFoundError: No module named 'torchvision'", "same index"),
        ("ImportError: cannot import name 'x' from 'somebody'", "without them"),
    ],
)
def test_a_look_up_that_fails_is_mended_by_its_cause(monkeypatch, error, mend):
    def fail(*_, environment):
        raise RuntimeError(error)

    monkeypatch.setattr(doctor, "_probe", fail)
    result = doctor.check_trainer_look_up()
    assert result.status == "fail"
    assert error in result.found
    assert mend in result.mend


@pytest.mark.slow
@pytest.mark.nnunet
def test_nnunet_finds_the_shipped_trainer(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    monkeypatch.delenv(VARIABLE, raising=False)
    assert doctor.check_trainer_look_up() == Result(
        "nnU-Net finds DiffRefineTrainer", "ok", "nnunet_diffrefine.training.trainer.DiffRefineTrainer"
    )


def test_probes_do_not_see_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "only_here.py").write_text("")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RuntimeError, match="No module named 'only_here'"):
        doctor._probe("import only_here")


def test_a_probe_that_hangs_or_dies_is_an_error(monkeypatch):
    monkeypatch.setattr(doctor, "PROBE_SECONDS", 0.2)
    with pytest.raises(RuntimeError, match=r"No answer within 0\.2 s"):
        doctor._probe("import time; time.sleep(60)")
    monkeypatch.undo()
    with pytest.raises(RuntimeError, match="exit code 3"):
        doctor._probe("import os; os._exit(3)")


def test_a_folder_that_is_unset_or_missing_fails(monkeypatch, tmp_path):
    monkeypatch.delenv("nnUNet_results", raising=False)
    unset = doctor.check_folder("nnUNet_results", "models")
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "gone"))
    missing = doctor.check_folder("nnUNet_results", "models")
    assert unset.status == missing.status == "fail"
    assert "export nnUNet_results=" in unset.mend
    assert "mkdir" in missing.mend


def test_only_folders_that_are_written_must_be_writable(monkeypatch, tmp_path):
    def refuse(dir):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setenv("nnUNet_raw", str(tmp_path))
    monkeypatch.setattr(doctor.tempfile, "TemporaryFile", refuse)
    result = doctor.check_folder("nnUNet_raw", "images")
    assert result.status == "fail"
    assert "Read-only file system" in result.found
    assert doctor.check_folder("nnUNet_raw", "images", write=False).status == "ok"


def test_checking_a_folder_leaves_nothing_in_it(monkeypatch, tmp_path):
    monkeypatch.setenv("nnUNet_results", str(tmp_path))
    assert doctor.check_folder("nnUNet_results", "models").status == "ok"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("seen", "status", "words"),
    [
        ({"cuda": ["H200, 139 GiB"], "mps": False, "bf16": True}, "ok", "cuda: H200"),
        ({"cuda": [], "mps": True, "bf16": None}, "warn", "mps"),
        ({"cuda": [], "mps": False, "bf16": False}, "warn", "without bfloat16"),
    ],
)
def test_the_device_is_named(monkeypatch, seen, status, words):
    monkeypatch.setattr(doctor, "_probe", lambda code: seen)
    result = doctor.check_device()
    assert result.status == status
    assert words in result.found


def test_the_device_probe_agrees_with_torch():
    import torch

    assert doctor.check_device().found.startswith("cuda" if torch.cuda.is_available() else ("cpu", "mps"))


def test_a_check_that_breaks_is_a_failed_one_and_the_others_still_run():
    def check_broken():
        raise RuntimeError("cannot tell")

    fine = Result("fine", "ok", "all")
    broken, after = doctor.examine([check_broken, lambda: fine])
    assert (broken.name, broken.status, broken.found) == ("broken", "fail", "cannot tell")
    assert after is fine


def _doctor(monkeypatch, *results, options=()):
    monkeypatch.setattr(doctor, "CHECKS", [lambda r=r: r for r in results])
    parser = argparse.ArgumentParser()
    doctor.register(parser.add_subparsers())
    return (args := parser.parse_args(["doctor", *options])).func(args)


@pytest.mark.parametrize(("status", "code"), [("ok", 0), ("warn", 0), ("fail", 1)])
def test_the_exit_code_tells_failure_from_warning(monkeypatch, capsys, status, code):
    result = Result("thing", status, "what is there", "what to do")
    assert _doctor(monkeypatch, Result("other", "ok", "fine"), result) == code
    out = capsys.readouterr().out
    assert "what is there" in out
    assert "-> what to do" in out


def test_json_is_one_object_with_every_check(monkeypatch, capsys):
    result = Result("thing", "fail", "what is there", "what to do")
    assert _doctor(monkeypatch, result, options=["--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["checks"] == [{"name": "thing", "status": "fail", "found": "what is there", "mend": "what to do"}]
