"""Write a reduced copy of nnU-Net plans, small enough to train on a CPU.

python benchmarks/small_plans.py -d 4 -o nnUNetPlansBench --features 16 32 64 128 --batch 2 [--patch 80 80 80] [-c 2d]

The preprocessed data of the source plans are shared: only the network, the patch and the batch size change.
``--folds N`` also deals the cases out to N folds (nnU-Net makes five).
"""

import argparse
import json
from pathlib import Path

from nnunetv2.paths import nnUNet_preprocessed
from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name

from nnunet_diffrefine.demo.small_plans import CONFIGURATION, shrink
from nnunet_diffrefine.paths import SPLITS


def write_splits(file: Path, cases: list[str], folds: int) -> None:
    """Deal the cases out to the folds in turn."""
    held_out = [cases[k::folds] for k in range(folds)]
    splits = [{"train": sorted(set(cases) - set(val)), "val": val} for val in held_out]
    with file.open("x") as new:
        json.dump(splits, new, indent=4)
    print(f"wrote {file}")


def main() -> None:
    """Read the arguments and write ``nnUNet_preprocessed/DATASET/NAME.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-d", required=True, help="dataset id or name")
    parser.add_argument("-p", default="nnUNetPlans", help="source plans")
    parser.add_argument("-c", default=CONFIGURATION, help="configuration")
    parser.add_argument("-o", default="nnUNetPlansSmall", help="name of the new plans")
    parser.add_argument("--features", type=int, nargs="+", default=[16, 32, 64, 128])
    parser.add_argument("--batch", type=int, default=3)
    parser.add_argument("--patch", type=int, nargs="+")
    parser.add_argument("--folds", type=int, help="write splits_final.json, which must not exist")
    args = parser.parse_args()
    folder = Path(nnUNet_preprocessed.get()) / maybe_convert_to_dataset_name(args.d)
    plans = json.loads((folder / f"{args.p}.json").read_text())
    plans = shrink(plans, args.o, args.features, args.batch, args.patch, args.c)
    target = folder / f"{args.o}.json"
    target.write_text(json.dumps(plans, indent=4))
    print(f"wrote {target}")
    if args.folds:
        data = folder / plans["configurations"][args.c]["data_identifier"]
        cases = sorted(file.name.removesuffix("_seg.b2nd") for file in data.glob("*_seg.b2nd"))
        write_splits(folder / SPLITS, cases, args.folds)


if __name__ == "__main__":
    main()
