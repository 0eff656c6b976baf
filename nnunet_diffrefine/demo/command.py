"""``nnUNetv2_diffrefine demo``: the main job on data it makes itself, in minutes."""

from __future__ import annotations

import argparse
import re
import time
from pathlib import Path

DESCRIPTION = """Make a small brain-tumour phantom (T1, T1ce, T2, FLAIR; whole tumour, tumour core, enhancing tumour)
and take it through every step: plan, preprocess, train stage one, export its out-of-fold predictions, train the
refiner, predict, compare. Prints a table and writes demo.png. About ten minutes on two CPU cores; an interrupted run
continues where it stopped if its arguments are the same. The trainings are short: the numbers show that it works, not
how well it can."""
DATASET = "Dataset990_DiffRefinePhantom"


def register(subparsers: argparse._SubParsersAction) -> None:
    """Add the ``demo`` subcommand."""
    parser = subparsers.add_parser("demo", help="the whole pipeline on a phantom, in minutes", description=DESCRIPTION)
    parser.add_argument(
        "--dir",
        type=Path,
        default=Path("diffrefine_demo"),
        help="working folder, new or of the same demo (default: %(default)s)",
    )
    parser.add_argument("--dataset", type=Path, help="a raw dataset of yours (DatasetXXX_NAME) instead of the phantom")
    parser.add_argument("--keep", action="store_true", help="keep nnU-Net's folders with data and models at the end")
    parser.add_argument("--cases", type=int, default=16, help="training cases of the phantom (default: %(default)s)")
    parser.add_argument("-device", choices=("cuda", "cpu", "mps"), help="default: cuda if there is one, else cpu")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Run the demo and print its table."""
    import torch

    from nnunet_diffrefine.demo.pipeline import Demo
    from nnunet_diffrefine.demo.steps import Step, run_steps
    from nnunet_diffrefine.demo.summary import figure, table

    source = check_source(args.dataset)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("-device is 'cuda', but torch finds no CUDA device. Use -device cpu, or mps on a Mac.")
    demo = Demo(args.dir.resolve(), source.name if source else DATASET, source, device, args.cases)
    demo.claim()
    began = time.time()
    result = demo.folder / "table.md"
    if not result.exists():
        run_steps(demo.steps(), demo.folder)
        figure(demo)
        result.write_text(table(demo))
    print(result.read_text())
    print(f"Figure: {demo.folder / 'demo.png'}   Logs: {demo.folder / 'steps'}   Time: {time.time() - began:.0f} s")
    if not args.keep:
        # Once: what lies in nnU-Net's folders later is not the demo's.
        run_steps([Step("clean up", demo.clean)], demo.folder)
    return 0


def check_source(dataset: Path | None) -> Path | None:
    """Check a user's raw dataset folder.

    Raises:
        ValueError: it is not a raw nnU-Net dataset.
    """
    if dataset is None:
        return None
    folder = dataset.resolve()
    wanted = ("dataset.json", "imagesTr", "labelsTr")
    missing = [part for part in wanted if not (folder / part).exists()]
    if missing or not re.fullmatch(r"Dataset\d{3}_\w+", folder.name):
        raise ValueError(
            f"--dataset {dataset} is not a raw nnU-Net dataset: wanted a folder DatasetXXX_NAME with "
            f"{', '.join(wanted)}; {'missing ' + ', '.join(missing) if missing else 'its name is ' + folder.name}."
        )
    return folder
