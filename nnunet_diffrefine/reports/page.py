"""What the page says, as plain values for its template, and rendering it."""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from nnunet_diffrefine import __version__
from nnunet_diffrefine.evaluation.definitions import find_metric
from nnunet_diffrefine.reports.compare import Row
from nnunet_diffrefine.reports.metrics_table import MetricsTable
from nnunet_diffrefine.reports.pictures import CHANGES, class_style
from nnunet_diffrefine.reports.reliability import BAND, BINS, MAP, OWN, SPREAD, Reliability
from nnunet_diffrefine.reports.sizes import VOLUME, SizeGroup
from nnunet_diffrefine.reports.slices import Slice
from nnunet_diffrefine.reports.statistics import EQUAL, PairedComparison
from nnunet_diffrefine.reports.tables import difference, metric_name, number, row_cells, signed

TILES = 12
"""So many numbers or fewer are also shown large, above the summary."""
SWATCH = 3
"""Width of a legend's line in the template."""


@dataclass(frozen=True)
class Chart:
    """A drawing in the page: its title and its ``<svg>`` element."""

    title: str
    svg: str


@dataclass(frozen=True)
class Cell:
    """A cell of a table: its text, the value it is sorted by ("" if there is none), and better, worse or ""."""

    text: str
    value: str
    verdict: str = ""


@dataclass(frozen=True)
class CaseRow:
    """A case and class in the table of all cases: its link target, that of the case's pictures or "", and values."""

    target: str
    case: str
    picture: str
    label: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Picture:
    """A case in pictures."""

    target: str
    case: str
    reasons: tuple[str, ...]
    labels: tuple[str, ...]
    values: tuple[str, ...]
    text: str
    panels: tuple[Chart, ...]


def head(
    baseline: MetricsTable, system: MetricsTable, summary: Sequence[Row], files: Mapping[str, str]
) -> dict[str, Any]:
    """Names, the summary table, and how the tables were made."""
    labels = list(dict.fromkeys(label for label, _ in baseline.values))
    tiles = [row for row in summary if row.metric in ("Dice", "HD95")]
    by_label = {label: [row for row in summary if row.label == label] for label in labels}
    return {
        "baseline": baseline.name,
        "system": system.name,
        "n_cases": len(baseline.cases),
        "labels": labels,
        "tiles": [(row, _verdict(row.result, row.better)) for row in tiles] if len(tiles) <= TILES else [],
        "summary": {
            label: [(row_cells(row)[1:], _verdict(row.result, row.better)) for row in rows]
            for label, rows in by_label.items()
            if rows
        },
        "one_sided": sum(row.result.n_one_sided for row in summary),
        "files": files,
        "settings": baseline.settings or system.settings,
        "version": __version__,
        "changes": CHANGES,
    }


def _verdict(result: PairedComparison, better: str) -> str:
    """Better or worse where the interval excludes zero."""
    if result.interval is None or result.interval[0] <= 0 <= result.interval[1]:
        return ""
    return "better" if (result.interval[0] > 0) == (better == "higher") else "worse"


def case_rows(
    baseline: MetricsTable,
    system: MetricsTable,
    metrics: Sequence[str],
    pictured: Sequence[str],
    predicted: Mapping[str, float] | None,
) -> list[CaseRow]:
    """One row for each case and class: reference volume, each metric in both systems and its change."""
    pictures = {case: f"case-{i}" for i, case in enumerate(pictured, start=1)}
    labels = list(dict.fromkeys(label for label, _ in baseline.values))
    rows = []
    for i, (case, label) in enumerate((case, label) for case in sorted(baseline.cases) for label in labels):
        cells = [_cell(baseline.values.get((label, VOLUME), {}).get(case, math.nan))]
        for metric in metrics:
            cells += _metric_cells(baseline, system, case, label, metric)
        cells += [] if predicted is None else [_cell(predicted[case])]
        rows.append(CaseRow(f"row-{i}", case, pictures.get(case, ""), label, tuple(cells)))
    return rows


def _metric_cells(baseline: MetricsTable, system: MetricsTable, case: str, label: str, metric: str) -> list[Cell]:
    old, new = (table.values.get((label, metric), {}).get(case, math.nan) for table in (baseline, system))
    gain = (new - old) * (1 if find_metric(metric).better == "higher" else -1)
    verdict = "better" if gain > EQUAL else "worse" if gain < -EQUAL else ""
    return [_cell(old), _cell(new), _cell(new - old, signed, verdict)]


