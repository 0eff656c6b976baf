"""What is wrong with a prior: error maps, the masks they lead back to, and the nesting of regions."""

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

__all__ = [
    "ThreeWay",
    "absolute_error",
    "apply_absolute",
    "apply_signed",
    "apply_three_way",
    "enforce_nesting",
    "nesting_from_labels",
    "signed_error",
    "three_way_error",
]
