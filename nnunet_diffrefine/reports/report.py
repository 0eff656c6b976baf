"""The report: checks what is given, measures, draws, and writes ``report.html`` and ``figures/``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from nnunet_diffrefine.evaluation.files import writable_folder, write_atomically
from nnunet_diffrefine.reports import figures, page
from nnunet_diffrefine.reports.compare import chosen_metrics, compare_tables
from nnunet_diffrefine.reports.metrics_table import MetricsTable, read_metrics, refuse_unpaired
from nnunet_diffrefine.reports.pictures import panels
from nnunet_diffrefine.reports.reliability import MAP, measure
from nnunet_diffrefine.reports.selection import choose, dice_change, mean_dice, read_review
from nnunet_diffrefine.reports.sizes import size_groups
from nnunet_diffrefine.reports.slices import read_slice
from nnunet_diffrefine.reports.svg import Drawing, inline, save_row
from nnunet_diffrefine.reports.volumes import Folders, Volumes, find_volumes

CHARTED = ("Dice", "HD95")
PICTURES = ("-i", "-gt", "-s", "-r", "-djfile")
RELIABILITY = ("-gt", "-s", "-djfile")


@dataclass(frozen=True)
class Request:
    """What to report.

    Args:
        files: ``metrics.csv`` of two systems by name, the baseline first.
        output: folder of ``report.html`` and ``figures/``, created if need be.
        folders: by command-line option, ``-i -gt -s -r --error_maps --uncertainty`` and the file ``-djfile``.
        qc: table with predicted Dice and need of review, or None.
        n_cases: cases in pictures, of each kind.
        metrics: of the summary; all that have a better direction if None.
        seed: of the bootstrap.
    """

    files: Mapping[str, Path]
    output: Path
    folders: Mapping[str, Path] = field(default_factory=dict)
    qc: Path | None = None
    n_cases: int = 1
    metrics: Sequence[str] | None = None
    seed: int = 0


def write_report(request: Request) -> Path:
    """Write the report and return its path.

    Raises:
        ValueError: bad input; the message says which argument or file.
        OSError: a file or folder is missing, or the output cannot be written.
    """
    baseline, system = _tables(request)
    chosen = chosen_metrics(baseline, request.metrics)
    folders = _folders(request.folders)
    volumes = None if folders is None else find_volumes(folders, baseline.cases)
    review = None if request.qc is None else read_review(request.qc, baseline.cases)
    reasons = {}
    if folders is not None and folders.pictures:
        reasons = choose(dice_change(baseline, system), mean_dice(system), review, request.n_cases)
    folder = writable_folder(request.output)
    drawn = writable_folder(folder / "figures")
    summary = compare_tables(baseline, system, chosen, None, request.seed, 0)
    cases = page.case_rows(baseline, system, CHARTED, list(reasons), None if review is None else review.dice)
    content = {
        **page.head(baseline, system, summary, {name: str(file) for name, file in request.files.items()}),
        **page.case_table(baseline, system, CHARTED, cases),
        **_charts(baseline, system, cases, request.seed, drawn),
        **_reliability(volumes if folders is not None and folders.error_maps else None, request.seed, drawn),
        **_pictures(baseline, system, volumes, reasons, drawn),
        "seed": request.seed,
    }
    file = folder / "report.html"
    write_atomically(file, page.render(content))
    return file


def _tables(request: Request) -> tuple[MetricsTable, MetricsTable]:
    if len(request.files) != 2:
        given = ", ".join(request.files) or "none"
        raise ValueError(f"Given {len(request.files)} system(s), {given}; wanted two NAME=FILE, the baseline first.")
    if request.n_cases < 1:
        raise ValueError(f"--cases is {request.n_cases}; wanted 1 or more.")
    baseline, system = (read_metrics(name, file) for name, file in request.files.items())
    refuse_unpaired(baseline, system)
    present = {metric for _, metric in baseline.values}
    if missing := [metric for metric in CHARTED if metric not in present]:
        raise ValueError(
            f"The tables lack {' and '.join(missing)}; wanted metrics.csv of nnUNetv2_diffrefine evaluate."
        )
    return baseline, system


def _folders(given: Mapping[str, Path]) -> Folders | None:
    """The folders, if enough are given for pictures or for the reliability of error maps."""
    if not given:
        return None
    wanted: tuple[str, ...] = PICTURES
    purpose = "pictures"
    if "--error_maps" in given and not given.keys() & {"-i", "-r"}:
        wanted, purpose = RELIABILITY, "the reliability of error maps"
    if missing := [option for option in wanted if option not in given]:
        raise ValueError(
            f"Given {', '.join(given)}; {purpose} also need{'s' if purpose[0] == 't' else ''} {', '.join(missing)}. "
            "Without any folder the report has tables and charts only."
        )
    return Folders(
        references=given["-gt"],
        stage_one=given["-s"],
        dataset_json=given["-djfile"],
        images=given.get("-i"),
        refined=given.get("-r"),
        error_maps=given.get("--error_maps"),
        uncertainty=given.get("--uncertainty"),
    )


def _charts(
    baseline: MetricsTable, system: MetricsTable, cases: Sequence[page.CaseRow], seed: int, folder: Path
) -> dict[str, object]:
    rows = {(row.case, row.label): row.target for row in cases}
    labels = list(dict.fromkeys(row.label for row in cases))
    groups = size_groups(baseline, system, CHARTED, seed)
    scatter, sizes = [], []
    for metric in CHARTED:
        drawings = [figures.case_scatter(baseline, system, label, metric, rows) for label in labels]
        scatter.append(_publish(drawings, folder, f"cases_{metric}"))
        own = [[g for g in groups if g.label == label] for label in dict.fromkeys(g.label for g in groups)]
        drawings = [figures.size_chart(baseline, system, found, metric, rows) for found in own]
        sizes.append(_publish(drawings, folder, f"sizes_{metric}"))
    return {"scatter": scatter, "sizes": sizes, "size_table": page.size_rows(groups, CHARTED)}


def _reliability(volumes: Volumes | None, seed: int, folder: Path) -> dict[str, object]:
    if volumes is None:
        return {"reliability": None}
    found = measure(volumes)
    if not found[MAP].band.n.sum():
        return {"reliability": page.reliability(found), "reliability_charts": []}
    drawings = [figures.reliability_chart(found, seed), figures.count_chart(found[MAP])]
    return {"reliability": page.reliability(found), "reliability_charts": _publish(drawings, folder, "reliability")}


def _pictures(
    baseline: MetricsTable,
    system: MetricsTable,
    volumes: Volumes | None,
    reasons: Mapping[str, Sequence[str]],
    folder: Path,
) -> dict[str, object]:
    if volumes is None or not reasons:
        return {"pictures": [], "classes": []}
    shown = []
    for number, (case, why) in enumerate(tqdm(reasons.items(), desc="pictures", unit="case"), start=1):
        found = read_slice(volumes.cases[case], volumes)
        drawings = panels(found, baseline.name, system.name)
        svgs = _publish(drawings, folder, f"case_{number:02d}", columns=len(drawings))
        shown.append(page.picture(number, case, why, found, svgs, baseline, system))
    return {"pictures": shown, "classes": page.class_legend(shown[0].labels)}


def _publish(drawings: Sequence[Drawing], folder: Path, name: str, columns: int = 4) -> list[page.Chart]:
    """Write the drawings as one file and return them for the page."""
    if not drawings:
        return []
    save_row(drawings, folder / name, columns)
    ids = [f"{name.replace('_', '-')}-{i}" for i in range(len(drawings))]
    return [page.Chart(drawing.title, inline(drawing, i)) for drawing, i in zip(drawings, ids, strict=True)]
