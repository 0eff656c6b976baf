"""``nnUNetv2_diffrefine evaluate`` of a fold's validation, beside nnU-Net's ``summary.json``."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import Any

from nnunetv2.configuration import default_num_processes
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_diffrefine.evaluation.run import evaluate_folders

PROCESSES = 4
"""At most: a surface needs several times the memory of its mask, and the network still occupies its own."""
CASES_A_PROCESS = 4
"""At least: starting a process takes as long as a few cases."""
LOGGED = ("Dice", "HD95", "NSD")


def evaluate_validation(trainer: nnUNetTrainer) -> None:
    """Write ``metrics.csv`` and ``metrics.json`` into the fold's validation folder; on the first rank only.

    The training is finished and its validation written, so nothing that goes wrong here is raised: a warning names the
    command to run by hand.
    """
    if trainer.local_rank != 0:
        return
    data, predictions = Path(trainer.preprocessed_dataset_folder_base), Path(trainer.output_folder) / "validation"
    references, dataset_json = data / "gt_segmentations", data / "dataset.json"
    cases = sum((predictions / file.name).is_file() for file in references.glob("*"))
    processes = max(1, min(PROCESSES, default_num_processes, cases // CASES_A_PROCESS))
    try:
        content = evaluate_folders(references, predictions, dataset_json, predictions, processes=processes, chill=True)
        trainer.print_to_log_file(f"{_means(content)}; {predictions / 'metrics.csv'}")
    except Exception as error:  # whatever it is
        trainer.print_to_log_file(
            f"WARNING: the validation is complete, but metrics.csv could not be written: {error}\n"
            f"Try again with\n  nnUNetv2_diffrefine evaluate {references} {predictions} -djfile {dataset_json} --chill"
        )


def _means(content: dict[str, Any]) -> str:
    """Mean over the classes of their means over the cases."""
    found = []
    for name, kind in content["metrics"].items():
        if name.split("@")[0] in LOGGED:
            values = [means[name]["mean"] for means in content["summary"].values() if means[name]["mean"] is not None]
            unit = "" if kind["unit"] == "1" else f" {kind['unit']}"
            found.append(f"{name} {fmean(values):.4g}{unit}" if values else f"{name} none")
    return f"Mean over the classes: {', '.join(found)}"
