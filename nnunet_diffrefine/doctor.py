"""``nnUNetv2_diffrefine doctor``: is everything there that training and prediction need, and if not, what to do.

Each check is a function without arguments that returns a :class:`Result`. What has to be tried with real imports is
tried in a fresh interpreter without the current folder on its path, because that is what ``nnUNetv2_train`` is.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from nnunet_diffrefine import __version__
from nnunet_diffrefine.environment import VARIABLE, entries, extended_trainer_path, normalised
from nnunet_diffrefine.paths import resource_folder

TRAINER = "DiffRefineTrainer"
PACKAGE = Path(__file__).parent
PYTHON_FROM, NNUNET_FROM, NNUNET_BELOW = (3, 10), (2, 8, 1), (2, 9)  # as in pyproject.toml
PROBE_SECONDS = 300
NAME_WIDTH = len(f"nnU-Net finds {TRAINER}")

_LIBRARIES = """
import torch, torchvision, timm
report = {m.__name__: m.__version__ for m in (torch, torchvision, timm)}
"""

# Pickling goes by module and name, so it fails for the classes of modules that nnU-Net has unloaded after its search.
_LOOK_UP = """
import pickle
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name as find
first, second = find(sys.argv[1]), find(sys.argv[1])
module = sys.modules.get(first.__module__)
try:
    pickles = pickle.loads(pickle.dumps(first)) is first
except pickle.PicklingError:
    pickles = False
report = {"same": first is second, "pickles": pickles, "module": first.__module__}
report["file"] = getattr(module, "__file__", None)
"""

_DEVICE = """
import torch
count = torch.cuda.device_count() if torch.cuda.is_available() else 0
cuda = [torch.cuda.get_device_properties(i) for i in range(count)]
features = getattr(torch.cpu, "get_capabilities", dict)()
report = {
    "cuda": [f"{device.name}, {device.total_memory / 2**30:.0f} GiB" for device in cuda],
    "mps": torch.backends.mps.is_available(),
    "bf16": any(bool(on) for name, on in features.items() if "bf16" in name) if features else None,
}
"""

_SAME_INDEX = (
    "Install torch and torchvision from the same index, for a CPU: pip install --force-reinstall torch torchvision "
    "--index-url https://download.pytorch.org/whl/cpu; for CUDA the line that https://pytorch.org shows."
)
_SET_PATH = 'Run: eval "$(nnUNetv2_diffrefine env)"   (other shells than bash: nnUNetv2_diffrefine env --help)'


@dataclass(frozen=True)
class Result:
    """Outcome of a check.

    Attributes:
        name: what was checked.
        status: ``ok``, ``warn`` (works, but read it) or ``fail`` (training or prediction will not work).
        found: what was found.
        mend: what to do about it; empty if nothing.
    """

    name: str
    status: Literal["ok", "warn", "fail"]
    found: str
    mend: str = ""


def _probe(code: str, *arguments: str, environment: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Run ``code`` in a fresh interpreter and return the ``report`` it binds; RuntimeError if it cannot."""
    script = f"import json, sys\nsys.path[:] = [p for p in sys.path if p]\n{code}\nprint(json.dumps(report))"
    command = [sys.executable, "-c", script, *arguments]
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, errors="replace", timeout=PROBE_SECONDS
        )
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"No answer within {PROBE_SECONDS} s.") from None
    if done.returncode:
        errors = re.findall(r"(?m)^[\w.]*(?:Error|Exception)\b.*", done.stderr)
        raise RuntimeError(errors[-1] if errors else f"Python ended with exit code {done.returncode}.")
    return json.loads(done.stdout.splitlines()[-1])


def _installed(distribution: str) -> tuple[str, tuple[int, ...]]:
    """The version of an installed distribution, as text and as up to three numbers."""
    try:
        version = metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "not installed", ()
    return version, tuple(int(part) for part in re.findall(r"\d+", version)[:3])


def check_python() -> Result:
    """Python 3.10 or newer."""
    found = f"{platform.python_version()} ({sys.executable})"
    if sys.version_info[:2] >= PYTHON_FROM:
        return Result("Python", "ok", found)
    return Result("Python", "fail", found, "Install nnunet-diffrefine in an environment with Python 3.10 or newer.")


