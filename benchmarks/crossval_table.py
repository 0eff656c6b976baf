r"""Compare systems on the validation cases of one or more folds: Dice and HD95 per class, against stage one.

python benchmarks/crossval_table.py -d 4 -p nnUNetPlansSmall -f 0 1 --stage_one nnUNetTrainer_bench1200 \
    refined=DiffRefineTrainer_bench1200 second=nnUNetTrainer_bench1200_second \
    "stage one + second=nnUNetTrainer_bench1200+nnUNetTrainer_bench1200_second" -o docs/results/hippocampus.json

A system is NAME=MODEL, or NAME=MODEL+MODEL for the mean of their probabilities (nnU-Net's ensembling), a model being
TRAINER, TRAINER@PLANS or TRAINER@PLANS@CONFIGURATION; all need validation probabilities (nnUNetv2_train --npz).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from metrics import change_quality, dice, hd95
from nnunetv2.paths import nnUNet_preprocessed, nnUNet_results
from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name
from scipy.stats import wilcoxon
from tqdm import tqdm


class CrossValidation:
    """Validation predictions of the trainers of one dataset and plans."""

    def __init__(self, dataset: str, plans: str, folds: list[int]) -> None:
        self.results = Path(nnUNet_results.get()) / dataset
        self.references = Path(nnUNet_preprocessed.get()) / dataset / "gt_segmentations"
        splits = json.loads((self.references.parent / "splits_final.json").read_text())
        self.plans = plans
        self.cases = [(fold, case) for fold in folds for case in splits[fold]["val"]]
        labels = json.loads((self.references.parent / "dataset.json").read_text())["labels"]
        self.names = [name for name in labels if name not in ("background", "ignore")]
        self.groups = [np.atleast_1d(labels[name]) for name in self.names]
        self.regions = any(isinstance(value, list) for value in labels.values())

    def masks(self, models: str, fold: int, case: str) -> np.ndarray:
        """Masks (R, D, H, W) of the mean probabilities of one or more models joined by ``+``."""
        mean = np.mean([self._probabilities(model, fold, case) for model in models.split("+")], 0)
        return mean > 0.5 if self.regions else mean.argmax(0) == np.concatenate(self.groups)[:, None, None, None]

    def _probabilities(self, model: str, fold: int, case: str) -> np.ndarray:
        file = self.folder(model, fold) / "validation" / f"{case}.npz"
        return np.load(file)["probabilities"].astype(np.float32)

    def parts(self, model: str) -> list[str]:
        """Trainer, plans and configuration of TRAINER, TRAINER@PLANS or TRAINER@PLANS@CONFIGURATION."""
        return [*model.split("@"), *(self.plans, "3d_fullres")[model.count("@") :]]

    def folder(self, model: str, fold: int) -> Path:
        """Fold folder of a model."""
        return self.results / "__".join(self.parts(model)) / f"fold_{fold}"

    def reference(self, case: str) -> tuple[np.ndarray, tuple[float, ...]]:
        """Reference masks (R, D, H, W) and spacing (z, y, x) in mm."""
        image = sitk.ReadImage(str(next(self.references.glob(f"{case}.*"))))
        labels = sitk.GetArrayFromImage(image)
        return np.stack([np.isin(labels, group) for group in self.groups]), image.GetSpacing()[::-1]


def score(run: CrossValidation, systems: dict[str, str], stage_one: str) -> dict:
    """Per system, case and class: Dice, HD95; per system and case: quality of the change."""
    rows: dict = {name: {"dice": [], "hd95": [], "change": []} for name in systems}
    for fold, case in tqdm(run.cases):
        reference, spacing = run.reference(case)
        before = run.masks(stage_one, fold, case)
        for name, trainers in systems.items():
            masks = run.masks(trainers, fold, case)
            pairs = list(zip(masks, reference, strict=True))
            rows[name]["dice"].append([dice(p, r) for p, r in pairs])
            rows[name]["hd95"].append([hd95(p, r, spacing) for p, r in pairs])
            rows[name]["change"].append(change_quality(before, masks, reference))
    return rows


def table(rows: dict, classes: list[str], baseline: str) -> str:
    """Markdown: mean and standard deviation over cases; paired Wilcoxon of the class mean against the baseline.

    Empty masks: see :func:`metrics.dice` and :func:`metrics.hd95`.
    """
    head = ["system", *(f"Dice {c}" for c in classes), "Dice mean", *(f"HD95 {c}" for c in classes), "HD95 mean"]
    head += ["better / worse", "p", "flip precision", "error Dice"]
    lines = ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1)]
    base = np.nanmean(rows[baseline]["dice"], 1)
    for name, values in rows.items():
        scores, distances = 100 * np.array(values["dice"]), np.array(values["hd95"])
        cells = [f"{m:.2f} ± {s:.2f}" for m, s in zip(np.nanmean(scores, 0), np.nanstd(scores, 0), strict=True)]
        cells.append(f"**{np.nanmean(scores):.2f}**")
        cells += [f"{m:.3f} ± {s:.3f}" for m, s in zip(np.nanmean(distances, 0), np.nanstd(distances, 0), strict=True)]
        cells.append(f"**{np.nanmean(distances):.3f}**")
        difference = np.nanmean(values["dice"], 1) - base
        if np.any(difference):
            cells += [f"{(difference > 0).sum()} / {(difference < 0).sum()}", f"{wilcoxon(difference).pvalue:.2g}"]
            change = [np.nanmean([case[key] for case in values["change"]]) for key in ("flip_precision", "error_dice")]
            cells += [f"{value:.3f}" for value in change]
        else:
            cells += ["-"] * 4
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Read the arguments, score, print the table and write the scores."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("systems", nargs="+", help="NAME=TRAINER or NAME=TRAINER+TRAINER")
    parser.add_argument("-d", required=True)
    parser.add_argument("-p", default="nnUNetPlans")
    parser.add_argument("-f", type=int, nargs="+", default=[0])
    parser.add_argument("--stage_one", required=True, help="trainer of stage one, the baseline")
    parser.add_argument("-o", type=Path, help="JSON file for the scores of every case")
    args = parser.parse_args()
    run = CrossValidation(maybe_convert_to_dataset_name(args.d), args.p, args.f)
    systems = {"stage one": args.stage_one, **dict(pair.split("=", 1) for pair in args.systems)}
    rows = score(run, systems, args.stage_one)
    print(table(rows, run.names, "stage one"))
    if args.o:
        args.o.write_text(json.dumps({"cases": run.cases, "classes": run.names, "systems": systems, "scores": rows}))


if __name__ == "__main__":
    main()
