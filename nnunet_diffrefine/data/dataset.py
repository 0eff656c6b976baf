"""nnU-Net's preprocessed dataset with the out-of-fold prior as additional image channels.

nnU-Net's own loader then crops, pads and hands over both alike; :class:`PriorTransform` splits them again before the
augmentation, because intensity transforms must not touch probabilities.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetBaseDataset

from nnunet_diffrefine.stage_one.store import PriorStore, dequantise


class StackedChannels:
    """Image (C, D, H, W) and quantised prior (R, D, H, W) as one lazy array (C + R, D, H, W), float32.

    Only what is indexed is read from disk, as with nnU-Net's own lazy arrays.

    Args:
        image: array-like of the preprocessed image.
        prior: array-like of the quantised prior.
        case: name of the case, for the error message.

    Raises:
        RuntimeError: the two differ in shape.
    """

    dtype = np.dtype(np.float32)

    def __init__(self, image: Any, prior: Any, case: str) -> None:  # noqa: ANN401 (blosc2 or NumPy arrays)
        if image.shape[1:] != prior.shape[1:]:
            raise RuntimeError(
                f"Case {case}: the preprocessed image has shape {tuple(image.shape[1:])}, its exported prior "
                f"{tuple(prior.shape[1:])}. The data were preprocessed again since the export: "
                "run nnUNetv2_diffrefine export once more."
            )
        self.image, self.prior = image, prior
        self.shape = (image.shape[0] + prior.shape[0], *image.shape[1:])
        self.ndim = len(self.shape)

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        """Read a crop; the channel axis is always read whole."""
        spatial = index[1:] if isinstance(index, tuple) else ()
        crop = (slice(None), *spatial)
        return np.concatenate((np.asarray(self.image[crop], np.float32), dequantise(self.prior[crop])))


class PriorDataset:
    """Wrap an nnU-Net dataset so that :meth:`load_case` returns image and prior stacked.

    Args:
        dataset: nnU-Net's dataset of preprocessed cases.
        store: the verified export of stage one's out-of-fold predictions.
    """

    def __init__(self, dataset: nnUNetBaseDataset, store: PriorStore) -> None:
        self.dataset = dataset
        self.store = store
        self.identifiers = dataset.identifiers
        self.source_folder = dataset.source_folder

    def __getitem__(self, identifier: str) -> tuple:
        """Same as :meth:`load_case`."""
        return self.load_case(identifier)

    def load_case(self, identifier: str) -> tuple:
        """Stacked data (C + R, D, H, W), segmentation, None and properties of a case, in nnU-Net's order."""
        data, seg, seg_prev, properties = self.dataset.load_case(identifier)
        return StackedChannels(data, self.store.read(identifier), identifier), seg, seg_prev, properties
