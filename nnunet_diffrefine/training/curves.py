"""The curves that matter for refinement: Dice of stage one and of the refined mask on the same validation patches."""

from __future__ import annotations

import csv
import os
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt


@dataclass
class RefinementCurves:
    """One value an epoch; Dice is the mean over classes or regions, in [0, 1]."""

    epoch: list[int] = field(default_factory=list)
    stage_one_dice: list[float] = field(default_factory=list)
    refined_dice: list[float] = field(default_factory=list)

    def log(self, epoch: int, stage_one: float, refined: float) -> None:
        """Append an epoch, dropping later ones left over from an interrupted run."""
        keep = sum(e < epoch for e in self.epoch)
        for values, value in zip(self.columns, (epoch, stage_one, refined), strict=True):
            del values[keep:]
            values.append(value)

    @property
    def columns(self) -> tuple[list, list, list]:
        """Epochs, stage-one Dice and refined Dice."""
        return self.epoch, self.stage_one_dice, self.refined_dice

    def save(self, folder: Path) -> None:
        """Write ``refinement.csv`` and ``refinement.png`` next to nnU-Net's ``progress.png``, atomically."""
        changes = [after - before for before, after in zip(self.stage_one_dice, self.refined_dice, strict=True)]
        table = folder / "refinement.csv.tmp"
        with table.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(("epoch", "stage_one_dice", "refined_dice", "change"))
            writer.writerows(zip(*self.columns, changes, strict=True))
        os.replace(table, folder / "refinement.csv")
        self._plot(changes, folder / "refinement.tmp.png")
        os.replace(folder / "refinement.tmp.png", folder / "refinement.png")

    def _plot(self, changes: list[float], file: Path) -> None:
        figure, (dice, change) = plt.subplots(2, 1, figsize=(8, 7), sharex=True, layout="constrained")
        dice.plot(self.epoch, self.stage_one_dice, color="0.4", linestyle="--", label="stage one")
        dice.plot(self.epoch, self.refined_dice, color="C0", label="refined")
        dice.set(ylabel="Dice on validation patches", title="Refinement")
        dice.legend()
        change.axhline(0, color="0.4", linewidth=0.8)
        change.plot(self.epoch, changes, color="C0")
        change.set(xlabel="epoch", ylabel="change (refined - stage one)")
        figure.savefig(file, dpi=110)
        plt.close(figure)
