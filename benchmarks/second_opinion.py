r"""What a second plain network would say about stage one's errors, beside the refiner's error map.

python benchmarks/second_opinion.py -d 4 -p nnUNetPlansSmallRandom -tr DiffRefineTrainer_bench1200 \
    --second nnUNetTrainer_bench1200_second@nnUNetPlansSmall

The spread of stage one's fold ensemble cannot be measured out-of-fold: the other folds trained on the case. A second
stage one of the same fold, trained with another seed (nnUNetv2_train ... --npz), has not seen it either, so its spread
with the first is the fair stand-in. Run ``nnUNetv2_diffrefine calibrate`` first, with its default region. Needs data of
which preprocessing changes neither spacing nor crop.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

import numpy as np
import torch
from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name
from scipy.optimize import minimize

from nnunet_diffrefine.calibration.agreement import error_scores
from nnunet_diffrefine.calibration.record import Record
from nnunet_diffrefine.calibration.scaling import fit, identity
from nnunet_diffrefine.calibration.voxels import CaseVoxels
from nnunet_diffrefine.errors.probability import error_of
from nnunet_diffrefine.inference.region import RegionSettings, doubtful_region
from nnunet_diffrefine.paths import StageOneId, calibration_folder, export_folder, fold_folder, model_folder
from nnunet_diffrefine.plans import read_block
from nnunet_diffrefine.stage_one.store import PriorStore, dequantise

VOXELS = 2500


def main() -> None:
    """Read the arguments, print one line a source."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag, default in (("-d", None), ("-p", "nnUNetPlans"), ("-c", "3d_fullres"), ("-tr", "DiffRefineTrainer")):
        parser.add_argument(flag, default=default, required=default is None)
    parser.add_argument("--second", required=True, metavar="TRAINER[@PLANS]", help="second stage one")
    args = parser.parse_args()
    dataset, refiner = maybe_convert_to_dataset_name(args.d), StageOneId(args.tr, args.p, args.c)
    folder = model_folder(dataset, refiner)
    plans = json.loads((folder / "plans.json").read_text())
    _, resolved = read_block(plans["configurations"][args.c])
    foreground, one = resolved.channels(), resolved.stage_one
    record = Record.read(folder, "Calibrate again.")
    if record is None:
        raise SystemExit("Calibrate first.")
    store = PriorStore(export_folder(dataset, StageOneId(one["trainer"], one["plans"], one["configuration"])))
    trainer, _, plans_name = args.second.partition("@")
    second = StageOneId(trainer, plans_name or args.p, args.c)
    settings = RegionSettings(**record.region)
    assert asdict(settings) == record.region
    cases = []
    for file in sorted(calibration_folder(dataset, refiner).glob("*.npz")):
        case = read(file)
        prior = torch.from_numpy(dequantise(store.read(case.name)[:]))
        own = fold_folder(dataset, second, case.fold) / "validation" / f"{case.name}.npz"
        p = torch.from_numpy(np.load(own)["probabilities"].astype(np.float32))
        p = p[1:] if foreground.exclusive else p
        region = doubtful_region(prior, foreground, settings)
        if p.shape != prior.shape or region.sum() != case.refined.shape[1]:
            raise SystemExit(
                f"{case.name}: preprocessed and original geometry differ, or an ignore label hides voxels."
            )
        chosen = torch.from_numpy(np.random.default_rng(0).choice(case.refined.shape[1], VOXELS, replace=False))
        found = (*case.logits(foreground), foreground.logits(p[:, region][None]), case.truth)
        cases.append((case.fold, [x[..., chosen] for x in found]))
    report(cases, foreground)


def read(file) -> CaseVoxels:  # noqa: ANN001
    """A stored case, whatever it was made from."""
    with np.load(file) as content:
        arrays = {key: content[key] for key in ("refined", "prior", "reference", "outside")}
        name, fold, errors = str(content["name"]), int(content["fold"]), int(content["outside_errors"])
    return CaseVoxels(name, fold, outside_errors=errors, **arrays)


def report(cases, foreground) -> None:  # noqa: ANN001
    """Cross-fit over folds and print."""
    kept: dict[str, list] = {}
    for fold in sorted({fold for fold, _ in cases}):
        others, own = (
            [torch.cat(x, -1) for x in zip(*(c for f, c in cases if (f == fold) == same), strict=True)]
            for same in (False, True)
        )
        for name, error in sources(others, own, foreground).items():
            prior = foreground.probabilities(own[1])
            wrong = (foreground.decide(own[1]) != own[3]).any(1)[0].numpy()
            kept.setdefault(name, []).append((error, wrong, error_of(prior, prior, foreground)[0].numpy()))
    for name, parts in kept.items():
        print(name, error_scores(*(np.concatenate(x) for x in zip(*parts, strict=True))))


def sources(others, own, foreground) -> dict[str, np.ndarray]:  # noqa: ANN001
    """Error probabilities of every source: refined, stage-one and second logits, and reference, of both sides."""
    refined, stage_one, second, truth = others
    prior = foreground.probabilities(own[1])

    def of(first, scaling) -> np.ndarray:  # noqa: ANN001
        return error_of(scaling(first, own[1], foreground), prior, foreground)[0].numpy()

    both, none = (True, True), (False, True)
    return {
        "stage one": of(own[0], identity(foreground, "stage_one")),
        "stage one, scaled": of(own[0], fit(refined, stage_one, truth, foreground, none)),
        "refiner and stage one, scaled": of(own[0], fit(refined, stage_one, truth, foreground, both)),
        "second network and stage one, scaled": of(own[2], fit(second, stage_one, truth, foreground, both)),
        "spread of both networks, scaled": spread_error(others, own, foreground),
    }


def spread_error(others, own, foreground) -> np.ndarray:  # noqa: ANN001
    """Logistic regression of the error on the logarithm of the spread alone."""

    def features(side) -> np.ndarray:  # noqa: ANN001
        p, q = foreground.probabilities(side[1]), foreground.probabilities(side[2])
        return np.log(((p - q).abs() / 2).amax(1)[0].numpy().clip(1e-4))

    x, y = features(others), (foreground.decide(others[1]) != others[3]).any(1)[0].numpy()
    a, b = minimize(lambda w: np.mean(np.logaddexp(0, w[0] + w[1] * x) - y * (w[0] + w[1] * x)), np.zeros(2)).x
    return 1 / (1 + np.exp(-(a + b * features(own))))


if __name__ == "__main__":
    main()