def _cell(value: float, text: Callable[[float], str] = number, verdict: str = "") -> Cell:
    return Cell("–", "") if math.isnan(value) else Cell(text(value), repr(float(value)), verdict)


def case_table(
    baseline: MetricsTable, system: MetricsTable, metrics: Sequence[str], cases: Sequence[CaseRow]
) -> dict[str, Any]:
    """The table of all cases with its headings."""
    headings = ["volume [mL]"]
    for metric in metrics:
        kind = find_metric(metric)
        unit = "" if kind.unit == "1" else f" [{kind.unit}]"
        headings += [f"{metric}{unit}, {baseline.name}", f"{metric}{unit}, {system.name}", f"{metric} change"]
    if cases and len(cases[0].cells) > len(headings):
        headings.append("least predicted Dice")
    return {"case_headings": headings, "case_rows": cases}


def size_rows(groups: Sequence[SizeGroup], metrics: Sequence[str]) -> dict[str, Any]:
    """The table of gains and losses by class and size."""
    rows = []
    for group in groups:
        sizes = "–" if group.volumes is None else " to ".join(map(number, group.volumes))
        cells = []
        for metric in metrics:
            result, better = group.results[metric], find_metric(metric).better
            counts = f"{result.better} / {result.equal} / {result.worse}"
            cells += [(difference(result), _verdict(result, str(better))), (counts, "")]
        rows.append({"label": group.label, "name": group.name, "sizes": sizes, "n": len(group.cases), "cells": cells})
    return {"metrics": list(metrics), "rows": rows}


def reliability(found: Mapping[str, Reliability]) -> dict[str, Any]:
    """The numbers about the error map and what it has to beat."""
    rows = []
    for name, known in found.items():
        for where, part in ((f"within {BAND:g} mm of stage one's surface", known.band), ("all", known.everywhere)):
            if n := int(part.n.sum()):
                wrong, probability = int(part.wrong.sum()) / n, float(part.probability.sum()) / n
                as_probability = [probability, part.ece, part.brier] if name != SPREAD else [None] * 3
                numbers = [number(v) for v in (wrong, *as_probability, part.auroc)]
                rows.append((where, name, f"{n:,}".replace(",", "\u202f"), *numbers))
    return {
        "rows": sorted(rows, key=lambda row: row[0] == "all"),
        "own": OWN in found,
        "spread": SPREAD in found,
        "share": number(found[MAP].share_in_band),
        "band": BAND,
        "bins": BINS,
        "n": len(found[MAP].by_case),
    }


def picture(
    position: int,
    case: str,
    reasons: Sequence[str],
    shown: Slice,
    drawings: Sequence[Chart],
    baseline: MetricsTable,
    system: MetricsTable,
) -> Picture:
    """A case in pictures, with its numbers."""
    values = []
    for label in shown.reference:
        parts = []
        for metric in ("Dice", "HD95"):
            old, new = (t.values.get((label, metric), {}).get(case, math.nan) for t in (baseline, system))
            a, b = (number(None if math.isnan(v) else v) for v in (old, new))
            parts.append(f"{metric} {a} → {b}" + (" mm" if metric == "HD95" else ""))
        values.append(f"{label}: {', '.join(parts)}")
    errors = f"{int(shown.wrong_before.sum())} wrong voxels before, {int(shown.wrong_after.sum())} after"
    text = f"{shown.plane} slice {shown.index[0]} of {shown.index[1]}; on it {errors}"
    return Picture(
        f"case-{position}", case, tuple(reasons), tuple(shown.reference), tuple(values), text, tuple(drawings)
    )


def class_legend(labels: Sequence[str]) -> list[tuple[str, str, str]]:
    """Name, colour and dashes of each class in pictures; dashes as SVG wants them for a line ``SWATCH`` wide."""
    return [
        (name, colour, "" if isinstance(line, str) else " ".join(f"{SWATCH * part:g}" for part in line[1]))
        for name, (colour, line) in class_style(list(labels)).items()
    ]


def render(content: Mapping[str, Any]) -> str:
    """The page. Everything is escaped but the drawings; the only script that may run is the page's own."""
    environment = Environment(
        loader=PackageLoader("nnunet_diffrefine.reports"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "difference": difference, "metric_name": metric_name}
    loader = environment.loader
    assert loader is not None
    script, _, _ = loader.get_source(environment, "report.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    style, _, _ = loader.get_source(environment, "report.css")
    return environment.get_template("report.html").render(content, script=script, style=style, digest=digest)
