"""``nnUNetv2_diffrefine evaluate``: parsing, and the summary on the screen."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

DESCRIPTION = """\
Compare a folder of segmentations with references: Dice, IoU, HD95, NSD, ASSD, volume error, and lesion-wise Dice and
HD95 by the BraTS 2023 rule, for every case and label (or region, if dataset.json has regions).

Writes into the output folder
  metrics.csv    one row a value: case, label, metric, value, unit; an empty value means there is none
  metrics.json   what each metric means, settings, spacing, how many masks were empty, means, versions
Reads nnU-Net's prediction and validation folders as they are; summary.json is left alone. Takes the arguments of
nnUNetv2_evaluate_folder, but -o is a folder here and a file there, and -pfile is not needed.

Libraries disagree about HD95: docs/metrics.md says what is computed here and how others differ.
"""
EPILOG = """\
example, a fold's validation (references of the other folds are skipped with --chill):
  nnUNetv2_diffrefine evaluate $nnUNet_raw/Dataset004_Hippocampus/labelsTr \\
      $nnUNet_results/Dataset004_Hippocampus/nnUNetTrainer__nnUNetPlans__3d_fullres/fold_0/validation \\
      -djfile $nnUNet_raw/Dataset004_Hippocampus/dataset.json -o evaluation/stage_one_fold_0 --chill
then nnUNetv2_diffrefine compare sets two such tables side by side.
"""
SHOWN = ("Dice", "HD95", "ASSD", "volume_error", "lesion_Dice")


def register(subparsers: argparse._SubParsersAction) -> None:
    """Add ``evaluate`` to the commands."""
    formatter = argparse.RawDescriptionHelpFormatter
    text = "metrics of predictions against references, as a table"
    parser = subparsers.add_parser(
        "evaluate", help=text, description=DESCRIPTION, epilog=EPILOG, formatter_class=formatter
    )
    parser.add_argument("gt_folder", type=Path, metavar="GT_FOLDER", help="references, for example labelsTr")
    parser.add_argument("pred_folder", type=Path, metavar="PRED_FOLDER", help="predictions, files of the same names")
    parser.add_argument("-djfile", type=Path, required=True, metavar="DATASET_JSON", help="nnU-Net's dataset.json")
    parser.add_argument(
        "-pfile", type=Path, metavar="PLANS_JSON", help="ignored; labels, regions and file ending are in DATASET_JSON"
    )
    parser.add_argument("-o", type=Path, metavar="OUT_FOLDER", help="where the two files go [PRED_FOLDER]")
    processes = min(8, os.cpu_count() or 1)
    parser.add_argument("-np", type=int, default=processes, metavar="N", help=f"cases at once [{processes}]")
    parser.add_argument("--chill", action="store_true", help="allow references without a prediction")
    _add_metric_arguments(parser)
    _add_lesion_arguments(parser)
    parser.set_defaults(func=run)


def _add_metric_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tolerances",
        type=float,
        nargs="+",
        default=[1.0, 2.0],
        metavar="MM",
        help="surface distances in mm that NSD still accepts; choose what two experts differ by [1 2]",
    )
    parser.add_argument(
        "--empty",
        default="nnunet",
        choices=("nnunet", "brats"),
        help="what empty masks count. nnunet: no value if both are empty, overlap 0 and the image's diagonal as "
        "distance if one is. brats: overlap 1 and 0 mm if both are, 0 and 374 mm if one is [nnunet]",
    )


def _add_lesion_arguments(parser: argparse.ArgumentParser) -> None:
    lesions = parser.add_argument_group("lesion rule", "BraTS 2023: gliomas 3, 50; meningiomas 1, 50; metastases 1, 2")
    lesions.add_argument(
        "--lesion_dilation",
        type=int,
        default=3,
        metavar="K",
        help="dilations of the reference before its components are formed [3]",
    )
    lesions.add_argument(
        "--lesion_min_volume",
        type=float,
        default=50.0,
        metavar="MM3",
        help="reference lesions of at most this volume are not scored [50]",
    )


def run(args: argparse.Namespace) -> None:
    """Evaluate what the arguments name and print the means."""
    from nnunet_diffrefine.evaluation.case_metrics import Settings
    from nnunet_diffrefine.evaluation.lesions import LesionRule
    from nnunet_diffrefine.evaluation.run import evaluate_folders

    if args.o is not None and args.o.suffix == ".json":
        raise ValueError(
            f"-o is {args.o}; wanted a folder, for metrics.csv and metrics.json (only nnUNetv2_evaluate_folder wants a "
            f"file). Try -o {args.o.with_suffix('')}."
        )
    rule = LesionRule(args.lesion_dilation, args.lesion_min_volume)
    settings = Settings(tuple(args.tolerances), args.empty, rule)
    output = args.o or args.pred_folder
    content = evaluate_folders(args.gt_folder, args.pred_folder, args.djfile, output, settings, args.np, args.chill)
    print(_summary(content))
    print(f"{output / 'metrics.csv'}, {output / 'metrics.json'}")


def _summary(content: dict[str, Any]) -> str:
    shown = [name for name in content["metrics"] if name in SHOWN or name.startswith("NSD@")]
    headers = [f"{name} [{content['metrics'][name]['unit']}]".replace(" [1]", "") for name in shown]
    width = max(map(len, [*content["summary"], "label"]))
    lines = ["  ".join(["label".ljust(width), *headers])]
    for label, found in content["summary"].items():
        means = [found[name]["mean"] for name in shown]
        cells = ["-" if m is None else f"{m:.4g}" for m in means]
        lines.append("  ".join([label.ljust(width), *(c.rjust(len(h)) for c, h in zip(cells, headers, strict=True))]))
    empty = {label: sum(counts.values()) for label, counts in content["empty"]["counts"].items()}
    note = ", ".join(f"{label} {n}" for label, n in empty.items() if n)
    lines.append(
        f"Means of {len(content['cases'])} cases; empty masks ({content['empty']['policy']}): {note or 'none'}."
    )
    return "\n".join(lines)
