"""``qc.csv``: what is known about each result without a reference, the cases in the order in which to look at them.

Each case has a file of its own in ``qc/``, written with its other results; the table is made of all of them whenever a
process has finished, so parts and continued runs need not know of each other. A file counts if its mask is there.
"""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Mapping, Sequence, Set
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from scipy.ndimage import generate_binary_structure, label
from torch import Tensor

from nnunet_diffrefine.batch import Foreground
from nnunet_diffrefine.calibration.agreement import predicted_dice
from nnunet_diffrefine.calibration.record import QualityRecord, Record
from nnunet_diffrefine.inference.files import OutputFolder

FOLDER = "qc"
TABLE = "qc.csv"
RANK = "need_of_review"


@dataclass(frozen=True)
class Judge:
    """How results are judged; the same for all cases.

    Attributes:
        names: of the R classes.
        calibrated: by class name; empty where there is no calibration.
        note: what to know about all numbers.
    """

    names: tuple[str, ...]
    calibrated: Mapping[str, QualityRecord]
    note: str

    @classmethod
    def of(cls, record: Record | None, foreground: Foreground, note: str) -> Judge:
        """The judge that a calibration makes, or the lack of one."""
        return cls(foreground.names, {} if record is None else record.quality, note)

    def dice(self, logits: Tensor, probabilities: Tensor, foreground: Foreground) -> dict[str, float | None]:
        """Predicted Dice of each class, None where nothing was found.

        Args:
            logits: of the result, (H, D, H, W).
            probabilities: of the classes, (R, D, H, W).
            foreground: meaning of the R channels.
        """
        m = foreground.exported(foreground.decide(logits[None]))[0]
        sums = [x.flatten(1).sum(1, dtype=torch.float64).numpy() for x in (probabilities, m, probabilities * m)]
        found: dict[str, float | None] = {}
        for name, value in zip(self.names, predicted_dice(*sums), strict=True):
            line = self.calibrated[name].line if name in self.calibrated else float
            found[name] = None if np.isnan(value) else float(line(value))
        return found

    def case(
        self,
        name: str,
        dice: dict[str, float | None],
        masks: Mapping[str, np.ndarray],
        changed: np.ndarray,
        voxel_ml: float,
    ) -> CaseQuality:
        """All numbers of a case.

        Args:
            name: of the case.
            dice: predicted.
            masks: of each class in the result, bool (Z, Y, X).
            changed: voxels whose label changed, bool (Z, Y, X).
            voxel_ml: volume of a voxel in ml.
        """
        volumes = {of: float(mask.sum()) * voxel_ml for of, mask in masks.items()}
        components, n = label(changed, generate_binary_structure(3, 3))
        largest = int(np.bincount(components.ravel())[1:].max()) if n else 0
        empty = [of for of, value in dice.items() if value is None]
        notes = [self.note, f"nothing found of {', '.join(empty)}" if empty else ""]
        return CaseQuality(
            name, dice, volumes, {of: self._limits(of, v) for of, v in volumes.items()},
            float(changed.mean()), largest * voxel_ml, "; ".join(filter(None, notes)),
        )  # fmt: skip

    def _limits(self, name: str, volume: float) -> tuple[float | None, float | None]:
        known = self.calibrated.get(name)
        if known is None or known.volume_low is None or known.volume_high is None:
            return None, None
        return volume * known.volume_low, volume * known.volume_high


@dataclass(frozen=True)
class CaseQuality:
    """A case.

    Attributes:
        case: its name.
        predicted_dice: of the result, by class; None where the class is empty.
        volume_ml: by class.
        limits_ml: lower and upper end of the interval of the volume, by class; None without calibration.
        changed_share: share of the voxels whose label changed.
        largest_change_ml: volume of the largest connected set of such voxels (touching at faces, edges or corners).
        note: what else to know.
    """

    case: str
    predicted_dice: dict[str, float | None]
    volume_ml: dict[str, float]
    limits_ml: dict[str, tuple[float | None, float | None]]
    changed_share: float
    largest_change_ml: float
    note: str

    def json(self) -> str:
        """The case's file."""
        return json.dumps(asdict(self), indent=1)

    def urgency(self, usual: Set[str]) -> tuple[int, float, str]:
        """Cases are looked at in this order: nothing found; a usual class not found; least predicted Dice of a class.

        Args:
            usual: classes that most cases have.
        """
        known = [value for value in self.predicted_dice.values() if value is not None]
        lacks = any(value is None and name in usual for name, value in self.predicted_dice.items())
        return (0 if not known else 1 if lacks else 2, min(known, default=0.0), self.case)

    def row(self, rank: int) -> dict[str, Any]:
        """The case's row; empty where something is not known."""
        numbers: dict[str, float | None] = {f"predicted_Dice_{k}": v for k, v in self.predicted_dice.items()}
        for name, volume in self.volume_ml.items():
            low, high = self.limits_ml[name]
            numbers |= {f"volume_ml_{name}": volume, f"volume_low_ml_{name}": low, f"volume_high_ml_{name}": high}
        numbers |= {"changed_share": self.changed_share, "largest_change_ml": self.largest_change_ml}
        shown = {key: "" if value is None else f"{value:.6g}" for key, value in numbers.items()}
        return {"case": self.case, RANK: rank, **shown, "note": self.note}


def case_file(case: str) -> str:
    """Name of a case's file in the output folder."""
    return f"{FOLDER}/{case}.json"


def usual_classes(cases: Sequence[CaseQuality]) -> set[str]:
    """Classes that were found in more than half of the cases."""
    found = Counter(name for case in cases for name, value in case.predicted_dice.items() if value is not None)
    return {name for name, n in found.items() if n > len(cases) / 2}


def write_table(output: OutputFolder, ending: str) -> None:
    """Write ``qc.csv`` of all cases whose mask is there; parts that end at the same time wait for each other.

    Args:
        output: with the cases' files.
        ending: of masks.

    Raises:
        RuntimeError: a case's file is damaged.
    """
    folder = output.folder / FOLDER
    if not folder.is_dir():
        return
    with FileLock(folder / ".lock"):
        names = (file.name.removesuffix(".json") for file in folder.glob("*.json"))
        done = [name for name in names if (output.folder / f"{name}{ending}").is_file()]
        cases = [_read(output.folder / case_file(name)) for name in done]
        usual = usual_classes(cases)
        ordered = sorted(cases, key=lambda case: case.urgency(usual))
        rows = [case.row(rank) for rank, case in enumerate(ordered, 1)]
        output.write(TABLE, lambda file: _write_rows(rows, file))


def _read(file: Path) -> CaseQuality:
    try:
        return CaseQuality(**json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise RuntimeError(f"{file} is damaged ({error}). Delete it, and apply with --continue_prediction.") from error


def _write_rows(rows: list[dict[str, Any]], file: Path) -> None:
    with file.open("w", encoding="utf-8", newline="") as stream:
        columns = dict.fromkeys(column for row in rows for column in row) or {"case": None}
        writer = csv.DictWriter(stream, columns, restval="")
        writer.writeheader()
        writer.writerows(rows)
