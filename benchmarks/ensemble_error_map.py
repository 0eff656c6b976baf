r"""Which map finds the errors of a fold ensemble, on cases that no fold has seen.

python benchmarks/ensemble_error_map.py -gt labelsTs -s ENSEMBLE --folds FOLD_0 FOLD_1 FOLD_2 FOLD_3 FOLD_4 \
    --applied APPLIED -djfile dataset.json

ENSEMBLE and FOLD_k are nnUNetv2_predict --save_probabilities of all folds and of one each, APPLIED is
nnUNetv2_diffrefine apply --save_error_map [--save_uncertainty] on ENSEMBLE. Compared in the region that apply refines:
the ensemble's own confidence, as it is and temperature-scaled; the spread of its folds; apply's error map, as it is;
and the spread of the refiner's folds. What has to be fitted (scaled confidence, spreads) is fitted on every other case,
so it has the advantage of this very data; apply's map has only seen the cross-validation. Label datasets.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk
import torch
from scipy.optimize import minimize
from tqdm import tqdm

from nnunet_diffrefine.batch import Foreground
from nnunet_diffrefine.calibration.agreement import error_scores
from nnunet_diffrefine.inference.region import RegionSettings, doubtful_region

SMALL = 1e-4


@dataclass(frozen=True)
class Case:
    """Values in a case's doubtful region: whether the ensemble is wrong, and what each source says (name -> (N,))."""

    wrong: np.ndarray
    sources: dict[str, np.ndarray]
    outside: int


def read(file: Path) -> np.ndarray:
    """Voxels of an image file."""
    return sitk.GetArrayFromImage(sitk.ReadImage(str(file)))


def probabilities(folder: Path, name: str) -> np.ndarray:
    """nnU-Net's (H, D, H, W) of a case."""
    return np.load(folder / f"{name}.npz")["probabilities"].astype(np.float32)


def load(args: argparse.Namespace, name: str, ending: str, foreground: Foreground) -> Case:
    """One case."""
    p = probabilities(args.s, name)
    region = doubtful_region(torch.from_numpy(p[1:]), foreground, RegionSettings()).numpy()
    decided = p.argmax(0)
    wrong = decided != read(args.gt / f"{name}{ending}")
    folds = np.stack([probabilities(folder, name) for folder in args.folds])
    maps = {
        "ensemble": 1 - p.max(0),
        "spread of the ensemble": folds.std(0).max(0),
        "apply's error map": read(args.applied / "error_map" / f"{name}{ending}"),
    }
    if (args.applied / "uncertainty").is_dir():
        maps["spread of the refiner"] = read(args.applied / "uncertainty" / f"{name}{ending}")
    return Case(wrong[region], {key: value[region] for key, value in maps.items()}, int(wrong[~region].sum()))


def logistic(values: np.ndarray, wrong: np.ndarray) -> tuple[float, float]:
    """Least log loss of sigmoid(a + b values)."""
    a, b = minimize(lambda w: np.mean(np.logaddexp(0, w[0] + w[1] * values) - wrong * (w[0] + w[1] * values)), (0, 1)).x
    return float(a), float(b)


def fitted(cases: list[Case], source: str, feature) -> np.ndarray:  # noqa: ANN001 (a function of arrays)
    """Probabilities over all cases, each half's from a fit on the other."""
    found = [np.zeros(0)] * len(cases)
    for half in (0, 1):
        others = [case for k, case in enumerate(cases) if k % 2 != half]
        values = np.concatenate([feature(case.sources[source]) for case in others])
        a, b = logistic(values, np.concatenate([case.wrong for case in others]))
        for k in range(half, len(cases), 2):
            found[k] = 1 / (1 + np.exp(-(a + b * feature(cases[k].sources[source]))))
    return np.concatenate(found)


def logit(p: np.ndarray) -> np.ndarray:
    """Of probabilities, kept off 0 and 1."""
    p = p.astype(np.float64).clip(SMALL, 1 - SMALL)
    return np.log(p / (1 - p))


def log(values: np.ndarray) -> np.ndarray:
    """Of a spread."""
    return np.log(values.astype(np.float64).clip(SMALL))


def main() -> None:
    """Read the arguments and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag in ("-gt", "-s", "--applied", "-djfile"):
        parser.add_argument(flag, type=Path, required=True)
    parser.add_argument("--folds", type=Path, nargs="+", required=True)
    args = parser.parse_args()
    dataset = json.loads(args.djfile.read_text())
    ending, names = dataset["file_ending"], [n for n in dataset["labels"] if n not in ("background", "ignore")]
    files = sorted(args.applied.glob(f"*{ending}"))
    foreground = Foreground(tuple(names), True, None)
    cases = [load(args, file.name.removesuffix(ending), ending, foreground) for file in tqdm(files)]
    wrong = np.concatenate([case.wrong for case in cases])
    raw = {key: np.concatenate([case.sources[key] for case in cases]) for key in cases[0].sources}
    table = {
        "ensemble's confidence": raw["ensemble"],
        "the same, scaled on these cases": fitted(cases, "ensemble", logit),
        "spread of the ensemble's folds, fitted on these cases": fitted(cases, "spread of the ensemble", log),
        "apply's error map": raw["apply's error map"],
    }
    if "spread of the refiner" in raw:
        table["spread of the refiner's folds, fitted on these cases"] = fitted(cases, "spread of the refiner", log)
    inside, outside = int(wrong.sum()), sum(case.outside for case in cases)
    print(f"{len(cases)} cases, {inside} of {inside + outside} wrong voxels in the region\n")
    print("| error map | log loss | Brier | AUROC | AUROC in doubt | calibration error |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for name, p in table.items():
        s = error_scores(p, wrong, raw["ensemble"])
        print(f"| {name} | {s.log_loss:.4f} | {s.brier:.4f} | {s.auroc:.3f} | {s.auroc_doubt:.3f} | {s.ece:.3f} |")


if __name__ == "__main__":
    main()
