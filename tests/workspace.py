"""A working folder with nnU-Net's three folders, in which tests run nnU-Net's real commands in subprocesses."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

from nnunet_diffrefine.demo.small_plans import shrink
from nnunet_diffrefine.demo.steps import environment, find_command

TRAINERS = Path(__file__).parent / "trainers"
TINY = "nnUNetPlansTiny"
CONFIGURATION = "3d_fullres"


@dataclass
class Workspace:
    """One dataset in a folder of its own.

    Attributes:
        folder: holds nnUNet_raw, nnUNet_preprocessed, nnUNet_results.
        dataset: DatasetXXX_NAME.
        extra: environment variables on top of nnU-Net's.
    """

    folder: Path
    dataset: str
    extra: dict[str, str] = field(default_factory=dict)

    @property
    def raw(self) -> Path:
        return self.folder / "nnUNet_raw" / self.dataset

    @property
    def preprocessed(self) -> Path:
        return self.folder / "nnUNet_preprocessed" / self.dataset

    @property
    def number(self) -> str:
        return str(int(self.dataset[7:10]))

    def model(self, trainer: str, plans: str = TINY) -> Path:
        return self.folder / "nnUNet_results" / self.dataset / f"{trainer}__{plans}__{CONFIGURATION}"

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

    def together(self, *commands: tuple[str, ...]) -> list[str]:
        """Run commands side by side."""
        processes = [self.start(*command) for command in commands]
        return [self.wait(process) for process in processes]

    def train(self, fold: int, trainer: str, *options: str, plans: str = TINY) -> tuple[str, ...]:
        return (
            "nnUNetv2_train",
            self.number,
            CONFIGURATION,
            str(fold),
            "-tr",
            trainer,
            "-p",
            plans,
            "-device",
            "cpu",
            *options,
        )

    def plan(
        self,
        features: list[int],
        patch: list[int],
        folds: int = 2,
        planner: str = "ExperimentPlanner",
        plans: str = "nnUNetPlans",
    ) -> None:
        """Plan and preprocess with nnU-Net, then cut the network down and split the cases."""
        self.run(
            "nnUNetv2_plan_and_preprocess",
            "-d",
            self.number,
            "-c",
            CONFIGURATION,
            "-pl",
            planner,
            "-np",
            "1",
            "-npfp",
            "1",
        )
        full = json.loads((self.preprocessed / f"{plans}.json").read_text())
        (self.preprocessed / f"{TINY}.json").write_text(json.dumps(shrink(full, TINY, features, 2, patch)))
        cases = sorted(f.name.split(".")[0] for f in (self.raw / "labelsTr").iterdir())
        held_out = [cases[k::folds] for k in range(folds)]
        splits = [{"train": sorted(set(cases) - set(val)), "val": val} for val in held_out]
        (self.preprocessed / "splits_final.json").write_text(json.dumps(splits))
