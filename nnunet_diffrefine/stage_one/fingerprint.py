"""SHA-256 fingerprints of files and settings: by them an export knows whether what it was made from has changed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

BLOCK_BYTES = 1 << 20

# What nnU-Net's preprocessor reads. Network, patch and batch size are left out on purpose: a refiner on other plans
# that share the preprocessed data is welcome. So is the resampling of probabilities, which only touches predictions.
PLANS_KEYS = ("transpose_forward", "image_reader_writer", "foreground_intensity_properties_per_channel")
CONFIGURATION_KEYS = (
    "data_identifier",
    "preprocessor_name",
    "spacing",
    "normalization_schemes",
    "use_mask_for_norm",
    "resampling_fn_data",
    "resampling_fn_data_kwargs",
    "resampling_fn_seg",
    "resampling_fn_seg_kwargs",
)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, read in blocks of 1 MiB."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def json_sha256(value: object) -> str:
    """SHA-256 of a JSON value's content: indentation and the order of keys do not matter."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def splits_sha256(splits: Sequence[Mapping[str, Sequence[str]]]) -> str:
    """Fingerprint of nnU-Net's splits; the order of the folds matters, that of the cases in a fold does not."""
    return json_sha256([{part: sorted(fold[part]) for part in ("train", "val")} for fold in splits])


def resolve_configuration(plans: Mapping[str, Any], configuration: str) -> dict[str, Any]:
    """A configuration of nnU-Net plans with everything it inherits (``inherits_from``).

    Raises:
        ValueError: the plans have no such configuration, or it inherits from itself.
    """
    chain: list[str] = []
    settings: dict[str, Any] = {}
    name: str | None = configuration
    while name is not None:
        if name not in plans["configurations"] or name in chain:
            known = ", ".join(plans["configurations"])
            raise ValueError(
                f"Configuration '{name}' is not in the plans, or inherits from itself; plans have: {known}."
            )
        chain.append(name)
        settings = {**plans["configurations"][name], **settings}
        name = plans["configurations"][name].get("inherits_from")
    return settings


def preprocessing_sha256(plans: Mapping[str, Any], configuration: str) -> str:
    """Fingerprint of what determines the geometry and the intensities of the preprocessed images.

    Raises:
        ValueError: the plans have no such configuration.
    """
    settings = resolve_configuration(plans, configuration)
    return json_sha256(
        {key: plans.get(key) for key in PLANS_KEYS} | {key: settings.get(key) for key in CONFIGURATION_KEYS}
    )
