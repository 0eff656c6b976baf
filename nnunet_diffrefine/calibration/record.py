"""``refinement.json``: what calibration found, what was decided and by whom, and of which checkpoints it holds.

It lies in the model folder itself. nnU-Net's ``crossval_results_folds_...``, where ``postprocessing.json`` lies, is
deleted and made anew by every ``nnUNetv2_find_best_configuration``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import dacite

from nnunet_diffrefine.calibration.agreement import DiceScores, ErrorScores, Line
from nnunet_diffrefine.calibration.measure import Measured, Quality
from nnunet_diffrefine.calibration.scaling import Scaling
from nnunet_diffrefine.stage_one.manifest import write_atomically

FILE = "refinement.json"
FORMAT = 1
Decision = Literal["refine", "keep"]
DECISIONS = ("refine", "keep", "measured")


@dataclass(frozen=True)
class ClassRecord:
    """A class: its decision, and the mean Dice (of label maps as nnU-Net writes them) over ``n`` cases behind it.

    Attributes:
        decision: ``refine``, or ``keep`` stage one's.
        by: ``measured``, or ``user`` (``--set``).
        measured: what the interval says.
        offset: added to the refined logit.
        n: cases.
        stage_one: mean Dice.
        refined: mean Dice, offsets cross-fitted.
        difference: of both, paired.
        interval: 95 % bootstrap interval of it.
        better: cases in which refined is.
        worse: cases in which it is worse.
        result: mean Dice through offsets and gate, as measured.
    """

    decision: Decision
    by: Literal["measured", "user"]
    measured: Decision
    offset: float
    n: int
    stage_one: float
    refined: float
    difference: float
    interval: list[float] | None
    better: int
    worse: int
    result: float


@dataclass(frozen=True)
class OffsetRecord:
    """Offsets: whether they are used, the best ones, and their cross-fitted gain in mean Dice with its interval."""

    used: bool
    best: list[float]
    gain: float | None
    interval: list[float] | None


@dataclass(frozen=True)
class ErrorMapRecord:
    """The error map: the source of least cross-fitted log loss, its scaling, and all sources' scores on ``voxels``."""

    source: str
    scaling: Scaling
    voxels: int
    scores: dict[str, ErrorScores]


@dataclass(frozen=True)
class DiceRecord:
    """Predicted Dice: the source of least cross-fitted mean absolute error, its scaling, and all scores by class."""

    source: str
    scaling: Scaling
    scores: dict[str, dict[str, DiceScores]]


@dataclass(frozen=True)
class QualityRecord:
    """Of a class: predicted Dice to Dice, and percentiles of true over predicted volume of ``n`` cases."""

    line: Line
    volume_low: float | None
    volume_high: float | None
    n: int


@dataclass(frozen=True)
class RecallRecord:
    """Wrong voxels of stage one in the doubtful region, all of them, and their share (None: there are none)."""

    found: int
    wrong: int
    share: float | None


@dataclass(frozen=True)
class Record:
    """The file.

    Attributes:
        version: of this package.
        folds: calibrated on.
        cases: number of them.
        checkpoint: file name in every fold.
        checkpoints: SHA-256 by fold.
        region: settings of the doubtful region.
        sampling: settings of the result.
        classes: by name, in channel order.
        offsets: see there.
        error_map: see there.
        dice: predicted Dice; see there.
        quality: by class name.
        recall: of the region.
        format: of the file.
    """

    version: str
    folds: list[int]
    cases: int
    checkpoint: str
    checkpoints: dict[str, str]
    region: dict[str, Any]
    sampling: dict[str, Any]
    classes: dict[str, ClassRecord]
    offsets: OffsetRecord
    error_map: ErrorMapRecord
    dice: DiceRecord
    quality: dict[str, QualityRecord]
    recall: RecallRecord
    format: int = FORMAT

    @property
    def gate(self) -> dict[str, Any]:
        """The ``gate`` section of the plans."""
        unchanged = [name for name, c in self.classes.items() if c.decision == "keep"]
        return {"unchanged": unchanged, "offsets": {name: c.offset for name, c in self.classes.items() if c.offset}}

    def decided(self, changes: Mapping[str, str]) -> Record:
        """With the user's decisions: class name -> ``refine``, ``keep`` or ``measured`` (back to the measurement)."""
        classes = dict(self.classes)
        for name, decision in changes.items():
            old = classes[name]
            back = decision == "measured"
            new: Any = old.measured if back else decision
            classes[name] = replace(old, decision=new, by="measured" if back else "user")
        return replace(self, classes=classes)

    def write(self, folder: Path) -> None:
        """Write ``folder/refinement.json`` atomically."""
        write_atomically(folder / FILE, json.dumps(asdict(self), indent=2).encode())

    @classmethod
    def read(cls, folder: Path, mend: str) -> Record | None:
        """Read ``folder/refinement.json``; None where there is none.

        Raises:
            RuntimeError: it is damaged or of another format; the message ends with ``mend``.
        """
        file = folder / FILE
        if not file.is_file():
            return None
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
            if not isinstance(values, dict) or values.get("format") != FORMAT:
                found = values.get("format") if isinstance(values, dict) else None
                raise ValueError(f"its format is {found!r}, this version reads {FORMAT}")
            return dacite.from_dict(cls, values, dacite.Config(strict=True, type_hooks={float: _number}))
        except (ValueError, dacite.DaciteError) as error:
            raise RuntimeError(f"{file} cannot be used: {error}. {mend}") from error


def _number(value: object) -> object:
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def record_of(measured: Measured, names: tuple[str, ...], made_from: Mapping[str, Any]) -> Record:
    """The record of a measurement; ``made_from`` are its first fields, version to sampling."""
    offsets, gain = measured.offsets, measured.offsets.gain
    share = measured.found / measured.wrong if measured.wrong else None
    errors, dice = measured.error_source, measured.dice_source
    scores = {name: dict(zip(names, of, strict=True)) for name, of in measured.dice.items()}
    return Record(
        **made_from,
        classes={name: _class_record(measured, channel) for channel, name in enumerate(names)},
        offsets=OffsetRecord(
            any(offsets.offsets),
            list(offsets.best),
            None if gain is None else gain.difference,
            None if gain is None else _listed(gain.interval),
        ),
        error_map=ErrorMapRecord(errors, measured.scalings[errors], measured.voxels, measured.errors),
        dice=DiceRecord(dice, measured.scalings[dice], scores),
        quality={name: _quality_record(q) for name, q in zip(names, measured.quality, strict=True)},
        recall=RecallRecord(measured.found, measured.wrong, share),
    )


def _class_record(measured: Measured, channel: int) -> ClassRecord:
    decision: Decision = "keep" if channel in measured.keep else "refine"
    found = measured.differences[channel]
    return ClassRecord(
        decision=decision,
        by="measured",
        measured=decision,
        offset=float(measured.offsets.offsets[channel]),
        n=measured.n,
        stage_one=float(measured.stage_one[:, channel].mean()),
        refined=float(measured.offsets.refined[:, channel].mean()),
        difference=found.difference,
        interval=_listed(found.interval),
        better=found.better,
        worse=found.worse,
        result=float(measured.result[:, channel].mean()),
    )


def _quality_record(quality: Quality) -> QualityRecord:
    low, high = quality.ratios or (None, None)
    return QualityRecord(quality.line, low, high, quality.n)


def _listed(interval: tuple[float, float] | None) -> list[float] | None:
    return None if interval is None else list(interval)
