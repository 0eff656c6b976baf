"""``nnUNetv2_diffrefine report``: parsing only."""

from __future__ import annotations

import argparse
from pathlib import Path

DESCRIPTION = """\
Write one HTML file that shows what refinement did: the paired statistics, every case before and after, where it gains
and loses by class and size, whether the error map is right, and chosen cases in pictures. The file needs no network and
no other file; the figures are also written as SVG and PNG.

The first system is the baseline. Tables alone are enough; folders add pictures and the reliability of error maps.
"""
EPILOG = """\
example, after apply -s stage_one -o refined --save_error_map --save_uncertainty, and evaluate of both folders:
  nnUNetv2_diffrefine report nnU-Net=evaluation/stage_one/metrics.csv refined=evaluation/refined/metrics.csv \\
      -i imagesTs -gt labelsTs -s stage_one -r refined --error_maps refined/error_map \\
      --uncertainty refined/uncertainty --qc refined/qc.csv -djfile dataset.json -o report
What the sections mean: docs/report.md. Reports of patients' images are patients' data: share them as such.
"""
FOLDERS = (
    ("-i", "images", "IMAGES", "nnU-Net's images, for pictures"),
    ("-gt", "references", "GT_FOLDER", "references, for pictures and error maps"),
    ("-s", "stage_one", "STAGE_ONE", "the baseline's label maps, for pictures and error maps; with or without .npz"),
    ("-r", "refined", "REFINED", "the other system's label maps, for pictures"),
    ("--error_maps", "error_maps", "FOLDER", "a 3D image a case: probability that STAGE_ONE is wrong there"),
    ("--uncertainty", "uncertainty", "FOLDER", "a 3D image a case: spread of the refined probabilities"),
    ("-djfile", "dataset_json", "DATASET_JSON", "nnU-Net's dataset.json, needed with any folder"),
)


def register(subparsers: argparse._SubParsersAction) -> None:
    """Add ``report`` to the commands."""
    formatter = argparse.RawDescriptionHelpFormatter
    text = "one HTML file: statistics, charts and cases in pictures"
    parser = subparsers.add_parser(
        "report", help=text, description=DESCRIPTION, epilog=EPILOG, formatter_class=formatter
    )
    parser.add_argument("systems", nargs="+", metavar="NAME=METRICS_CSV", help="two systems' names and tables")
    for option, name, metavar, meaning in FOLDERS:
        parser.add_argument(option, dest=name, type=Path, metavar=metavar, help=meaning)
    parser.add_argument("-o", type=Path, required=True, metavar="OUT_FOLDER", help="where report.html and figures/ go")
    parser.add_argument(
        "--qc", type=Path, metavar="QC_CSV", help="qc.csv of apply: show the first to review, not the worst Dice"
    )
    parser.add_argument(
        "--cases",
        type=int,
        default=1,
        metavar="N",
        help="cases in pictures of each kind: most improved, most harmed, median, worst [1]",
    )
    parser.add_argument("--metrics", nargs="+", metavar="METRIC", help="metrics of the summary [all]")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap [0]")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> None:
    """Write the report that the arguments name."""
    from nnunet_diffrefine.reports.command import named_files
    from nnunet_diffrefine.reports.report import Request, write_report

    request = Request(
        files=named_files(args.systems),
        output=args.o,
        folders={option: getattr(args, name) for option, name, *_ in FOLDERS if getattr(args, name) is not None},
        qc=args.qc,
        n_cases=args.cases,
        metrics=args.metrics,
        seed=args.seed,
    )
    print(write_report(request))
