"""The record of a calibration as text."""

from __future__ import annotations

from collections.abc import Sequence

from nnunet_diffrefine.calibration.measure import NOTHING
from nnunet_diffrefine.calibration.record import Record


def shown(record: Record) -> str:
    """Tables of the gate, the error map and predicted Dice, in plain text."""
    return "\n\n".join((_gate(record), _error_map(record), _dice(record), _rest(record)))


def _gate(record: Record) -> str:
    rows = [("class", "stage one", "refined", "difference [95 % interval]", "better", "worse", "decision")]
    for name, c in record.classes.items():
        interval = "not defined" if c.interval is None else f"{100 * c.interval[0]:+.2f} to {100 * c.interval[1]:+.2f}"
        difference = f"{100 * c.difference:+.2f} [{interval}]"
        decision = f"{c.decision} ({c.by}{f', offset {c.offset:+g}' if c.offset else ''})"
        counts = (str(c.better), str(c.worse))
        rows.append((name, f"{100 * c.stage_one:.2f}", f"{100 * c.refined:.2f}", difference, *counts, decision))
    return f"Dice in %, {record.cases} out-of-fold cases of fold(s) {_listed(record.folds)}\n{_aligned(rows)}"


def _error_map(record: Record) -> str:
    rows: list[tuple[str, ...]] = [("error map", "log loss", "Brier", "AUROC", "in doubt", "calibration error", "")]
    for name, s in record.error_map.scores.items():
        aurocs = ["-" if x is None else f"{x:.4f}" for x in (s.auroc, s.auroc_doubt)]
        ships = "ships" if name == record.error_map.source else ""
        rows.append((name, f"{s.log_loss:.4f}", f"{s.brier:.4f}", *aurocs, f"{s.ece:.4f}", ships))
    return f"Finding stage one's errors in the doubtful region, cross-fitted\n{_aligned(rows)}"


def _dice(record: Record) -> str:
    rows = [("predicted Dice", "class", "Spearman", "mean abs. error", "before the linear map", "")]
    for source, classes in record.dice.scores.items():
        ships = "ships" if source == record.dice.source else ""
        for name, s in classes.items():
            rank = "-" if s.spearman is None else f"{s.spearman:+.3f}"
            before = "-" if source == NOTHING else f"{s.mae_before:.4f}"
            rows.append((source, name, rank, f"{s.mae:.4f}", before, ships))
    return f"Predicted against true Dice of the result, cross-fitted\n{_aligned(rows)}"


def _rest(record: Record) -> str:
    recall, o = record.recall, record.offsets
    share = "no errors" if recall.share is None else f"{100 * recall.share:.2f} % of {recall.wrong} wrong voxels"
    lines = [f"Recall of the doubtful region: {share}."]
    if o.gain is not None:
        interval = "" if o.interval is None else f" [{100 * o.interval[0]:+.2f} to {100 * o.interval[1]:+.2f}]"
        used = "used" if o.used else "not used"
        best = ", ".join(f"{name} {x:+g}" for name, x in zip(record.classes, o.best, strict=True))
        lines.append(f"Offsets ({best}) gain {100 * o.gain:+.2f}{interval} % Dice, cross-fitted: {used}.")
    return "\n".join(lines)


def _aligned(rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def _listed(folds: list[int]) -> str:
    return " ".join(map(str, folds))
