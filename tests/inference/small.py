"""Small volumes, plans and folders for the tests of ``apply``; no nnU-Net model has to be trained."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import SimpleITK as sitk
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor, nn

from nnunet_diffrefine.inference.geometry import Geometry
from nnunet_diffrefine.inference.model import Model
from nnunet_diffrefine.networks.refinement import RefinementNetwork
from tests.builders import LABELS, REGIONS, method_of

ENDING = ".nii.gz"
NAMES = {"labels": {"background": 0, "edema": 1, "core": 2}, "regions": {"background": 0, "whole": [1, 2], "core": 2}}
FOREGROUNDS = {"labels": LABELS, "regions": REGIONS}
SHAPE = (14, 18, 16)  # z, y, x
PATCH = (8, 8, 8)


class Identity(nn.Module):
    """A denoiser that returns the prior, for images of one channel."""

    settings: ClassVar[dict[str, Any]] = {}

    def __init__(self, foreground: Any) -> None:
        super().__init__()
        self.foreground = foreground
        self.shift = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.foreground.logits(x[:, 1 : 1 + self.foreground.channels]) + 0 * self.shift


class Everywhere(Identity):
    """A denoiser that sees the last class everywhere."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        logits = torch.full_like(super().forward(x, t), -5.0)
        logits[:, -1:] = 5.0
        return logits if self.foreground.exclusive else torch.full_like(logits, 5.0)


class NeverFlips(Identity):
    """A denoiser that is sure of an error everywhere, with thresholds that allow no flip."""

    settings = {"name": "discrepancy_unet", "process": {"kind": "none"}, "error": {"target": "absolute"}}

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return torch.full_like(x[:, 1 : 1 + self.foreground.channels], 5.0)


def network_with(denoiser: nn.Module, foreground: Any, **settings: Any) -> RefinementNetwork:
    method = method_of(foreground, **settings)
    network = RefinementNetwork(nn.Identity(), denoiser, method, foreground, method.config.sampling)
    if isinstance(denoiser, NeverFlips):
        network.thresholds.fill_(torch.inf)
    return network


def plans_of(spacing: tuple[float, ...] = (1.0, 1.0, 1.0), transpose: tuple[int, ...] = (0, 1, 2)) -> dict[str, Any]:
    """nnU-Net plans without normalisation, whose images are resampled as probabilities are."""
    resampling = {"is_seg": False, "order": 1, "order_z": 0, "force_separate_z": None}
    function = "resample_data_or_seg_to_shape"
    configuration = {
        "data_identifier": "x", "architecture": {}, "preprocessor_name": "DefaultPreprocessor", "batch_size": 2,
        "patch_size": list(PATCH),
        "spacing": list(spacing), "normalization_schemes": ["NoNormalization"], "use_mask_for_norm": [False],
        "resampling_fn_data": function, "resampling_fn_data_kwargs": resampling,
        "resampling_fn_seg": function, "resampling_fn_seg_kwargs": {**resampling, "is_seg": True},
        "resampling_fn_probabilities": function, "resampling_fn_probabilities_kwargs": resampling,
    }  # fmt: skip
    return {
        "dataset_name": "Dataset777_Small", "plans_name": "nnUNetPlans", "image_reader_writer": "SimpleITKIO",
        "label_manager": "LabelManager", "configurations": {"3d_fullres": configuration},
        "transpose_forward": list(transpose), "transpose_backward": [int(i) for i in np.argsort(transpose)],
        "foreground_intensity_properties_per_channel": {"0": {}},
    }  # fmt: skip


def dataset_of(kind: str) -> dict[str, Any]:
    order = {} if kind == "labels" else {"regions_class_order": [1, 2]}
    return {"labels": NAMES[kind], "channel_names": {"0": "noNorm"}, "file_ending": ENDING, **order}


def geometry_of(kind: str, **plans: Any) -> Geometry:
    return Geometry(plans_of(**plans), "3d_fullres", dataset_of(kind))


