"""``nnUNetv2_diffrefine export``: parsing only."""

from __future__ import annotations

import argparse
import os

from nnunet_diffrefine.environment import VARIABLE, extended_trainer_path
from nnunet_diffrefine.paths import StageOneId

DESCRIPTION = """\
Export the out-of-fold priors a refiner is trained on: each fold of a trained nnU-Net predicts the cases of its own
validation set, which it never saw, and the foreground probabilities are stored beside the preprocessed data.
Needs all folds of nnU-Net's cross-validation (nnUNetv2_train ... 0 to 4). Can be stopped and started again.
"""


def register(subparsers: argparse._SubParsersAction) -> None:
    """Add ``export`` to the commands."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = subparsers.add_parser(
        "export", help="store stage one's out-of-fold predictions", description=DESCRIPTION, formatter_class=formatter
    )
    parser.add_argument("-d", required=True, metavar="DATASET", help="dataset id or name")
    parser.add_argument(
        "-c", default="3d_fullres", metavar="CONFIG", help="configuration of stage one, 3D [3d_fullres]"
    )
    parser.add_argument("-tr", default="nnUNetTrainer", metavar="TRAINER", help="trainer of stage one [nnUNetTrainer]")
    parser.add_argument("-p", default="nnUNetPlans", metavar="PLANS", help="plans of stage one [nnUNetPlans]")
    parser.add_argument(
        "-f",
        nargs="+",
        metavar="FOLD",
        help="folds to export [all folds of splits_final.json]; a refiner needs them all, in whatever order they are "
        "exported. Fold 'all' is refused: it trained on every case, so none of its predictions is out-of-fold",
    )
    parser.add_argument(
        "-chk", default="checkpoint_final.pth", metavar="FILE", help="checkpoint [checkpoint_final.pth]"
    )
    parser.add_argument("-num_parts", type=int, default=1, metavar="N", help="number of processes that share the work")
    parser.add_argument("-part_id", type=int, default=0, metavar="I", help="part this process does, 0 to N - 1")
    parser.add_argument("-device", default="cuda", choices=("cuda", "cpu", "mps"), help="where the network runs [cuda]")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> None:
    """Run the export that the arguments describe."""
    from nnunet_diffrefine.stage_one.export import export  # nnU-Net takes seconds to import; --help must not

    os.environ[VARIABLE] = extended_trainer_path(os.environ.get(VARIABLE))
    stage_one = StageOneId(args.tr, args.p, args.c)
    export(args.d, stage_one, _folds(args.f), args.num_parts, args.part_id, args.device, args.chk)


def _folds(given: list[str] | None) -> list[int | str] | None:
    """Folds as integers; ``all`` is passed on for :func:`export` to refuse with the reason."""
    if given is None:
        return None
    if wrong := [fold for fold in given if fold != "all" and not fold.isdigit()]:
        raise ValueError(f"-f is {' '.join(wrong)}; wanted fold numbers, such as -f 0 1 2 3 4.")
    return [fold if fold == "all" else int(fold) for fold in given]
