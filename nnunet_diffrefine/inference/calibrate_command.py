"""``nnUNetv2_diffrefine calibrate``: parsing only."""

from __future__ import annotations

import argparse
import os

from nnunet_diffrefine.environment import VARIABLE, extended_trainer_path
from nnunet_diffrefine.inference.command import add_region, region_of
from nnunet_diffrefine.paths import StageOneId

DESCRIPTION = """\
Ask the cross-validation where refinement helps. Every trained fold refines its own validation cases, which neither it
nor the stage one behind their exported predictions has seen. From these cases follow, written to refinement.json in
the model folder and, as far as prediction needs them, to its plans.json:

  the gate      a class is refined only if its Dice is better than stage one's, with a 95 % interval above 0;
                otherwise nnUNetv2_predict and apply pass stage one's decision through
  offsets       of the decision, where they help cases they were not chosen on
  error map     calibrated probabilities; whichever source predicts errors best, be it stage one alone
  qc.csv        how predicted Dice and volume of apply become honest

Finished cases are kept: start it again to continue, or after training another fold.
"""
EPILOG = """examples:
  nnUNetv2_diffrefine calibrate -d 4 -c 3d_fullres -tr DiffRefineTrainer
  nnUNetv2_diffrefine calibrate -d 4 -c 3d_fullres -tr DiffRefineTrainer --show            # print, compute nothing
  nnUNetv2_diffrefine calibrate -d 4 -c 3d_fullres -tr DiffRefineTrainer --set 1=refine tumour=keep
"""


def register(subparsers: argparse._SubParsersAction) -> None:
    """Add ``calibrate`` to the commands."""
    parser = subparsers.add_parser(
        "calibrate",
        help="measure where refinement helps, and let prediction obey",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("-d", required=True, metavar="DATASET", help="dataset id or name")
    add("-c", default="3d_fullres", metavar="CONFIG", help="configuration of the refiner [3d_fullres]")
    add("-tr", default="DiffRefineTrainer", metavar="TRAINER", help="trainer of the refiner [DiffRefineTrainer]")
    add("-p", default="nnUNetPlans", metavar="PLANS", help="plans of the refiner [nnUNetPlans]")
    add("-f", nargs="+", type=int, metavar="FOLD", help="folds to calibrate on [all that are trained]")
    add("-chk", default="checkpoint_final.pth", metavar="FILE", help="checkpoint [checkpoint_final.pth]")
    add("-device", default="cuda", choices=("cuda", "cpu", "mps"), help="where the network runs [cuda]")
    decisions = "decide yourself: CLASS=refine, CLASS=keep (stage one's) or CLASS=measured; a class is a name, a number"
    add("--set", nargs="+", metavar="CLASS=DECISION", help=f"{decisions} from 1, or all. Nothing is computed")
    add("--show", action="store_true", help="print refinement.json as tables; nothing is computed")
    add_region(parser)
    add("--disable_progress_bar", action="store_true", help="for logs of batch jobs")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> None:
    """Calibrate, show or override."""
    from nnunet_diffrefine.calibration.table import shown  # nnU-Net takes seconds to import; --help must not
    from nnunet_diffrefine.inference.calibrate import CalibrationRequest, calibrate
    from nnunet_diffrefine.inference.decided import calibrate_command, override, read_record

    os.environ[VARIABLE] = extended_trainer_path(os.environ.get(VARIABLE))
    refiner = StageOneId(args.tr, args.p, args.c)
    if args.set:
        record = override(args.d, refiner, args.set)
    elif args.show:
        found = read_record(args.d, refiner)
        if found is None:
            raise RuntimeError(f"There is nothing to show yet. Calibrate: {calibrate_command(args.d, refiner)}")
        record = found
    else:
        folds = None if args.f is None else tuple(args.f)
        progress = not args.disable_progress_bar
        record = calibrate(CalibrationRequest(args.d, refiner, folds, args.chk, region_of(args), args.device, progress))
    print(shown(record))
