"""A multi-modal brain-tumour phantom: cases from seeds, and datasets in nnU-Net's raw format.

Four channels (T1, T1ce, T2, FLAIR), labels 1 necrotic or non-enhancing core, 2 oedema, 3 enhancing tumour. The recipe
and every contrast are in docs/phantom.md.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
from scipy import ndimage
from tqdm import tqdm

from nnunet_diffrefine.demo.anatomy import (
    Field,
    Grid,
    Head,
    Label,
    Labels,
    Lesion,
    Mask,
    Tissue,
    coverage,
    make_head,
    paint,
    place_lesions,
    smooth_noise,
)
from nnunet_diffrefine.demo.contrast import CHANNELS, render

ENDING = ".nii.gz"
ORIGIN = (-41.5, 63.25, -17.0)  # mm along x, y, z: not zero, so that code that loses geometry shows
REGIONS = {"whole_tumor": [1, 2, 3], "tumor_core": [1, 3], "enhancing_tumor": [3]}
# nnU-Net writes the regions in their order above, each with the value here; later ones overwrite earlier ones.
REGIONS_CLASS_ORDER = [2, 1, 3]
CLASSES = {"tumor_core": 1, "edema": 2, "enhancing_tumor": 3}


@dataclass(frozen=True)
class PhantomSettings:
    """What varies between phantoms; lengths inside scale with the field of view, shape times spacing.

    Attributes:
        shape: voxels along z, y, x; at least 12 each.
        spacing: voxel size along z, y, x in mm.
        max_lesions: most tumours in a case.
        further_lesion: probability of each tumour after the first.
        enhancing: share of cases with enhancing tumour.
        noise: standard deviation of the complex noise, as a share of each channel's white matter.
        bias: standard deviation of the log of the coil sensitivity.
        variation: relative standard deviation of tissue means between cases, and of the texture within tissues.
        distractors: add vessels and choroid plexus (bright on T1ce) and white-matter hyperintensities (on FLAIR).
    """

    shape: tuple[int, int, int] = (48, 56, 48)
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0)
    max_lesions: int = 2
    further_lesion: float = 0.25
    enhancing: float = 0.75
    noise: float = 0.05
    bias: float = 0.1
    variation: float = 0.04
    distractors: bool = True

    def __post_init__(self) -> None:
        """Refuse values no head can be drawn with."""
        three = len(self.shape) == 3 and all(isinstance(n, int) and n >= 12 for n in self.shape)
        _require(three, "shape", self.shape, "three whole numbers (z, y, x), each at least 12")
        three = len(self.spacing) == 3 and all(np.isfinite(h) and h > 0 for h in self.spacing)
        _require(three, "spacing", self.spacing, "three finite lengths in mm (z, y, x), each above 0")
        _require(self.max_lesions >= 1, "max_lesions", self.max_lesions, "at least 1")
        for name in ("further_lesion", "enhancing"):
            _require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "a probability between 0 and 1")
        for name in ("noise", "bias", "variation"):
            _require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "between 0 and 1")


def _require(condition: bool, name: str, value: object, wanted: str) -> None:
    if not condition:
        raise ValueError(f"{name} is {value!r}; it must be {wanted}.")


def grow_tumors(rng: np.random.Generator, grid: Grid, head: Head, lesions: list[Lesion], enhancing: bool) -> Labels:
    """Paint oedema and tumour cores into ``head.fractions`` (in place) and return the label map, (z, y, x)."""
    radius = grid.radius
    core_level, edema_level = _tumor_levels(rng, grid, lesions)
    gray = head.fractions[Tissue.GRAY] + 0.5 * head.fractions[Tissue.DEEP_GRAY]
    edema_level -= 0.22 * radius * gray  # oedema spreads along white matter and spares grey
    core = coverage(core_level, 0.05 * radius) * head.brain
    edema = coverage(edema_level, 0.16 * radius) * (1 - head.fractions[Tissue.CSF]) * head.brain
    edema *= _connected(np.maximum(core, edema) > 0.5, core > 0.5)
    labels = np.where(edema > 0.5, Label.EDEMA, Label.BACKGROUND)
    labels[core > 0.5] = Label.CORE
    paint(head.fractions, Tissue.EDEMA, edema)
    paint(head.fractions, Tissue.NON_ENHANCING, core)
    if enhancing:
        rim = radius * rng.uniform(0.07, 0.14) * (1 + 0.35 * smooth_noise(rng, grid, 0.5 * radius))
        necrosis = coverage(core_level - rim, 0.05 * radius)
        uptake = smooth_noise(rng, grid, 0.5 * radius)
        solid = coverage(uptake + 1.3) * (1 - necrosis)
        labels[(core > 0.5) & (solid > 0.5)] = Label.ENHANCING
        for tissue, share in (
            (Tissue.NECROSIS, necrosis),
            (Tissue.ENHANCING, solid * np.clip(0.85 + 0.15 * uptake, 0.6, 1)),
        ):
            head.fractions[tissue] = core * share
            head.fractions[Tissue.NON_ENHANCING] -= core * share
    return labels.astype(np.uint8)


def _tumor_levels(rng: np.random.Generator, grid: Grid, lesions: list[Lesion]) -> tuple[Field, Field]:
    """Level functions in mm of all cores and of all whole tumours."""
    position = grid.positions()
    lobes, fingers = (smooth_noise(rng, grid, 0.5 * grid.radius).clip(-2.5, 2.5) for _ in range(2))
    cores, tumors = [], []
    for lesion in lesions:
        offset = position - lesion.center[:, None, None, None]
        distance = np.sqrt((np.tensordot(lesion.axes.T, offset, 1) ** 2).sum(0))
        cores.append(lesion.core * (1 + 0.2 * lobes) - distance)
        tumors.append(lesion.outer * (1 + 0.2 * fingers) - distance)
    return np.maximum.reduce(cores), np.maximum.reduce(tumors)


def _connected(mask: Mask, seeds: Mask) -> Mask:
    """Voxels that are in, or touch, a connected part of ``mask`` that holds a seed."""
    parts, _ = ndimage.label(mask)
    kept = np.isin(parts, np.unique(parts[seeds & mask])) & mask
    islands = mask & ~kept
    return ~ndimage.binary_dilation(islands, iterations=2) | kept


def make_case(seed: int, settings: PhantomSettings | None = None) -> tuple[Field, Labels]:
    """Draw one case; the seed and the settings determine every byte.

    Args:
        seed: 0 or more.
        settings: None for the defaults.

    Returns:
        The channels T1, T1ce, T2, FLAIR, (4, z, y, x), exactly 0 outside of the head and above 0 inside; and the
        label map (z, y, x) of 0 background, 1 necrotic or non-enhancing core, 2 oedema, 3 enhancing tumour.

    Raises:
        ValueError: ``seed`` is negative.
    """
    _require(seed >= 0, "seed", seed, "0 or more")
    settings = settings or PhantomSettings()
    rng = np.random.default_rng(seed)
    grid = Grid(settings.shape, settings.spacing)
    count = 1 + int((rng.random(settings.max_lesions - 1) < settings.further_lesion).sum())
    enhancing = bool(rng.random() < settings.enhancing)
    lesions = place_lesions(rng, grid, count)
    head = make_head(rng, grid, lesions, settings.distractors)
    labels = grow_tumors(rng, grid, head, lesions, enhancing)
    amounts = {"noise": settings.noise, "bias": settings.bias, "variation": settings.variation}
    return render(rng, grid, head.fractions, head.brain, **amounts), labels


def write_dataset(
    folder: Path,
    cases: int,
    seed: int,
    settings: PhantomSettings | None = None,
    test_cases: int = 0,
    regions: bool = True,
) -> Path:
    """Write a dataset in nnU-Net's raw format; an interrupted call, repeated, writes only what is missing.

    Args:
        folder: ``nnUNet_raw/DatasetXXX_NAME``.
        cases: training cases, ``phantom_000`` and on, in ``imagesTr`` and ``labelsTr``; at least 1.
        seed: 0 or more; case i depends on (seed, i) alone.
        settings: None for the defaults.
        test_cases: cases in ``imagesTs`` and ``labelsTs``, numbered on from the training cases.
        regions: declare whole tumour, tumour core and enhancing tumour as regions; else three exclusive labels.

    Returns:
        ``folder``.

    Raises:
        ValueError: an argument is out of range, or ``folder`` holds a dataset written with other arguments.
    """
    folder, settings = Path(folder), settings or PhantomSettings()
    _require(re.fullmatch(r"Dataset\d{3}_\w+", folder.name) is not None, "folder", folder.name, "DatasetXXX_NAME")
    _require(cases >= 1, "cases", cases, "at least 1")
    _require(test_cases >= 0, "test_cases", test_cases, "0 or more")
    _require(seed >= 0, "seed", seed, "0 or more")
    arguments = {"seed": seed, "cases": cases, "test_cases": test_cases, "settings": asdict(settings)}
    _write_description(folder, arguments, regions)
    for index in tqdm(range(cases + test_cases), desc=folder.name, unit="case"):
        split = "Tr" if index < cases else "Ts"
        name = f"phantom_{index:03d}"
        paths = [folder / f"images{split}" / f"{name}_{c:04d}{ENDING}" for c in range(len(CHANNELS))]
        paths.append(folder / f"labels{split}" / f"{name}{ENDING}")
        if all(path.exists() for path in paths):
            continue
        case_seed = int(np.random.SeedSequence((seed, index)).generate_state(1, np.uint64)[0])
        image, labels = make_case(case_seed, settings)
        for path, volume in zip(paths, (*image, labels), strict=True):
            if not path.exists():
                _write_volume(volume, path, settings.spacing)
    return folder


def _write_description(folder: Path, arguments: dict[str, Any], regions: bool) -> None:
    """Write ``dataset.json``, or check that the one there was written with the same arguments."""
    description: dict[str, Any] = {
        "name": folder.name,
        "description": "Synthetic brain tumours; no patient data",
        "channel_names": {str(i): name for i, name in enumerate(CHANNELS)},
        "labels": {"background": 0, **(REGIONS if regions else CLASSES)},
        "numTraining": arguments["cases"],
        "file_ending": ENDING,
        "phantom": arguments,
    }
    if regions:
        description["regions_class_order"] = REGIONS_CLASS_ORDER
    text = json.dumps(description, indent=4)
    path = folder / "dataset.json"
    if path.exists():
        if json.loads(path.read_text()) != json.loads(text):
            raise ValueError(
                f"folder {folder} holds a dataset written with other arguments than {arguments}, regions={regions}. "
                "Pass another folder, or the arguments of its dataset.json, or delete it."
            )
        return
    folder.mkdir(parents=True, exist_ok=True)
    _replace(path, lambda partial: partial.write_text(text))


def _write_volume(volume: Field | Labels, path: Path, spacing: tuple[float, float, float]) -> None:
    """Write (z, y, x) with its geometry; SimpleITK counts axes as x, y, z."""
    picture = sitk.GetImageFromArray(volume)
    picture.SetSpacing([float(h) for h in reversed(spacing)])
    picture.SetOrigin(ORIGIN)
    path.parent.mkdir(exist_ok=True)
    # One folder up, on the same disk: nnU-Net takes every file in imagesTr for a case.
    _replace(path, lambda partial: sitk.WriteImage(picture, str(partial), True), path.parent.parent)


def _replace(path: Path, write: Callable[[Path], Any], folder: Path | None = None) -> None:
    """Let ``write`` fill a temporary file in ``folder`` that keeps the ending, and move it to ``path`` in one step."""
    partial = (folder or path.parent) / f".partial_{path.name}"
    write(partial)
    os.replace(partial, path)
