"""What a refiner's fold was trained from, as its checkpoint records it: only with the same may it go on or be measured.

Fingerprints and no names: checkpoints are given away. Checkpoints of earlier versions have none, which means unknown.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

from nnunet_diffrefine.paths import StageOneId, fold_folder, splits_file
from nnunet_diffrefine.stage_one.fingerprint import splits_sha256
from nnunet_diffrefine.stage_one.manifest import Manifest
from nnunet_diffrefine.stage_one.mending import listed, train_commands
from nnunet_diffrefine.stage_one.splits import LeakError, Splits

ORIGIN = "origin"
"""Entry of a checkpoint's ``diffrefine`` part."""


def origin_of(manifest: Manifest, splits: Splits, fold: int) -> dict[str, str]:
    """SHA-256 of the exported stage-one checkpoint of a fold, and of the fold's split."""
    return {"stage_one": manifest.folds[fold].sha256, "split": splits_sha256([splits[fold]])}


def check_origin(
    recorded: Mapping[str, str], present: Mapping[str, str], dataset: str, refiner: StageOneId, fold: int
) -> None:
    """Refuse a fold that was trained from something else than there is now; what was not recorded is not compared.

    Args:
        recorded: of the checkpoint, as :func:`origin_of` gives it, or a part of it.
        present: what there is.
        dataset: full dataset name.
        refiner: of the checkpoint.
        fold: of the checkpoint.

    Raises:
        LeakError: the fold's split changed.
        RuntimeError: its stage one did.
    """
    changed = [key for key, value in present.items() if recorded.get(key, value) != value]
    if "split" in changed:
        raise LeakError(
            f"Fold {fold} of {refiner.name} was trained with other cases than {splits_file(dataset)} now gives it, so "
            f"it may have seen those it would be measured on. {_mend(dataset, refiner, fold)}"
        )
    if changed:
        raise RuntimeError(
            f"Fold {fold} of {refiner.name} contains another stage one than the one of fold {fold} that is exported "
            f"now. {_mend(dataset, refiner, fold)}"
        )


def check_validated(summary: Path, ending: str, cases: list[str], dataset: str, refiner: StageOneId, fold: int) -> None:
    """Refuse cases that are not among those of nnU-Net's validation of a fold, where that has run.

    Args:
        summary: the fold's ``validation/summary.json``.
        ending: of image files, e.g. ``.nii.gz``.
        cases: that the fold must not have seen.
        dataset: full dataset name.
        refiner: the trained model.
        fold: of it.

    Raises:
        LeakError: some are not.
    """
    try:
        entries = json.loads(summary.read_text(encoding="utf-8"))["metric_per_case"]
        held_out = {re.split(r"[/\\]", entry["prediction_file"])[-1].removesuffix(ending) for entry in entries}
    except (OSError, ValueError, KeyError, TypeError):
        return
    if strangers := set(cases) - held_out:
        raise LeakError(
            f"Fold {fold} of {refiner.name} may have trained on {listed(strangers)}: {splits_file(dataset)} was "
            f"changed after its training. {_mend(dataset, refiner, fold)}"
        )


def _mend(dataset: str, refiner: StageOneId, fold: int) -> str:
    return (
        f"Train this fold anew in a folder without checkpoints (move {fold_folder(dataset, refiner, fold)} away): "
        f"{train_commands(dataset, refiner, [fold])}; or restore the export, stage one's checkpoints and the splits."
    )
