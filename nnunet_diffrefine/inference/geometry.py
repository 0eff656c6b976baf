"""From original to preprocessed geometry and back, by nnU-Net's own preprocessor, resampling and export."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.inference.export_prediction import convert_predicted_logits_to_segmentation_with_correct_shape
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager


@dataclass(frozen=True)
class Geometry:
    """What nnU-Net does to a model's images, and how it is undone.

    Arrays of original geometry have the axes (Z, Y, X) in which nnU-Net's reader hands out an image, those of
    preprocessed geometry are transposed, cropped and resampled, (D, H, W). ``properties`` are nnU-Net's of the case.

    Attributes:
        plans: nnU-Net's plans.
        configuration: name of the configuration.
        dataset_json: of the model.
    """

    plans: dict[str, Any]
    configuration: str
    dataset_json: dict[str, Any]

    @cached_property
    def manager(self) -> Any:  # noqa: ANN401 (nnU-Net's untyped classes, here and below)
        """nnU-Net's plans manager."""
        return PlansManager(self.plans)

    @cached_property
    def settings(self) -> Any:  # noqa: ANN401
        """nnU-Net's configuration manager."""
        return self.manager.get_configuration(self.configuration)

    @cached_property
    def labels(self) -> Any:  # noqa: ANN401
        """nnU-Net's label manager."""
        return self.manager.get_label_manager(self.dataset_json)

    @cached_property
    def reader(self) -> Any:  # noqa: ANN401
        """nnU-Net's reader and writer."""
        return self.manager.image_reader_writer_class()

    @property
    def groups(self) -> list[Any]:
        """The labels of each foreground channel, in nnU-Net's order."""
        groups: list[Any] = self.labels.foreground_regions if self.labels.has_regions else self.labels.foreground_labels
        return groups

    def preprocessed(self, images: Sequence[Path]) -> tuple[np.ndarray, dict[str, Any]]:
        """Image (C, D, H, W) as the networks see it, and its properties."""
        preprocessor = self.settings.preprocessor_class(verbose=False)
        image, _, properties = preprocessor.run_case(
            [str(file) for file in images], None, self.manager, self.settings, self.dataset_json
        )
        return np.ascontiguousarray(image, dtype=np.float32), properties

    def forward(self, values: np.ndarray, properties: dict[str, Any], shape: Sequence[int]) -> np.ndarray:
        """Probabilities (K, Z, Y, X) in [0, 1] -> (K, D, H, W) of ``shape``, as nnU-Net resamples probabilities."""
        order = self.manager.transpose_forward
        values = values.transpose([0, *(axis + 1 for axis in order)])
        spacing = [properties["spacing"][axis] for axis in order]
        resampled = self.settings.resampling_fn_probabilities(
            np.ascontiguousarray(values[(slice(None), *_crop(properties))]), shape, spacing, self.settings.spacing
        )
        return np.asarray(resampled, np.float32).clip(0, 1)

    def backward(self, values: np.ndarray, properties: dict[str, Any]) -> np.ndarray:
        """A map (D, H, W) in [0, 1] -> (Z, Y, X), resampled as probabilities are, 0 outside of the crop."""
        spacing = [properties["spacing"][axis] for axis in self.manager.transpose_forward]
        shape = properties["shape_after_cropping_and_before_resampling"]
        resampled = self.settings.resampling_fn_probabilities(values[None], shape, self.settings.spacing, spacing)
        whole = np.zeros(properties["shape_before_cropping"], np.float32)
        whole[_crop(properties)] = np.asarray(resampled, np.float32)[0].clip(0, 1)  # splines overshoot
        return whole.transpose(self.manager.transpose_backward)

    def exported(
        self, logits: np.ndarray, properties: dict[str, Any], probabilities: bool
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """nnU-Net's export of logits (H, D, H, W): label map (Z, Y, X) and, if wanted, probabilities (H, Z, Y, X)."""
        result = convert_predicted_logits_to_segmentation_with_correct_shape(
            logits, self.manager, self.settings, self.labels, properties, probabilities, torch.get_num_threads()
        )
        return result if probabilities else (result, None)


def _crop(properties: dict[str, Any]) -> tuple[slice, ...]:
    return tuple(slice(*map(int, sides)) for sides in properties["bbox_used_for_cropping"])


def corrected(
    geometry: Geometry,
    properties: dict[str, Any],
    before: np.ndarray,
    after: np.ndarray,
    labels: np.ndarray,
    probabilities: np.ndarray | None,
) -> tuple[np.ndarray, np.ndarray | None]:
    """The input prediction, changed where and only where the refiner changes what nnU-Net exports.

    A prediction that is resampled to the network's spacing and back is not quite the same. So prior and refined logits
    are exported both, and the labels given are replaced where the two exports differ.

    Args:
        geometry: of the model.
        properties: of the case.
        before: the prior's logits (H, D, H, W).
        after: refined logits (H, D, H, W), the same bytes where nothing changed.
        labels: the input's label map (Z, Y, X).
        probabilities: the input's (H, Z, Y, X), or None if they are not wanted.

    Returns:
        Label map, and probabilities if they were given.
    """
    wanted = probabilities is not None
    old, old_p = geometry.exported(before, properties, wanted)
    new, new_p = geometry.exported(after, properties, wanted)
    kept = old == new
    result = np.where(kept, labels, new)
    if probabilities is None or old_p is None or new_p is None:
        return result, None
    # Where the exports agree on a label that is not the input's, resampling made the difference.
    same = (old_p == new_p).all(0) | (kept & (new != labels))
    return result, np.where(same, probabilities, new_p)
