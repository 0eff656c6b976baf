"""Where each artefact lives: the only place that spells a folder or file name.

Everything of ours lies in folders of its own, inside nnU-Net's, so that nothing of nnU-Net's is ever overwritten.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

MANIFEST = "manifest.json"
PRIOR_SUFFIX = ".b2nd"
SPLITS = "splits_final.json"


@dataclass(frozen=True)
class StageOneId:
    """A trained nnU-Net model: trainer, plans and configuration, as in its result folder's name."""

    trainer: str
    plans: str
    configuration: str

    @property
    def name(self) -> str:
        """nnU-Net's own folder name, ``TRAINER__PLANS__CONFIG``."""
        return f"{self.trainer}__{self.plans}__{self.configuration}"

    @classmethod
    def from_name(cls, name: str) -> StageOneId:
        """Invert :attr:`name`; raises ``ValueError`` for anything that is not ``TRAINER__PLANS__CONFIG``."""
        parts = name.split("__")
        if len(parts) != 3:
            raise ValueError(f"'{name}' is not a model folder name; wanted TRAINER__PLANS__CONFIG.")
        return cls(*parts)


def environment_folder(variable: str) -> Path:
    """Return the folder that ``variable`` (``nnUNet_raw``, ``nnUNet_preprocessed``, ``nnUNet_results``) names.

    Raises:
        RuntimeError: the variable is not set.
    """
    value = os.environ.get(variable)
    if not value:
        raise RuntimeError(f"{variable} is not set. Set it to the folder that nnU-Net uses, e.g. export {variable}=...")
    return Path(value)


def preprocessed_dataset(dataset: str) -> Path:
    """``nnUNet_preprocessed/DATASET``."""
    return environment_folder("nnUNet_preprocessed") / dataset


def splits_file(dataset: str) -> Path:
    """nnU-Net's ``splits_final.json`` of the dataset."""
    return preprocessed_dataset(dataset) / SPLITS


def exports_folder(dataset: str) -> Path:
    """The folder of all out-of-fold exports of a dataset."""
    return preprocessed_dataset(dataset) / "diffrefine"


def export_folder(dataset: str, stage_one: StageOneId) -> Path:
    """The out-of-fold export of one stage one: ``manifest.json`` and one ``<case>.b2nd`` a case."""
    return exports_folder(dataset) / stage_one.name


def residuals_folder(dataset: str) -> Path:
    """The folder of all out-of-fold syntheses of a dataset; apart from the priors, of which a refiner looks for one."""
    return preprocessed_dataset(dataset) / "diffrefine_synthesis"


def residual_folder(dataset: str, synthesis: StageOneId) -> Path:
    """The out-of-fold export of one synthesis model, built like :func:`export_folder`."""
    return residuals_folder(dataset) / synthesis.name


def calibration_folder(dataset: str, refiner: StageOneId) -> Path:
    """What calibration keeps of the out-of-fold cases of a refiner, one ``<case>.npz`` each; may be deleted."""
    return preprocessed_dataset(dataset) / "diffrefine_calibration" / refiner.name


def model_folder(dataset: str, stage_one: StageOneId) -> Path:
    """``nnUNet_results/DATASET/TRAINER__PLANS__CONFIG``."""
    return environment_folder("nnUNet_results") / dataset / stage_one.name


def fold_folder(dataset: str, stage_one: StageOneId, fold: int | str) -> Path:
    """The folder of one trained fold."""
    return model_folder(dataset, stage_one) / f"fold_{fold}"


def resource_folder(name: str) -> Path:
    """The folder ``trainers`` or ``plans`` that ships with the package (beside it in a checkout)."""
    package = Path(__file__).resolve().parent
    installed = package / name
    return installed if installed.is_dir() else package.parent / name
