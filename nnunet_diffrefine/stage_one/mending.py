"""The commands that error messages of this package name: what mends a missing, stale or broken export."""

from __future__ import annotations

from collections.abc import Iterable

from nnunet_diffrefine.paths import StageOneId

FIRST = 5


def export_command(dataset: str, stage_one: StageOneId, folds: Iterable[int | str] = ()) -> str:
    """The command line that exports ``folds`` of a stage one (all folds when none is given)."""
    line = (
        f"nnUNetv2_diffrefine export -d {dataset} -c {stage_one.configuration} -tr {stage_one.trainer} "
        f"-p {stage_one.plans}"
    )
    chosen = " ".join(map(str, folds))
    return f"{line} -f {chosen}" if chosen else line


def train_commands(dataset: str, stage_one: StageOneId, folds: Iterable[int | str]) -> str:
    """The command lines that train ``folds`` of a stage one, joined by ``;``."""
    tail = f"-tr {stage_one.trainer} -p {stage_one.plans}"
    return "; ".join(f"nnUNetv2_train {dataset} {stage_one.configuration} {fold} {tail}" for fold in folds)


def listed(names: Iterable[object]) -> str:
    """``a, b, c`` for an error message: sorted, the first five and the total."""
    ordered = sorted(map(str, names))
    shown = ", ".join(ordered[:FIRST])
    return shown if len(ordered) <= FIRST else f"{shown}, ... ({len(ordered)} in all)"
