"""Two or more systems against one of them: comparisons of all labels and metrics, pooled and per fold."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nnunet_diffrefine.evaluation.definitions import find_metric
from nnunet_diffrefine.evaluation.files import writable_folder, write_atomically
from nnunet_diffrefine.reports.metrics_table import MetricsTable, read_folds, read_metrics, refuse_unpaired
from nnunet_diffrefine.reports.statistics import CONFIDENCE, RESAMPLES, PairedComparison, compare, holm
from nnunet_diffrefine.reports.tables import latex, markdown


@dataclass(frozen=True)
class Row:
    """A comparison and where it belongs.

    Args:
        system: compared with the baseline.
        fold: cases held out by this fold; None is all cases, pooled.
        label: or region.
        metric: its name.
        unit: its unit.
        better: which direction is.
        result: the comparison.
        p_wilcoxon_holm: Holm-adjusted over labels and metrics of this system and fold.
        p_t_holm: the same for the t test.
    """

    system: str
    fold: int | None
    label: str
    metric: str
    unit: str
    better: str
    result: PairedComparison
    p_wilcoxon_holm: float | None
    p_t_holm: float | None


def compare_files(
    files: Mapping[str, Path],
    output_folder: Path,
    baseline: str | None = None,
    splits: Path | None = None,
    metrics: Sequence[str] | None = None,
    seed: int = 0,
    n_losses: int = 3,
) -> list[Row]:
    """Compare ``metrics.csv`` files and write ``comparison.md``, ``comparison.json`` and ``comparison.tex``.

    Args:
        files: ``metrics.csv`` of each system by name, at least two.
        output_folder: created if need be.
        baseline: name of the system the others are compared with; the first if None.
        splits: nnU-Net's ``splits_final.json``, for comparisons per fold.
        metrics: names to compare; all that have a better direction if None.
        seed: of the bootstrap.
        n_losses: worst losses listed for each label and metric.

    Raises:
        ValueError: fewer than two systems, unknown names, unpaired cases, tables evaluated differently.
        OSError: a file cannot be read, or the folder not be written.
    """
    if len(files) < 2:
        raise ValueError(f"Given {len(files)} system(s), {', '.join(files) or 'none'}; wanted two or more NAME=FILE.")
    reference = next(iter(files)) if baseline is None else baseline
    if reference not in files:
        raise ValueError(f"--baseline is {reference}; wanted one of {', '.join(files)}.")
    if n_losses < 0:
        raise ValueError(f"--losses is {n_losses}; wanted 0 or more.")
    tables = {name: read_metrics(name, file) for name, file in files.items()}
    for table in tables.values():
        refuse_unpaired(tables[reference], table)
    chosen = chosen_metrics(tables[reference], metrics)
    folds = None if splits is None else read_folds(splits, tables[reference].cases)
    folder = writable_folder(output_folder)
    rows = []
    for table in tables.values():
        if table.name != reference:
            rows += compare_tables(tables[reference], table, chosen, folds, seed, n_losses)
    _write(folder, rows, tables[reference], files, seed)
    return rows


def chosen_metrics(table: MetricsTable, names: Sequence[str] | None) -> list[tuple[str, str]]:
    """Labels and metrics to compare, in the order of the table.

    Raises:
        ValueError: a metric that the table lacks, or that is neither good nor bad.
    """
    present = list(dict.fromkeys(metric for _, metric in table.values))
    if unknown := [name for name in names or () if name not in present]:
        raise ValueError(f"--metrics has {', '.join(unknown)}; the tables have {', '.join(present)}.")
    neutral = [name for name in present if find_metric(name).better is None]
    if asked := [name for name in names or () if name in neutral]:
        raise ValueError(f"--metrics has {', '.join(asked)}, which describes a case and is neither good nor bad.")
    wanted = [name for name in present if name not in neutral and (names is None or name in names)]
    return [key for key in table.values if key[1] in wanted]


def compare_tables(
    baseline: MetricsTable,
    system: MetricsTable,
    chosen: Sequence[tuple[str, str]],
    folds: Mapping[str, int] | None,
    seed: int,
    n_losses: int,
) -> list[Row]:
    """The system against the baseline in the chosen labels and metrics, pooled and then in each of the folds."""
    rows = []
    for fold in [None, *sorted(set((folds or {}).values()))]:
        cases = {case for case in baseline.cases if fold is None or (folds or {})[case] == fold}
        results = []
        for key in chosen:
            old, new = ({c: v for c, v in t.values[key].items() if c in cases} for t in (baseline, system))
            better = find_metric(key[1]).better
            assert better is not None, "neutral metrics are not chosen"
            results.append(compare(old, new, better, seed, n_losses))
        wilcoxon, t = holm([r.p_wilcoxon for r in results]), holm([r.p_t for r in results])
        for (label, name), result, *adjusted in zip(chosen, results, wilcoxon, t, strict=True):
            kind = find_metric(name)
            rows.append(Row(system.name, fold, label, name, kind.unit, str(kind.better), result, *adjusted))
    return rows


def _write(folder: Path, rows: Sequence[Row], baseline: MetricsTable, files: Mapping[str, Path], seed: int) -> None:
    content: dict[str, Any] = {
        "baseline": baseline.name,
        "systems": {name: str(file) for name, file in files.items()},
        "n_cases": len(baseline.cases),
        "difference": "system minus baseline",
        "tests": "one-sided, paired; alternative: the system is better than the baseline",
        "bootstrap": {"method": "BCa", "confidence": CONFIDENCE, "resamples": RESAMPLES, "seed": seed},
        "holm": "over labels and metrics of one system and fold",
        "evaluation_settings": baseline.settings,
        "rows": [asdict(row) for row in rows],
    }
    write_atomically(folder / "comparison.json", json.dumps(content, indent=2, allow_nan=False) + "\n")
    write_atomically(folder / "comparison.tex", latex(rows, baseline.name))
    write_atomically(folder / "comparison.md", markdown(rows, baseline.name, len(baseline.cases)))
