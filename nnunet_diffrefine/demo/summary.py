"""The demo's result: a table of Dice per class, and one figure of the case that shows the most."""

from __future__ import annotations

import json
import os
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np
import SimpleITK as sitk

from nnunet_diffrefine.demo.pipeline import FOLDS, REFINER, STAGE_ONE, Demo

Scores = dict[str, dict[str, float]]


def dice_per_case(demo: Demo, trainer: str) -> Scores:
    """Dice in [0, 1] of every cross-validation case and class, ``{case: {class: Dice}}``, as nnU-Net computed it."""
    names = _class_names(demo)
    scores: Scores = {}
    for fold in range(FOLDS):
        summary = json.loads((demo.model(trainer) / f"fold_{fold}" / "validation" / "summary.json").read_text())
        for case in summary["metric_per_case"]:
            name = Path(case["prediction_file"]).name.split(".")[0]
            scores[name] = {names[label]: values["Dice"] for label, values in case["metrics"].items()}
    return scores


def _class_names(demo: Demo) -> dict[str, str]:
    labels = json.loads((demo.raw / "dataset.json").read_text())["labels"]
    return {str(tuple(v) if isinstance(v, list) else v): name.replace("_", " ") for name, v in labels.items()}


def table(demo: Demo) -> str:
    """Markdown table: mean Dice in % over the held-out cases, stage one and refined, per class."""
    before, after = dice_per_case(demo, STAGE_ONE), dice_per_case(demo, REFINER)
    classes = list(next(iter(before.values())))
    lines = ["| Dice, % | stage one | refined | change |", "| --- | ---: | ---: | ---: |"]
    means = []
    for name in classes:
        old, new = (100 * np.nanmean([case[name] for case in scores.values()]) for scores in (before, after))
        means.append((old, new))
        lines.append(f"| {name} | {old:.2f} | {new:.2f} | {new - old:+.2f} |")
    old, new = np.mean(means, 0)
    lines.append(f"| **mean** | **{old:.2f}** | **{new:.2f}** | **{new - old:+.2f}** |")
    return "\n".join(lines) + f"\n\n{len(before)} held-out cases, {FOLDS}-fold cross-validation.\n"


def figure(demo: Demo) -> Path:
    """Draw image, reference, stage one, refined and the errors of both for the most improved case."""
    before, after = dice_per_case(demo, STAGE_ONE), dice_per_case(demo, REFINER)
    change = {case: np.nanmean([*after[case].values()]) - np.nanmean([*before[case].values()]) for case in before}
    case = max(change, key=lambda name: change[name])
    ending = json.loads((demo.raw / "dataset.json").read_text())["file_ending"]
    reference = _read(demo.raw / "labelsTr" / f"{case}{ending}")
    old, new = (_validation(demo, trainer, f"{case}{ending}") for trainer in (STAGE_ONE, REFINER))
    images = [_read(f) for f in sorted((demo.raw / "imagesTr").glob(f"{case}_????{ending}"))]
    channel = [*json.loads((demo.raw / "dataset.json").read_text())["channel_names"].values()]
    z = int(np.argmax(((old != reference) ^ (new != reference)).sum((1, 2))))
    shown = images[-1][z]
    panels = [(channel[-1], shown, None), ("reference", shown, reference[z]), ("stage one", shown, old[z])]
    panels += [("refined", shown, new[z]), ("errors of stage one", shown, old[z] != reference[z])]
    panels += [("errors after refinement", shown, new[z] != reference[z])]
    return _draw(panels, f"{case}: mean Dice {change[case]:+.3f}", demo.folder / "demo.png")


def _draw(panels: list, title: str, file: Path) -> Path:
    drawing, axes = plt.subplots(1, len(panels), figsize=(3 * len(panels), 3.4), layout="constrained")
    for axis, (name, image, mask) in zip(axes, panels, strict=True):
        axis.imshow(image, cmap="gray", origin="lower")
        if mask is not None:
            errors = name.startswith("errors")
            shown = np.ma.masked_equal(mask.astype(int), 0)
            axis.imshow(
                shown,
                cmap="autumn" if errors else "viridis",
                alpha=0.55,
                origin="lower",
                vmin=1,
                vmax=2 if errors else 3,
                interpolation="nearest",
            )
        axis.set_title(name)
        axis.axis("off")
    drawing.suptitle(title)
    temporary = file.with_name(f"{file.stem}.tmp.png")
    drawing.savefig(temporary, dpi=110)
    plt.close(drawing)
    os.replace(temporary, file)
    return file


def _read(file: Path) -> np.ndarray:
    return sitk.GetArrayFromImage(sitk.ReadImage(str(file)))


def _validation(demo: Demo, trainer: str, name: str) -> np.ndarray:
    files = [demo.model(trainer) / f"fold_{fold}" / "validation" / name for fold in range(FOLDS)]
    return _read(next(file for file in files if file.is_file()))
