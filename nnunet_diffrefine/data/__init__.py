"""nnU-Net's dataset and augmentation, carrying the out-of-fold prior along with the image."""

from nnunet_diffrefine.data.dataset import PriorDataset
from nnunet_diffrefine.data.transforms import PriorTransform

__all__ = ["PriorDataset", "PriorTransform"]
