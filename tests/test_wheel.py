"""What a user gets: the wheel, built from the sdist, installed into an environment of its own."""

import json
import os
import shlex
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
TRAINERS = sorted(file.stem for file in (REPOSITORY / "trainers").glob("*.py"))
PRESETS = sorted(file.name for file in (REPOSITORY / "plans").iterdir() if file.is_file())

# Each trainer twice, in one process, as nnUNetv2_train looks it up.
FIND_ALL = """
import importlib.metadata, json, pickle, sys
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name as find
found = {}
for name in sys.argv[1:]:
    first = find(name)
    assert first is find(name) and pickle.loads(pickle.dumps(first)) is first, name
    found[name] = sys.modules[first.__module__].__file__
print(json.dumps(found))
"""

pytestmark = [pytest.mark.slow, pytest.mark.nnunet]


def _run(*command, **options):
    done = subprocess.run(command, capture_output=True, text=True, **options)
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sdist")
    _run(sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", str(folder), cwd=REPOSITORY)
    return next(folder.glob("*.tar.gz"))


@pytest.fixture(scope="module")
def wheel(sdist):
    pip = (sys.executable, "-m", "pip", "-q", "--disable-pip-version-check")
    _run(*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(sdist.parent), str(sdist), cwd=sdist.parent)
    return next(sdist.parent.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """Folder of a fresh environment outside the checkout: the wheel, and the dependencies of the running Python."""
    folder = tmp_path_factory.mktemp("fresh") / "an environment's folder"
    venv.create(folder, symlinks=os.name != "nt")
    pip = (sys.executable, "-m", "pip", "-q", "--disable-pip-version-check", "--python", str(_python(folder)))
    _run(*pip, "install", "--no-deps", "--no-index", str(wheel), cwd=folder)
    site_packages = Path(_run(_python(folder), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    borrowed = dict.fromkeys(sysconfig.get_path(key) for key in ("purelib", "platlib"))
    (site_packages / "dependencies.pth").write_text("\n".join(borrowed) + "\n")
    return folder


def _scripts(folder):
    return folder / ("Scripts" if os.name == "nt" else "bin")


def _python(folder):
    return _scripts(folder) / "python"


def _clean_environment(folder):
    """As a user's shell has it: nothing points to the checkout, and scripts are those of the new environment."""
    folders = {"nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results", "nnUNet_extTrainer"}
    dropped = {"PYTHONPATH", "VIRTUAL_ENV"} | folders
    kept = {name: value for name, value in os.environ.items() if name not in dropped}
    return {**kept, "PATH": f"{_scripts(folder)}{os.pathsep}{kept['PATH']}", "SHELL": "/bin/sh"}


def test_the_wheel_holds_the_package_with_its_trainers_and_presets(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    assert "nnunet_diffrefine/py.typed" in names
    shims = {f"nnunet_diffrefine/trainers/{name}.py" for name in TRAINERS}
    assert "nnunet_diffrefine/trainers/DiffRefineTrainer.py" in shims
    assert {n for n in names if n.startswith("nnunet_diffrefine/trainers/")} == shims
    presets = {f"nnunet_diffrefine/plans/{name}" for name in PRESETS}
    assert any(name.endswith(".json") for name in presets)
    assert presets <= names
    modules = {p.relative_to(REPOSITORY).as_posix() for p in (REPOSITORY / "nnunet_diffrefine").rglob("*.py")}
    assert {n for n in names if n.endswith(".py")} == modules | shims


def test_the_wheel_holds_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {
        "nnunet_diffrefine",
        next(n for n in names if "METADATA" in n)[:-9],
    }
    assert [n for n in names if "__pycache__" in n or n.endswith(".pyc") or "/test" in n] == []


def test_the_metadata_state_version_licence_and_the_range_of_nnunet(wheel):
    from nnunet_diffrefine import __version__

    archive = zipfile.ZipFile(wheel)
    lines = archive.read(next(n for n in archive.namelist() if n.endswith("/METADATA"))).decode().splitlines()
    assert f"Version: {__version__}" in lines
    assert "License-Expression: Apache-2.0" in lines
    assert any(line.startswith("Requires-Dist: nnunetv2") and ">=2.8.1" in line and "<2.9" in line for line in lines)
    assert any(n.endswith("licenses/LICENSE") for n in archive.namelist())


def test_the_package_under_test_is_the_installed_one(installed):
    code = "import nnunet_diffrefine, nnunetv2; print(nnunet_diffrefine.__file__)"
    file = Path(_run(_python(installed), "-c", code, cwd=installed, env=_clean_environment(installed)).strip())
    assert installed.resolve() in file.resolve().parents
    assert REPOSITORY not in file.resolve().parents


@pytest.mark.skipif(os.name == "nt", reason="needs a POSIX shell")
def test_after_the_env_line_nnunet_finds_every_trainer_in_the_wheel(installed):
    look_up = shlex.join([str(_python(installed)), "-c", FIND_ALL, *TRAINERS])
    script = f'eval "$(nnUNetv2_diffrefine env)" && exec {look_up}'
    out = _run("/bin/sh", "-c", script, cwd=installed, env=_clean_environment(installed))
    found = json.loads(out.splitlines()[-1])
    assert sorted(found) == TRAINERS
    assert all(installed.resolve() in Path(file).resolve().parents for file in found.values())


def test_a_training_runs_from_the_wheel(installed, region_run):
    """With nnU-Net's own entry point; only the shortened trainer comes from the tests."""
    listed = _run(_python(installed), "-m", "nnunet_diffrefine.cli", "env", env=_clean_environment(installed))
    folders = f"{shlex.split(listed)[1].split('=', 1)[1]}{os.pathsep}{REPOSITORY / 'tests' / 'trainers'}"
    environment = {**region_run.env(), **_clean_environment(installed), "nnUNet_extTrainer": folders}
    environment.pop("PYTHONPATH", None)
    entry = "from nnunetv2.run.run_training import run_training_entry; run_training_entry()"
    _, *arguments = region_run.train(1, "DiffRefineTrainer_tiny_long")
    _run(_python(installed), "-c", entry, *arguments, cwd=installed, env=environment)
    fold = region_run.model("DiffRefineTrainer_tiny_long") / "fold_1"
    assert (fold / "validation" / "summary.json").is_file()
