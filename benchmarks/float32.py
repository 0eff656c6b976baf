r"""Run a command of nnUNetv2_diffrefine with the network in float32 on the CPU, to see what bf16 changes.

python benchmarks/float32.py apply -i IN -s S -o A32 ...          # everything after the file as for nnUNetv2_diffrefine
"""

from contextlib import nullcontext

from nnunet_diffrefine.cli import main
from nnunet_diffrefine.inference import refine

refine.mixed_precision = lambda device: nullcontext()

if __name__ == "__main__":
    main()
