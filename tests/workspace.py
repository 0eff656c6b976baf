"""A working folder with nnU-Net's three folders, in which tests run nnU-Net's real commands in subprocesses."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

from nnunet_diffrefine.demo.small_plans import CONFIGURATION
from nnunet_diffrefine.demo.steps import environment, find_command
from nnunet_diffrefine.demo.working_folder import WorkingFolder

TRAINERS = Path(__file__).parent / "trainers"
TINY = "nnUNetPlansTiny"


@dataclass(frozen=True)
class Workspace(WorkingFolder):
    """One dataset in a folder of its own.

    Attributes:
        extra: environment variables on top of nnU-Net's.
    """

    plans = TINY
    extra: dict[str, str] = field(default_factory=dict)

    def env(self) -> dict[str, str]:
        """One worker, one thread: several commands may run side by side."""
        values = environment(self.folder)
        quiet = {"nnUNet_n_proc_DA": "1", "nnUNet_def_n_proc": "1"}
        trainers = os.pathsep.join((values["nnUNet_extTrainer"], str(TRAINERS)))
        return {**values, **quiet, "nnUNet_extTrainer": trainers, **self.extra}

    def start(self, *command: str) -> subprocess.Popen:
        """Start a command; its output is kept in a pipe."""
        arguments = [find_command(command[0]), *map(str, command[1:])]
        return subprocess.Popen(
            arguments,
            env=self.env(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=self.folder,
            start_new_session=True,  # so that a test can kill a command with all its workers
        )

    def run(self, *command: str, fails: bool = False) -> str:
        """Run a command to its end and return its output; it must succeed unless ``fails``."""
        return self.wait(self.start(*command), fails)

    @staticmethod
    def wait(process: subprocess.Popen, fails: bool = False) -> str:
        output, _ = process.communicate(timeout=580)
        assert (process.returncode != 0) == fails, output[-4000:]
        return output

    def together(self, *commands: list[str]) -> list[str]:
        """Run commands side by side."""
        processes = [self.start(*command) for command in commands]
        return [self.wait(process) for process in processes]

    def train(self, fold: int, trainer: str, *options: str) -> list[str]:
        return super().train(fold, trainer, "-device", "cpu", *options)

    def predict(self, trainer: str, images: Path, out: Path, *options: str) -> list[str]:
        """Command that predicts in one process."""
        where = ["-i", images, "-o", out, "-device", "cpu", "-npp", "0", "-nps", "0"]
        return ["nnUNetv2_predict", *self.options(trainer), *map(str, where), *options]

    def plan(
        self, features: list[int], patch: list[int], planner: str = "ExperimentPlanner", plans: str = "nnUNetPlans"
    ) -> None:
        """Plan and preprocess with nnU-Net, then cut the network down and split the cases into two folds."""
        what = ["-d", self.number, "-c", CONFIGURATION, "-pl", planner]
        self.run("nnUNetv2_plan_and_preprocess", *what, "-np", "1", "-npfp", "1")
        self.write_small_plans(plans, features, patch, folds=2)
