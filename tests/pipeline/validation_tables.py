"""Both tables of a fold's validation: nnU-Net's ``summary.json`` and our ``metrics.csv``."""

import csv
import json
from pathlib import Path

import numpy as np


def assert_same_dice(model: Path, fold: int = 0) -> None:
    """Dice of every case and class are the same; where both masks are empty there is none in either."""
    folder = model / f"fold_{fold}" / "validation"
    summary = json.loads((folder / "summary.json").read_text())["metric_per_case"]
    with (folder / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["metric"] == "Dice"]
    assert len(summary) > 1
    for case in summary:
        name = Path(case["prediction_file"]).name.removesuffix(".nii.gz")
        ours = [float(row["value"] or "nan") for row in rows if row["case"] == name]
        theirs = [values["Dice"] for values in case["metrics"].values()]
        np.testing.assert_allclose(ours, theirs, rtol=1e-12)
    (log,) = folder.parent.glob("training_log_*.txt")
    assert "Mean over the classes: Dice " in log.read_text()
    content = json.loads((folder / "metrics.json").read_text())
    assert sorted(content["cases"]) == sorted({row["case"] for row in rows})
