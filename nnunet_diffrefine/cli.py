"""``nnUNetv2_diffrefine``: parsing only; each subcommand lives beside what it runs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from nnunet_diffrefine import __version__, doctor, environment, plan_command
from nnunet_diffrefine.demo import command as demo_command
from nnunet_diffrefine.evaluation import command as evaluate_command
from nnunet_diffrefine.inference import calibrate_command
from nnunet_diffrefine.inference import command as apply_command
from nnunet_diffrefine.reports import command as compare_command
from nnunet_diffrefine.reports import report_command
from nnunet_diffrefine.stage_one import command as export_command

DESCRIPTION = """Refine nnU-Net segmentations with a diffusion model trained on out-of-fold predictions.

The usual order, after nnUNetv2_plan_and_preprocess and training stage one in cross-validation:
  eval "$(nnUNetv2_diffrefine env)"                      let nnU-Net find our trainers
  nnUNetv2_diffrefine export -d D -c 3d_fullres          out-of-fold predictions of stage one
  nnUNetv2_train D 3d_fullres FOLD -tr DiffRefineTrainer
  nnUNetv2_diffrefine calibrate -d D -c 3d_fullres -tr DiffRefineTrainer
  nnUNetv2_predict -i IN -o OUT -d D -c 3d_fullres -tr DiffRefineTrainer
"""


def parser() -> argparse.ArgumentParser:
    """The command line, one subcommand a task."""
    root = argparse.ArgumentParser(
        prog="nnUNetv2_diffrefine", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    root.add_argument("--version", action="version", version=f"nnunet-diffrefine {__version__}")
    subparsers = root.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in (
        demo_command,
        environment,
        doctor,
        plan_command,
        export_command,
        calibrate_command,
        apply_command,
        evaluate_command,
        compare_command,
        report_command,
    ):
        command.register(subparsers)
    return root


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a subcommand; errors a user can mend are printed without a traceback, with exit status 1."""
    args = parser().parse_args(arguments)
    try:
        status = args.func(args)
    except (ValueError, RuntimeError, OSError, NotImplementedError) as error:
        if isinstance(error, RuntimeError) and type(error).__module__.startswith("torch"):
            raise
        print(f"nnUNetv2_diffrefine {args.command}: {error}", file=sys.stderr)
        status = 1
    sys.exit(status or 0)


if __name__ == "__main__":
    main()
