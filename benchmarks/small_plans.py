"""Write a reduced copy of nnU-Net plans, small enough to train on a CPU.

python benchmarks/small_plans.py -d 4 -o nnUNetPlansSmall --features 16 32 64 128 --batch 3 [--patch 80 80 80] [-c 2d]

The preprocessed data of the source plans are shared: only the network, the patch and the batch size change.
"""

import argparse
import json
from pathlib import Path

from nnunetv2.paths import nnUNet_preprocessed
from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name

from nnunet_diffrefine.demo.small_plans import CONFIGURATION, shrink


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
    args = parser.parse_args()
    folder = Path(nnUNet_preprocessed.get()) / maybe_convert_to_dataset_name(args.d)
    plans = json.loads((folder / f"{args.p}.json").read_text())
    plans = shrink(plans, args.o, args.features, args.batch, args.patch, args.c)
    target = folder / f"{args.o}.json"
    target.write_text(json.dumps(plans, indent=4))
    print(f"wrote {target}")


if __name__ == "__main__":
    main()
