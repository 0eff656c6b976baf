"""Stored priors: stage one's foreground probabilities, 8 bits each, one blosc2 file a case.

A probability p is stored as k = round(255 p) and read back as k / 255, so the error is at most 1 / 510; 0 and 1 are
exact. The k of exclusive classes may sum to more than 255, by R / 2 at most.

Measured on the 40 out-of-fold priors (two classes, 63,000 voxels each, 3 % of them strictly between 0 and 1) of a short
nnU-Net training on the Medical Segmentation Decathlon's hippocampus; bytes as a share of nnU-Net's compressed
preprocessed images, for which the budget is 5 %; zstd level 5, blocks of 64 voxels a side:

======  ============  =========  ==========
levels  max. error    no filter  bitshuffle
======  ============  =========  ==========
256     0.0020        4.0 %      6.3 %
128     0.0039        3.3 %      5.3 %
64      0.0079        2.8 %      4.4 %
======  ============  =========  ==========

So eight bits fit, coarser levels are not worth their error, and bitshuffle hurts: priors are long runs of 0 and 255
with a thin soft rim. Level 9 saves a thirtieth of the bytes and takes over ten times as long; blocks of 32 cost 5 %
more. Simulated priors of three regions in a brain tumour's geometry (132 x 176 x 136 voxels) take 4.0 % as well.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Literal

import blosc2
import numpy as np

from nnunet_diffrefine.paths import PRIOR_SUFFIX
from nnunet_diffrefine.stage_one.fingerprint import file_sha256
from nnunet_diffrefine.stage_one.manifest import CaseRecord, write_atomically

LEVELS = 255
BLOCK = 64
LEVEL = 5
TOLERANCE = 1e-3
# As nnU-Net does: memory mapping fails on Windows (MIC-DKFZ/nnUNet#2723).
MMAP = {} if os.name == "nt" else {"mmap_mode": "r"}


def quantise(probabilities: np.ndarray) -> np.ndarray:
    """Probabilities in [0, 1] as uint8 levels 0..255, rounded to the nearest; any shape."""
    return np.rint(probabilities * np.float32(LEVELS)).clip(0, LEVELS).astype(np.uint8)


def dequantise(levels: np.ndarray) -> np.ndarray:
    """uint8 levels as float32 probabilities k / 255, correctly rounded; any shape."""
    return levels.astype(np.float32) / np.float32(LEVELS)


class PriorStore:
    """The priors of one export folder. It holds a path only, so it can be pickled; files are opened per call."""

    def __init__(self, folder: Path) -> None:
        """Store the folder; nothing is read or created."""
        self.folder = Path(folder)

    def path(self, case: str) -> Path:
        """The file of a case."""
        return self.folder / f"{case}{PRIOR_SUFFIX}"

    def write(self, case: str, probabilities: np.ndarray, fold: int) -> CaseRecord:
        """Store foreground probabilities (R, D, H, W) in [0, 1], atomically, and return their record.

        Raises:
            ValueError: wrong number of axes, or values that are no probabilities.
        """
        if probabilities.ndim != 4:
            raise ValueError(f"probabilities of {case} have shape {probabilities.shape}; wanted (R, D, H, W).")
        low, high = float(probabilities.min()), float(probabilities.max())
        if not (low >= -TOLERANCE and high <= 1 + TOLERANCE):  # written so that NaN fails too
            raise ValueError(f"probabilities of {case} lie in [{low}, {high}]; wanted finite values in [0, 1].")
        content = _compress(quantise(probabilities))
        write_atomically(self.path(case), content)
        digest = hashlib.sha256(content).hexdigest()
        return CaseRecord(fold, [int(n) for n in probabilities.shape], digest, len(content))

    def read(self, case: str) -> blosc2.NDArray:
        """Open a case: a lazy uint8 array (R, D, H, W); slice it, then :func:`dequantise` the slice.

        Raises:
            FileNotFoundError: there is no such case.
            RuntimeError: the file is damaged.
        """
        path = self.path(case)
        if not path.is_file():
            raise FileNotFoundError(f"No prior of case {case}: {path} does not exist.")
        try:
            return blosc2.open(urlpath=str(path), mode="r", dparams={"nthreads": 1}, **MMAP)
        except (RuntimeError, ValueError) as error:
            raise RuntimeError(f"{path} is damaged ({error}). Delete it and export the case again.") from error

    def fault(self, case: str, record: CaseRecord) -> Literal["missing", "truncated", "altered"] | None:
        """Compare a case's file with its record by size, then SHA-256; None when it is intact."""
        path = self.path(case)
        if not path.is_file():
            return "missing"
        if path.stat().st_size != record.bytes:
            return "truncated" if path.stat().st_size < record.bytes else "altered"
        return None if file_sha256(path) == record.sha256 else "altered"

    def verify(self, case: str, record: CaseRecord) -> bool:
        """Whether a case's file is there and has the recorded size and SHA-256."""
        return self.fault(case, record) is None


def _compress(levels: np.ndarray) -> bytes:
    """A blosc2 frame of uint8 levels (R, D, H, W), cut into one block of at most 64 voxels per side and channel.

    A random patch then decompresses few voxels beside its own, and blocks without foreground cost next to nothing.
    """
    block = (1, *(min(BLOCK, n) for n in levels.shape[1:]))
    parameters = {"codec": blosc2.Codec.ZSTD, "clevel": LEVEL, "filters": [blosc2.Filter.NOFILTER], "nthreads": 1}
    array = blosc2.asarray(np.ascontiguousarray(levels), chunks=block, blocks=block, cparams=parameters)
    return array.to_cframe()
