"""What is evaluated: labels or regions of ``dataset.json``, and the label that is not."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class EvaluatedClass:
    """A label, or a region made of several: its name in ``dataset.json`` and its values in a label map."""

    name: str
    values: tuple[int, ...]


@dataclass(frozen=True)
class Classes:
    """The foreground classes of a data set.

    Args:
        evaluated: labels, or regions if the data set has any; without background and ignore label, as in nnU-Net.
        ignore: value of voxels of the reference that are left out, or None.
        file_ending: of references and predictions, such as ``.nii.gz``.
    """

    evaluated: tuple[EvaluatedClass, ...]
    ignore: int | None
    file_ending: str

    @property
    def values(self) -> frozenset[int]:
        """The values a prediction may hold: background and every part of a class."""
        return frozenset({0}.union(*(c.values for c in self.evaluated)))

    @property
    def regions(self) -> bool:
        """Whether probabilities are of regions, each for itself, instead of labels that exclude each other."""
        return any(len(c.values) > 1 for c in self.evaluated)

    def masks(self, labels: np.ndarray) -> dict[str, np.ndarray]:
        """Boolean mask of each class, of the shape of ``labels``; regions may overlap."""
        return {c.name: np.isin(labels, c.values) for c in self.evaluated}


def read_classes(dataset_json: Path) -> Classes:
    """Read nnU-Net's ``dataset.json``.

    Raises:
        ValueError: not a ``dataset.json`` of nnU-Net v2, or no foreground.
        OSError: the file cannot be read.
    """
    path = Path(dataset_json)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}.") from error
    missing = [key for key in ("labels", "file_ending") if not isinstance(content, dict) or key not in content]
    if missing or not isinstance(content["labels"], dict):
        raise ValueError(
            f"{path} lacks {' and '.join(missing) or 'labels'}; wanted nnU-Net's dataset.json (version 2)."
        )
    labels = {str(name): _values(path, name, value) for name, value in content["labels"].items()}
    ignore = labels.pop("ignore", None)
    if ignore is not None and len(ignore) != 1:
        raise ValueError(f"{path}: label 'ignore' is {list(ignore)}; wanted one integer.")
    evaluated = tuple(EvaluatedClass(name, values) for name, values in labels.items() if values != (0,))
    if not evaluated:
        raise ValueError(f"{path} names no foreground label, only {', '.join(labels) or 'nothing'}.")
    return Classes(evaluated, None if ignore is None else ignore[0], str(content["file_ending"]))


def _values(path: Path, name: str, value: object) -> tuple[int, ...]:
    values = tuple(value) if isinstance(value, list) else (value,)
    if not values or not all(isinstance(v, int) and not isinstance(v, bool) and v >= 0 for v in values):
        raise ValueError(
            f"{path}: label {name!r} is {value!r}; wanted an integer, or a list of integers for a region. "
            "(nnU-Net v1 had name and value the other way round.)"
        )
    return values