def model_of(kind: str, denoiser: type[Identity] = Identity, folds: int = 1, **plans: Any) -> Model:
    foreground = FOREGROUNDS[kind]
    network = network_with(denoiser(foreground), foreground, **denoiser.settings)
    network.stage_one = nn.Identity()
    state = network.state_dict()
    return Model(network, [state] * folds, plans_of(**plans), "3d_fullres", dataset_of(kind), Path("model"))


def probabilities_of(kind: str, seed: int = 0, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    """Smooth probabilities (H, Z, Y, X) of a prediction with some foreground, as nnU-Net stores them."""
    noise = np.random.default_rng(seed).normal(size=(3, *shape))
    logits = 6 * np.stack([gaussian_filter(channel, 1.5) for channel in noise]) / 0.12
    logits = torch.from_numpy(logits).float()
    if kind == "labels":
        return torch.softmax(logits, 0).numpy()
    whole = torch.sigmoid(logits[1])
    return torch.stack((whole, whole * torch.sigmoid(logits[2]))).numpy()


@dataclass
class Folders:
    """Images and predictions of some cases.

    Attributes:
        root: holds images, predictions and out.
        kind: ``labels`` or ``regions``.
        spacing: in mm, x, y, z.
        border: voxels of zeros around the image, which nnU-Net crops off.
    """

    root: Path
    kind: str = "labels"
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0)
    border: int = 0
    cases: list[str] = field(default_factory=list)

    @property
    def images(self) -> Path:
        return self.root / "images"

    @property
    def predictions(self) -> Path:
        return self.root / "predictions"

    @property
    def out(self) -> Path:
        return self.root / "out"

    def checkpoint(self, fold: int) -> Path:
        return self.root / "model" / f"fold_{fold}" / "checkpoint_final.pth"

    def add(self, case: str, seed: int = 0, soft: bool = True) -> np.ndarray:
        """Write a case; returns its label map."""
        for folder in (self.images, self.predictions):
            folder.mkdir(parents=True, exist_ok=True)
        image = np.random.default_rng(seed).uniform(1, 2, SHAPE).astype(np.float32)
        if self.border:
            inside = (slice(self.border, -self.border),) * 3
            image = np.zeros_like(image) + np.pad(image[inside], self.border)
        p = probabilities_of(self.kind, seed)
        labels = geometry_of(self.kind).labels.convert_probabilities_to_segmentation(p).astype(np.uint8)
        write_volume(self.images / f"{case}_0000{ENDING}", image, self.spacing)
        write_volume(self.predictions / f"{case}{ENDING}", labels, self.spacing)
        if soft:
            np.savez_compressed(self.predictions / f"{case}.npz", probabilities=p)
        self.cases.append(case)
        return labels

    def probabilities(self, case: str, folder: Path | None = None) -> np.ndarray:
        return np.load((folder or self.predictions) / f"{case}.npz")["probabilities"]

    def replace_probabilities(self, case: str, p: np.ndarray) -> None:
        np.savez_compressed(self.predictions / f"{case}.npz", probabilities=p)

    def describe(self, labels: dict[str, Any]) -> None:
        (self.predictions / "dataset.json").write_text(json.dumps({"labels": labels}))


def write_volume(
    file: Path,
    array: np.ndarray,
    spacing: tuple[float, ...] = (1.0, 1.0, 1.0),
    origin: tuple[float, ...] = (5.0, -7.0, 11.0),
    direction: tuple[float, ...] = (0.0, 1.0, 0.0, -1.0, 0.0, 0.0, 0.0, 0.0, 1.0),
) -> None:
    image = sitk.GetImageFromArray(array, isVector=False)
    image.SetSpacing(spacing)
    if array.ndim == 3:
        image.SetOrigin(origin)
        image.SetDirection(direction)
    sitk.WriteImage(image, str(file))


def read_volume(file: Path) -> np.ndarray:
    return sitk.GetArrayFromImage(sitk.ReadImage(str(file)))
