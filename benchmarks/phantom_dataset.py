"""Write the brain-tumour phantom (docs/phantom.md) into ``nnUNet_raw``, with the settings of the demo.

python benchmarks/phantom_dataset.py --cases 48 [--seed 0]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from nnunetv2.paths import nnUNet_raw

from nnunet_diffrefine.demo.phantom import write_dataset
from nnunet_diffrefine.demo.pipeline import PHANTOM

DATASET = "Dataset901_Phantom"


def main() -> None:
    """Read the arguments and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=48)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    target = Path(nnUNet_raw.get()) / DATASET
    write_dataset(target, args.cases, seed=args.seed, settings=PHANTOM)
    print(f"wrote {target}")


if __name__ == "__main__":
    main()
