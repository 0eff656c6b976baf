"""Reading ``metrics.csv``, and refusing tables that cannot be compared case by case."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

COLUMNS = {"case", "label", "metric", "value", "unit"}
SHOWN = 10
Values = dict[tuple[str, str], dict[str, float]]


@dataclass(frozen=True)
class MetricsTable:
    """A system's metrics.

    Args:
        name: of the system.
        values: ``values[label, metric][case]``, NaN where there is none.
        settings: of the evaluation, from ``metrics.json`` beside the table; None if there is no such file.
    """

    name: str
    values: Values
    settings: dict[str, Any] | None

    @property
    def cases(self) -> set[str]:
        """Names of all cases."""
        return set().union(*self.values.values())


def read_metrics(name: str, file: Path) -> MetricsTable:
    """Read a ``metrics.csv``; further columns are skipped.

    Raises:
        ValueError: no such table, rows given twice, values that are no numbers.
        OSError: the file cannot be read.
    """
    file = Path(file)
    values: Values = {}
    with open(file, encoding="utf-8", newline="") as stream:
        reader = csv.DictReader(stream)
        if missing := COLUMNS - set(reader.fieldnames or ()):
            raise ValueError(
                f"{name}={file} lacks column(s) {', '.join(sorted(missing))}; wanted a metrics.csv of "
                "nnUNetv2_diffrefine evaluate."
            )
        for row in reader:
            found = values.setdefault((row["label"], row["metric"]), {})
            where = f"{file}, line {reader.line_num}: {row['case']}, {row['label']}, {row['metric']}"
            if row["case"] in found:
                raise ValueError(f"{where} is there twice.")
            found[row["case"]] = _number(row["value"], where)
    if not values:
        raise ValueError(f"{name}={file} has no rows.")
    return MetricsTable(name, values, _settings(file.with_name("metrics.json")))


def refuse_unpaired(baseline: MetricsTable, system: MetricsTable) -> None:
    """Check that two systems were measured on the same cases, in the same labels and metrics, the same way.

    Raises:
        ValueError: they were not; the message lists what is missing where.
    """
    faults = _lacking("case(s)", baseline.name, baseline.cases, system.name, system.cases)
    kinds = [{f"{label} {metric}" for label, metric in table.values} for table in (baseline, system)]
    faults += _lacking("label and metric", baseline.name, kinds[0], system.name, kinds[1])
    if not faults:
        for key, found in baseline.values.items():
            faults += _lacking(" ".join(key) + " of", baseline.name, set(found), system.name, set(system.values[key]))
    if faults:
        raise ValueError("Only the same cases can be compared. " + " ".join(faults[:SHOWN]))
    if baseline.settings is not None and system.settings is not None and baseline.settings != system.settings:
        keys = sorted(baseline.settings.keys() | system.settings.keys())
        differing = [k for k in keys if baseline.settings.get(k) != system.settings.get(k)]
        shown = "; ".join(f"{k}: {baseline.settings.get(k)} and {system.settings.get(k)}" for k in differing)
        raise ValueError(
            f"{baseline.name} and {system.name} were evaluated differently ({shown}, says metrics.json beside each "
            "table). Evaluate both with the same arguments."
        )


def read_folds(splits: Path, cases: set[str]) -> dict[str, int]:
    """The fold that held each case out, from nnU-Net's ``splits_final.json``.

    Raises:
        ValueError: not such a file, or a case that no fold or more than one fold held out.
        OSError: the file cannot be read.
    """
    try:
        held_out = [fold["val"] for fold in json.loads(Path(splits).read_text(encoding="utf-8"))]
    except (json.JSONDecodeError, TypeError, KeyError) as error:
        raise ValueError(f"{splits} is not nnU-Net's splits_final.json, a list of train and val: {error!r}.") from error
    folds = {case: [number for number, val in enumerate(held_out) if case in val] for case in sorted(cases)}
    if wrong := [f"{case} (fold(s) {found or 'none'})" for case, found in folds.items() if len(found) != 1]:
        raise ValueError(
            f"{splits} does not hold out {len(wrong)} of {len(cases)} cases exactly once: {_listed(wrong)}. "
            "Were the tables made from the validation folders of these splits?"
        )
    return {case: found[0] for case, found in folds.items()}


def _number(text: str | None, where: str) -> float:
    try:
        value = float(text) if text else math.nan
    except ValueError:
        raise ValueError(f"{where} has value {text!r}; wanted a number, or nothing.") from None
    if math.isinf(value):
        raise ValueError(f"{where} is infinite; a finite value is needed for a mean. Evaluate with an empty policy.")
    return value


def _settings(file: Path) -> dict[str, Any] | None:
    if not file.is_file():
        return None
    try:
        content: Mapping[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return dict(content["settings"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is not what nnUNetv2_diffrefine evaluate writes: {error!r}.") from error


def _lacking(what: str, first: str, ours: set[str], second: str, theirs: set[str]) -> list[str]:
    """Sentences on what either lacks of the other's."""
    pairs = ((first, sorted(theirs - ours)), (second, sorted(ours - theirs)))
    return [f"{name} lacks {len(gone)} {what}: {_listed(gone)}." for name, gone in pairs if gone]


def _listed(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
