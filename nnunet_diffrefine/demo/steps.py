"""Run a list of commands one after the other, each logged, shown and done once."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from nnunet_diffrefine.environment import VARIABLE, extended_trainer_path


@dataclass(frozen=True)
class Step:
    """A named piece of work: a command, or a function of this package.

    Attributes:
        name: shown to the user; also the name of the log and of the mark that it is done.
        work: arguments of a command, or a function without arguments.
    """

    name: str
    work: Sequence[str] | Callable[[], object]

    @property
    def file_name(self) -> str:
        """The name as a file name."""
        return re.sub(r"\W+", "_", self.name)


def environment(folder: Path) -> dict[str, str]:
    """nnU-Net's variables for a self-contained working folder, our trainers included."""
    values = {f"nnUNet_{part}": str(folder / f"nnUNet_{part}") for part in ("raw", "preprocessed", "results")}
    few = str(min(2, os.cpu_count() or 1))
    # Passive waiting: threads that spin while another process has the core make a busy machine several times slower.
    defaults = {"nnUNet_def_n_proc": few, "nnUNet_n_proc_DA": few, "OMP_WAIT_POLICY": "PASSIVE"}
    return {**defaults, **os.environ, **values, VARIABLE: extended_trainer_path(os.environ.get(VARIABLE))}


def run_steps(steps: Sequence[Step], folder: Path) -> None:
    """Run what is not yet marked as done in ``folder/steps``; logs lie there too.

    Raises:
        RuntimeError: a command failed; the message ends with the last lines of its log.
    """
    marks = folder / "steps"
    marks.mkdir(parents=True, exist_ok=True)
    with tqdm(steps, unit="step", bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}] {postfix}") as bar:
        for step in bar:
            mark = marks / f"{step.file_name}.done"
            if not mark.exists():
                began = time.time()
                bar.set_postfix_str(step.name)
                _run(step, marks / f"{step.file_name}.log", folder, bar)
                mark.write_text(f"{time.time() - began:.1f} s\n")


def _run(step: Step, log: Path, folder: Path, bar: tqdm) -> None:
    if callable(step.work):
        step.work()
        return
    command = [find_command(step.work[0]), *step.work[1:]]
    with log.open("a") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment(folder))
        try:
            while process.poll() is None:
                time.sleep(0.5)
                bar.set_postfix_str(f"{step.name} {_epoch(log)}")
        except BaseException:
            process.terminate()
            process.wait()
            raise
    if process.returncode:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-25:])
        raise RuntimeError(f"'{' '.join(step.work)}' failed with status {process.returncode}. Log: {log}\n{tail}")


def find_command(name: str) -> str:
    """Path of a console script beside the running Python, or else on PATH.

    Raises:
        RuntimeError: it is in neither.
    """
    beside = shutil.which(name, path=str(Path(sys.executable).parent))
    found = beside or shutil.which(name)
    if found is None:
        raise RuntimeError(
            f"The command {name} is not installed beside {sys.executable}. pip install nnunet-diffrefine"
        )
    return found


def _epoch(log: Path) -> str:
    epochs = re.findall(r"Epoch (\d+)\s*$", log.read_text(errors="replace"), re.MULTILINE)
    return f"(epoch {int(epochs[-1]) + 1})" if epochs else ""
