"""What is wrong with a mask: error maps and the way back, nesting, errors made on purpose, distance to the surface."""

from nnunet_diffrefine.errors.augmentation import augment_prior
from nnunet_diffrefine.errors.maps import (
    ThreeWay,
    absolute_error,
    apply_absolute,
    apply_signed,
    apply_three_way,
    enforce_nesting,
    nesting_from_labels,
    signed_error,
    three_way_error,
)
from nnunet_diffrefine.errors.surface import surface_distance, surface_loss

__all__ = [
    "ThreeWay",
    "absolute_error",
    "apply_absolute",
    "apply_signed",
    "apply_three_way",
    "augment_prior",
    "enforce_nesting",
    "nesting_from_labels",
    "signed_error",
    "surface_distance",
    "surface_loss",
    "three_way_error",
]
