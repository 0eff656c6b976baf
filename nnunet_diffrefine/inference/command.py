"""``nnUNetv2_diffrefine apply``: parsing only."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from nnunet_diffrefine.environment import VARIABLE, extended_trainer_path
from nnunet_diffrefine.paths import StageOneId

DESCRIPTION = """\
Refine predictions that exist already: folders of nnUNetv2_predict --save_probabilities, or label maps of any tool.
Only voxels that can be wrong are refined, everything else is copied; geometry and headers are those of the image.
Can be stopped and started again (--continue_prediction), and split over jobs (-num_parts, -part_id).
"""


def register(subparsers: argparse._SubParsersAction) -> None:
    """Add ``apply`` to the commands."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = subparsers.add_parser(
        "apply", help="refine predictions that exist already", description=DESCRIPTION, formatter_class=formatter
    )
    _add_model(parser)
    _add_results(parser)
    add_region(parser)
    _add_running(parser)
    parser.set_defaults(func=run)


def _add_model(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("-i", required=True, type=Path, metavar="IMAGES", help="images, CASE_0000.nii.gz as for nnUNetv2_predict")
    add(
        "-s", required=True, type=Path, metavar="PREDICTIONS", help="predictions, CASE.nii.gz, with or without CASE.npz"
    )
    add("-o", required=True, type=Path, metavar="OUT", help="output folder")
    add("-d", required=True, metavar="DATASET", help="dataset id or name")
    add("-c", default="3d_fullres", metavar="CONFIG", help="configuration of the refiner [3d_fullres]")
    add("-tr", default="DiffRefineTrainer", metavar="TRAINER", help="trainer of the refiner [DiffRefineTrainer]")
    add("-p", default="nnUNetPlans", metavar="PLANS", help="plans of the refiner [nnUNetPlans]")
    add("-f", nargs="+", type=int, default=[0, 1, 2, 3, 4], metavar="FOLD", help="folds to average [0 1 2 3 4]")
    add("-chk", default="checkpoint_final.pth", metavar="FILE", help="checkpoint [checkpoint_final.pth]")
    add("--steps", type=int, metavar="N", help="sampling steps [the model's]")
    add("--samples", type=int, metavar="N", help="samples to average [the model's]")
    add("--seed", type=int, metavar="N", help="of the noise; same seed, same bytes [the model's]")


def _add_results(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--save_probabilities", action="store_true", help="write CASE.npz and CASE.pkl, as nnUNetv2_predict does")
    add("--save_uncertainty", action="store_true", help="write uncertainty/CASE: spread over samples and folds")
    add("--save_error_map", action="store_true", help="write error_map/CASE: probability that the input is wrong")
    add("--no_gate", action="store_true", help="refine every class, also those that calibrate found it not to help")
    soften = "smooth label maps that come without probabilities by a Gaussian of this standard deviation in mm [0]"
    add("--soften", type=float, default=0.0, metavar="MM", help=soften)


def add_region(parser: argparse.ArgumentParser) -> None:
    """Arguments of the doubtful region; :func:`region_of` reads them."""
    add = parser.add_argument
    add("--margin", type=int, metavar="VOXELS", help="refined on either side of the prediction's surface [4]")
    add("--entropy", type=float, metavar="SHARE", help="refined where the prior's entropy, 0 to 1, reaches this [0.1]")
    add("--candidates", type=float, metavar="P", help="refined where a class reaches this probability [0.05]")
    add("--everywhere", action="store_true", help="refine all voxels; methods that do not read the prior always do")


def _add_running(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("-num_parts", type=int, default=1, metavar="N", help="number of processes that share the work")
    add("-part_id", type=int, default=0, metavar="I", help="part this process does, 0 to N - 1")
    add("--continue_prediction", action="store_true", help="leave out cases that are complete in OUT")
    add("-npp", type=int, default=3, metavar="N", help="processes for preprocessing; 0: none of their own [3]")
    add("-nps", type=int, default=3, metavar="N", help="processes for export; 0: none of their own [3]")
    add("-device", default="cuda", choices=("cuda", "cpu", "mps"), help="where the network runs [cuda]")
    add("--not_on_device", action="store_true", help="keep volumes in main memory, for cases larger than the GPU's")
    add("--disable_progress_bar", action="store_true", help="for logs of batch jobs")


def run(args: argparse.Namespace) -> None:
    """Apply the refiner that the arguments describe."""
    from nnunet_diffrefine.inference.apply import Request, apply  # nnU-Net takes seconds to import; --help must not

    os.environ[VARIABLE] = extended_trainer_path(os.environ.get(VARIABLE))
    same = {name: getattr(args, name) for name in SAME}
    refiner = StageOneId(args.tr, args.p, args.c)
    same |= {"on_device": not args.not_on_device, "progress": not args.disable_progress_bar}
    same |= {"gate": not args.no_gate, "region": region_of(args)}
    apply(Request(args.i, args.s, args.o, args.d, refiner, tuple(args.f), args.chk, **same))


SAME = (
    *("steps", "samples", "seed", "soften", "save_probabilities", "save_uncertainty", "save_error_map"),
    *("num_parts", "part_id", "continue_prediction", "npp", "nps", "device"),
)
"""Arguments that are called as the fields of the request are."""


def region_of(args: argparse.Namespace) -> dict[str, object]:
    """Only what was given: the rest are the defaults of :class:`RegionSettings`."""
    given = {"margin": args.margin, "entropy": args.entropy, "candidates": args.candidates}
    everywhere = {"everywhere": True} if args.everywhere else {}
    return {key: value for key, value in given.items() if value is not None} | everywhere