def check_nnunet() -> Result:
    """An nnU-Net version whose extension points are the ones this package uses."""
    version, numbers = _installed("nnunetv2")
    if NNUNET_FROM <= numbers < NNUNET_BELOW:
        return Result("nnU-Net", "ok", version)
    return Result("nnU-Net", "fail", version, 'pip install "nnunetv2>=2.8.1,<2.9"')


def check_torch() -> Result:
    """Not PyTorch 2.9, which nnU-Net excludes: its 3D convolutions in mixed precision are about four times slower."""
    version, numbers = _installed("torch")
    if numbers and numbers[:2] != (2, 9):
        return Result("PyTorch", "ok", version)
    return Result("PyTorch", "fail", version, f"nnU-Net needs PyTorch, but not 2.9. {_SAME_INDEX}")


def check_torchvision() -> Result:
    """Torch and torchvision fit: if not, importing nnU-Net's trainers fails and it finds no external one at all."""
    name = "torch and torchvision"
    try:
        versions = _probe(_LIBRARIES)
    except RuntimeError as error:
        return Result(name, "fail", f"{error} nnU-Net finds no external trainer then.", _SAME_INDEX)
    found = ", ".join(f"{library} {version}" for library, version in versions.items())
    if versions["torch"].partition("+")[2] != versions["torchvision"].partition("+")[2]:
        return Result(name, "warn", f"{found}: builds of different indices", _SAME_INDEX)
    return Result(name, "ok", found)


def _unloads_package(folder: str) -> bool:
    """Whether nnU-Net, searching ``folder``, would import parts of this package and unload them afterwards."""
    here, package = Path(normalised(folder)), Path(normalised(PACKAGE))
    site_packages = {Path(normalised(sysconfig.get_path(key))) for key in ("purelib", "platlib")}
    inside = package in here.parents and str(here) != normalised(resource_folder("trainers"))
    return here in {package, *package.parents} | site_packages or inside


def check_trainer_path() -> Result:
    """``nnUNet_extTrainer`` lists the trainers folder, and nothing that breaks its classes."""
    listed = entries(os.environ.get(VARIABLE))
    for entry in filter(_unloads_package, listed):
        found = f"lists {entry}, so nnU-Net unloads the classes it finds: they cannot be pickled or recognised again"
        return Result(VARIABLE, "fail", found, f"Take that folder out of the variable. {_SET_PATH}")
    if normalised(resource_folder("trainers")) not in map(normalised, listed):
        found = f"does not list {resource_folder('trainers')}" if listed else "not set"
        return Result(VARIABLE, "fail", found, _SET_PATH)
    missing = [entry for entry in listed if not os.path.isdir(entry)]
    if missing:
        return Result(
            VARIABLE, "warn", f"lists folders that do not exist: {', '.join(missing)}", "Take them out of it."
        )
    return Result(VARIABLE, "ok", os.pathsep.join(listed))


def check_trainer_look_up() -> Result:
    """nnU-Net finds the trainer, twice the same picklable class, and it is this package's."""
    name = f"nnU-Net finds {TRAINER}"
    path = extended_trainer_path(os.environ.get(VARIABLE))
    try:
        seen = _probe(_LOOK_UP, TRAINER, environment={**os.environ, VARIABLE: path})
    except RuntimeError as error:
        return Result(name, "fail", f"{error} (searched: {path})", _look_up_mend(str(error)))
    if not (seen["same"] and seen["pickles"]):
        found = f"class of module {seen['module']}, which nnU-Net unloads: it cannot be pickled or recognised again"
        mend = f"{VARIABLE} must list no folder that defines trainers of that name, only {resource_folder('trainers')}."
        return Result(name, "fail", found, mend)
    if normalised(PACKAGE) not in map(normalised, Path(seen["file"]).parents):
        mend = "Two copies are installed: uninstall one, or take its folder out of PYTHONPATH."
        return Result(name, "fail", f"found in {seen['file']}, but this is {PACKAGE}", mend)
    return Result(name, "ok", f"{seen['module']}.{TRAINER}")


