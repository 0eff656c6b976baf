"""A small study on disk: images, references, two systems, maps, and their metrics as evaluate writes them."""

import csv
import json

import numpy as np
import SimpleITK as sitk

from nnunet_diffrefine.evaluation.case_metrics import Settings
from nnunet_diffrefine.evaluation.run import evaluate_folders

CASES = ("case_a", "case_b", "case_c", "case_<b>&'\"_d")  # the last is a legal file name
SHAPE, SPACING = (8, 24, 20), (1.0, 1.0, 2.0)
# shift of both systems against the reference in voxels: improved, harmed, unchanged, a little improved
SHIFTS = dict(zip(CASES, ((4, 1), (1, 3), (2, 2), (3, 2)), strict=True))


def write(file, array, **changes):
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(changes.get("spacing", SPACING))
    image.SetOrigin(changes.get("origin", (0.0, 0.0, 0.0)))
    file.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(image, str(file))


def labels(shift=0):
    array = np.zeros(SHAPE, np.uint8)
    array[2:6, 5 + shift : 11 + shift, 5:13] = 1
    array[2:6, 11 + shift : 17 + shift, 5:13] = 2
    return array


def build(folder):
    """Everything that the command takes; returns its arguments as a dictionary of options."""
    rng = np.random.default_rng(0)
    dataset = {"channel_names": {"0": "T1", "1": "T2"}, "labels": {"background": 0, "head": 1, "tail": 2}}
    folder.mkdir(exist_ok=True)
    (folder / "dataset.json").write_text(json.dumps(dataset | {"file_ending": ".nii.gz"}))
    for case, shifts in SHIFTS.items():
        for channel in range(2):
            noise = rng.normal(size=SHAPE).astype(np.float32)
            write(folder / "images" / f"{case}_{channel:04d}.nii.gz", labels() * 100.0 + noise)
        before, after = map(labels, shifts)
        write(folder / "references" / f"{case}.nii.gz", labels())
        write(folder / "before" / f"{case}.nii.gz", before)
        write(folder / "after" / f"{case}.nii.gz", after)
        error = np.where(before != labels(), 0.8, 0.05).astype(np.float32)
        write(folder / "error_maps" / f"{case}.nii.gz", error)
        write(folder / "uncertainty" / f"{case}.nii.gz", error / 2)
    for system in ("before", "after"):
        settings = Settings((1.0,), "nnunet")
        evaluate_folders(
            folder / "references", folder / system, folder / "dataset.json", folder / f"metrics_{system}", settings
        )
    return {
        "-i": folder / "images",
        "-gt": folder / "references",
        "-s": folder / "before",
        "-r": folder / "after",
        "--error_maps": folder / "error_maps",
        "--uncertainty": folder / "uncertainty",
        "-djfile": folder / "dataset.json",
    }


def write_probabilities(folder, sure=0.9):
    """CASE.npz beside the label maps: the label decided has ``sure``, the others share the rest."""
    for file in sorted(folder.glob("*.nii.gz")):
        decided = sitk.GetArrayFromImage(sitk.ReadImage(str(file)))
        p = np.where(decided == np.arange(3)[:, None, None, None], sure, (1 - sure) / 2)
        np.savez_compressed(folder / file.name.replace(".nii.gz", ".npz"), probabilities=p.astype(np.float32))


def write_table(file, rows):
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([["case", "label", "metric", "value", "unit"], *rows])
    return file


def table(cases, shift=0.0, seed=0):
    """Rows of a metrics.csv, for reports without folders."""
    rng = np.random.default_rng(seed)
    for i, case in enumerate(cases):
        change = shift * rng.normal(1, 1)
        for metric, value, unit in (
            ("Dice", 0.8 + change / 100, "1"),
            ("HD95", 5.0 - change, "mm"),
            ("reference_volume", 1.0 + i, "mL"),
        ):
            yield [case, "organ", metric, repr(value), unit]
