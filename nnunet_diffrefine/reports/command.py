"""``nnUNetv2_diffrefine compare``: parsing only."""

from __future__ import annotations

import argparse
from pathlib import Path

DESCRIPTION = """\
Compare two or more systems on the same cases, from the metrics.csv that nnUNetv2_diffrefine evaluate wrote for each.

For every label and metric: both means, the mean difference with its bootstrap interval, one-sided paired tests
(Wilcoxon and t; the alternative is that the system is better than the baseline), their p values after Holm's correction
for the number of labels and metrics, on how many cases the system is better, equal or worse, and its worst losses.
Writes comparison.md, comparison.json and comparison.tex.
"""
EPILOG = """\
example:
  nnUNetv2_diffrefine compare nnU-Net=evaluation/stage_one/metrics.csv refined=evaluation/refined/metrics.csv \\
      -o evaluation/comparison --metrics Dice HD95 \\
      --splits $nnUNet_preprocessed/Dataset004_Hippocampus/splits_final.json
Decide which metrics count before you look: every further one weakens Holm's correction, IoU says the same as Dice.
Cases of one cross-validation are not independent (folds share training data), so p values are somewhat too small.
"""


def register(subparsers: argparse._SubParsersAction) -> None:
    """Add ``compare`` to the commands."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = subparsers.add_parser(
        "compare",
        help="paired statistics of two or more systems",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=formatter,
    )
    parser.add_argument("systems", nargs="+", metavar="NAME=METRICS_CSV", help="a system's name and its table")
    parser.add_argument("-o", type=Path, required=True, metavar="OUT_FOLDER", help="where the three files go")
    parser.add_argument("--baseline", metavar="NAME", help="what the others are compared with [the first]")
    parser.add_argument(
        "--splits", type=Path, metavar="SPLITS_FINAL_JSON", help="also compare within the validation set of each fold"
    )
    parser.add_argument(
        "--metrics", nargs="+", metavar="METRIC", help="metrics to compare, as named in the tables [all]"
    )
    parser.add_argument(
        "--losses", type=int, default=3, metavar="N", help="worst losses listed per label and metric [3]"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap [0]")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> None:
    """Compare what the arguments name."""
    from nnunet_diffrefine.reports.compare import compare_files

    files = named_files(args.systems)
    compare_files(files, args.o, args.baseline, args.splits, args.metrics, args.seed, args.losses)
    print((args.o / "comparison.md").read_text(encoding="utf-8"))
    print(", ".join(str(args.o / f"comparison.{ending}") for ending in ("md", "json", "tex")))


def named_files(systems: list[str]) -> dict[str, Path]:
    """``NAME=FILE`` by name.

    Raises:
        ValueError: not of that form, or a name given twice.
    """
    files: dict[str, Path] = {}
    for text in systems:
        name, separator, file = text.partition("=")
        if not (separator and name and file):
            raise ValueError(f"Given {text!r}; wanted NAME=METRICS_CSV, such as refined=evaluation/metrics.csv.")
        if name in files:
            raise ValueError(f"Two systems are named {name!r}; names must differ.")
        files[name] = Path(file)
    return files
