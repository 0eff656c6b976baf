"""Two folders of label maps to ``metrics.csv`` and ``metrics.json``."""

from __future__ import annotations

import csv
import io
import json
import math
import multiprocessing
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tqdm import tqdm

from nnunet_diffrefine import __version__
from nnunet_diffrefine.evaluation.case_metrics import CaseResult, Settings, evaluate_case
from nnunet_diffrefine.evaluation.cases import Case, pair_cases
from nnunet_diffrefine.evaluation.classes import Classes, read_classes
from nnunet_diffrefine.evaluation.definitions import metrics
from nnunet_diffrefine.evaluation.files import writable_folder, write_atomically
from nnunet_diffrefine.evaluation.policy import POLICIES, Emptiness

COLUMNS = ("case", "label", "metric", "value", "unit")
LIBRARIES = ("SimpleITK", "numpy", "scipy", "surface-distance")
Row = tuple[str, str, str, float, str]


def evaluate_folders(
    reference_folder: Path,
    prediction_folder: Path,
    dataset_json: Path,
    output_folder: Path,
    settings: Settings | None = None,
    processes: int = 1,
    chill: bool = False,
) -> dict[str, Any]:
    """Evaluate every prediction and write ``metrics.csv`` and ``metrics.json``; returns the content of the latter.

    Args:
        reference_folder: label maps, one a case; files of another ending are skipped.
        prediction_folder: label maps of the same names.
        dataset_json: nnU-Net's, for labels or regions, ignore label and file ending.
        output_folder: created if need be; both files are replaced whole, and only once all cases are done.
        settings: tolerances, empty policy, lesion rule.
        processes: cases evaluated at once; 1 stays in this process.
        chill: allow references without a prediction.

    Raises:
        ValueError: bad input; the message says which file or argument.
        OSError: a folder is missing or not writable.
        RuntimeError: a worker process was killed.
    """
    settings = settings or Settings()
    if processes < 1:
        raise ValueError(f"-np is {processes}; wanted at least 1.")
    classes = read_classes(dataset_json)
    pairing = pair_cases(reference_folder, prediction_folder, classes.file_ending, chill)
    folder = writable_folder(output_folder)
    results = _evaluate(pairing.cases, classes, settings, processes)
    rows = table(results, settings)
    content = {
        **_description(classes, settings),
        "empty": _empty(results, settings),
        "cases": {case.name: {"spacing_mm": [*case.header.spacing]} for case in pairing.cases},
        "references_without_prediction": [*pairing.without_prediction],
        "summary": _summary(rows),
    }
    write_atomically(folder / "metrics.json", json.dumps(content, indent=2, allow_nan=False) + "\n")
    write_atomically(folder / "metrics.csv", _csv(rows))
    return content


def table(results: Sequence[CaseResult], settings: Settings) -> list[Row]:
    """One row for every case, class and metric, in that order, whatever the values."""
    kinds = metrics(settings.tolerances)
    return [
        (result.name, label, kind.name, float(values[kind.name]), kind.unit)
        for result in results
        for label, values in result.values.items()
        for kind in kinds
    ]


def _evaluate(cases: Sequence[Case], classes: Classes, settings: Settings, processes: int) -> list[CaseResult]:
    """The results in the order of the cases; the first error ends the run."""
    bar = {"total": len(cases), "desc": "evaluate", "unit": "case", "disable": None}  # no bar in log files
    if processes == 1:
        return [evaluate_case(case, classes, settings) for case in tqdm(cases, **bar)]
    # spawn, as nnU-Net does: it behaves alike on all systems
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(processes, len(cases)), mp_context=context)
    try:
        futures = [pool.submit(evaluate_case, case, classes, settings) for case in cases]
        for future in tqdm(as_completed(futures), **bar):
            future.result()
        return [future.result() for future in futures]
    except BrokenProcessPool as error:
        raise RuntimeError("A worker process was killed, most likely for memory; use fewer with -np.") from error
    finally:
        pool.shutdown(cancel_futures=True)


def _csv(rows: Sequence[Row]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows((*row[:3], "" if math.isnan(row[3]) else repr(row[3]), row[4]) for row in rows)
    return text.getvalue()


def _description(classes: Classes, settings: Settings) -> dict[str, Any]:
    """What is needed to read the numbers, and to refuse comparing them with others."""
    return {
        "versions": {"nnunet-diffrefine": __version__, **{name: version(name) for name in LIBRARIES}},
        "settings": {
            "classes": {c.name: [*c.values] for c in classes.evaluated},
            "ignore_label": classes.ignore,
            "tolerances_mm": [*settings.tolerances],
            "empty_policy": settings.policy,
            "lesion_rule": {"name": "BraTS 2023", **asdict(settings.lesions)},
        },
        "metrics": {
            kind.name: {"unit": kind.unit, "better": kind.better, "definition": kind.definition}
            for kind in metrics(settings.tolerances)
        },
    }


def _empty(results: Sequence[CaseResult], settings: Settings) -> dict[str, Any]:
    """The policy, and how many cases of each class it was applied to."""
    kinds: dict[Emptiness, str] = {
        "both": "both_empty",
        "reference": "only_reference_empty",
        "prediction": "only_prediction_empty",
    }
    labels = results[0].empty if results else {}
    counts = {label: Counter(result.empty[label] for result in results) for label in labels}
    return {
        "policy": settings.policy,
        "text": POLICIES[settings.policy].text,
        "counts": {label: {name: count[kind] for kind, name in kinds.items()} for label, count in counts.items()},
    }


def _summary(rows: Sequence[Row]) -> dict[str, dict[str, dict[str, float | int | None]]]:
    """Mean over the cases with a value, their number, and the number without, by label and metric."""
    values: dict[str, dict[str, list[float]]] = {}
    for _, label, metric, value, _ in rows:
        values.setdefault(label, {}).setdefault(metric, []).append(value)
    return {label: {metric: _mean(given) for metric, given in found.items()} for label, found in values.items()}


def _mean(values: list[float]) -> dict[str, float | int | None]:
    defined = [value for value in values if not math.isnan(value)]
    mean = math.fsum(defined) / len(defined) if defined else None
    return {"mean": mean, "n": len(defined), "n_without_value": len(values) - len(defined)}