def _look_up_mend(error: str) -> str:
    if re.search("torchvision|timm", error):
        return _SAME_INDEX
    if "No module named 'nnunet_diffrefine" in error:
        return f"Install the package where nnU-Net is installed: {sys.executable} -m pip install nnunet-diffrefine"
    return f"Reinstall nnunet-diffrefine; if {VARIABLE} lists other folders, see whether it works without them."


def check_folder(variable: str, purpose: str, write: bool = True) -> Result:
    """The folder that an environment variable names exists and can be read, and written where nnU-Net writes."""
    value = os.environ.get(variable)
    if not value:
        return Result(variable, "fail", f"not set ({purpose})", f"export {variable}=/a/folder/of/yours")
    if not os.path.isdir(value):
        return Result(variable, "fail", f"{value} is no folder", f'mkdir -p "{value}", or correct the variable.')
    try:
        os.listdir(value)
        if write:
            # Trying is the only test that holds for network drives, access lists and read-only mounts alike.
            tempfile.TemporaryFile(dir=value).close()
    except OSError as error:
        wanted = "read and written" if write else "read"
        return Result(variable, "fail", f"{value}: {error.strerror}", f"It must be a folder that can be {wanted}.")
    return Result(variable, "ok", value)


def check_device() -> Result:
    """What to train on."""
    seen = _probe(_DEVICE)
    if seen["cuda"]:
        return Result("device", "ok", "cuda: " + "; ".join(seen["cuda"]))
    bf16 = {True: "with bfloat16", False: "without bfloat16", None: "bfloat16 unknown"}[seen["bf16"]]
    name = "mps" if seen["mps"] else "cpu"
    found = f"{name}; CPU: {os.cpu_count()} cores, {bf16}"
    return Result(
        "device", "warn", found, f"No CUDA device: training is slow. Pass -device {name} to nnU-Net's commands."
    )


CHECKS: tuple[Callable[[], Result], ...] = (
    check_python,
    check_nnunet,
    check_torch,
    check_torchvision,
    check_trainer_path,
    check_trainer_look_up,
    partial(check_folder, "nnUNet_raw", "images and reference segmentations", write=False),
    partial(check_folder, "nnUNet_preprocessed", "what nnU-Net trains on, and the out-of-fold exports"),
    partial(check_folder, "nnUNet_results", "trained models"),
    check_device,
)


def examine(checks: Sequence[Callable[[], Result]]) -> Iterator[Result]:
    """Run the checks in order, yielding each result as it is there; a check that cannot finish is a failed one."""
    for number, check in enumerate(checks, 1):
        _progress(f"check {number} of {len(checks)}, some take 10 s ...")
        try:
            result = check()
        except (RuntimeError, OSError) as error:
            name = getattr(check, "__name__", "check").removeprefix("check_")
            result = Result(name, "fail", str(error), "Mend what failed above, then run doctor again.")
        _progress("")
        yield result


def _progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


def row(result: Result) -> str:
    """The result as a line of the table, what to do below it."""
    line = f"[{result.status:^4}] {result.name:<{NAME_WIDTH}}  {result.found}"
    return f"{line}\n{'':<{NAME_WIDTH + 7}}  -> {result.mend}" if result.mend else line


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the ``doctor`` command."""
    parser = subparsers.add_parser(
        "doctor",
        help="check the installation, and say how to mend what is wrong",
        description="Check what training and prediction need: versions, whether torch and torchvision fit, whether "
        "nnU-Net finds the trainer, nnU-Net's folders, the device. Takes about half a minute, because imports and "
        "look-ups are tried in fresh interpreters. Changes nothing. The exit code is 1 if a check fails.",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Run all checks and print them; returns 1 if any failed, else 0."""
    results = []
    if not args.json:
        print(f"nnunet-diffrefine {__version__} in {PACKAGE}", flush=True)
    for result in examine(CHECKS):
        results.append(result)
        if not args.json:
            print(row(result), flush=True)
    failed = sum(result.status == "fail" for result in results)
    if args.json:
        print(json.dumps({"version": __version__, "checks": [asdict(result) for result in results]}, indent=2))
    else:
        print(f"{len(results)} checks, {failed} failed.")
    return int(failed > 0)
