"""The ``diffrefine`` block of nnU-Net's plans: presets, what a user writes, and what a finished model records.

A block holds the settings of :class:`RefineConfig` and, once a trainer has resolved them against dataset and export,
a ``resolved`` entry (:class:`Resolved`) with all that is needed to rebuild the network without any other file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nnunet_diffrefine.batch import Foreground
from nnunet_diffrefine.config import BLOCK, ConfigError, RefineConfig
from nnunet_diffrefine.paths import preprocessed_dataset, resource_folder


@dataclass(frozen=True)
class Resolved:
    """What a model folder records beside the settings, so that it alone rebuilds the network.

    Attributes:
        foreground: the fields of :class:`Foreground`.
        stage_one: trainer, plans, configuration, builder, architecture and mirror_axes of stage one.
    """

    foreground: Mapping[str, Any]
    stage_one: Mapping[str, Any]

    def channels(self) -> Foreground:
        """The foreground channels."""
        values = dict(self.foreground)
        parents = tuple(values.get("parents", ()))
        return Foreground(tuple(values["names"]), values["exclusive"], values["ignore_label"], parents)


def preset(method: str) -> dict[str, Any]:
    """Read the shipped settings of a method, ``plans/<method>.json``.

    Raises:
        ConfigError: there is no such preset.
    """
    file = resource_folder("plans") / f"{method}.json"
    if not file.is_file():
        known = ", ".join(sorted(f.stem for f in file.parent.glob("*.json") if "." not in f.stem))
        raise ConfigError(f"No preset '{method}'. Shipped presets: {known}.")
    return json.loads(file.read_text())


PAPER_LITERAL = "paper_literal"


def shipped_settings(method: str, block: Mapping[str, Any]) -> dict[str, Any]:
    """The method's preset and, where ``block`` asks for it, the settings as its paper prints them on top.

    Raises:
        ConfigError: there is no such preset, or nothing in it to take literally.
    """
    if not block.get(PAPER_LITERAL):
        return preset(method)
    literal = f"{method}.{PAPER_LITERAL}"
    if not (resource_folder("plans") / f"{literal}.json").is_file():
        raise ConfigError(f"diffrefine setting '{PAPER_LITERAL}': method '{method}' has no such form; leave it false.")
    return merge(preset(method), preset(literal))


def read_block(configuration: Mapping[str, Any]) -> tuple[RefineConfig, Resolved]:
    """Settings and record of a trained model's configuration.

    Raises:
        ConfigError: the block is missing or was never resolved by a trainer.
    """
    block, resolved = _block(configuration)
    if resolved is None:
        raise ConfigError(
            f"These plans hold no resolved '{BLOCK}' block, so they do not belong to a trained refiner. "
            "Predict from the model folder that nnUNetv2_train -tr DiffRefineTrainer wrote."
        )
    return RefineConfig.from_dict(block), Resolved(**resolved)


def settings(configuration: Mapping[str, Any], method: str) -> RefineConfig:
    """Settings to train with: the plans' own block if there is one, over the method's preset.

    Raises:
        ConfigError: an unknown or ill-typed key, or a block written for another method.
    """
    block, _ = _block(configuration)
    _require_method(block, method)
    return RefineConfig.from_dict(merge(shipped_settings(method, block), block))


def _block(configuration: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The settings of a configuration's block, and what a trainer resolved, if one has."""
    block = configuration.get(BLOCK, {})
    if not isinstance(block, Mapping):
        raise ConfigError(f"The plans' '{BLOCK}' entry is {block!r}; it must be a group of settings.")
    values = dict(block)
    resolved = values.pop("resolved", None)
    return values, resolved


def _require_method(block: Mapping[str, Any], method: str) -> None:
    if block.get("method", method) != method:
        raise ConfigError(
            f"The diffrefine block is for method '{block['method']}', not for '{method}'. Use the trainer of that "
            "method (plan: -m), or other plans (-p)."
        )


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dictionaries merged, ``over`` winning."""
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def with_block(plans: dict[str, Any], configuration: str, config: RefineConfig, resolved: Resolved) -> dict[str, Any]:
    """Copy of ``plans`` whose ``configuration`` carries the resolved block."""
    plans = deepcopy(plans)
    plans["configurations"][configuration][BLOCK] = {**config.to_dict(), "resolved": asdict(resolved)}
    return plans


GATE = "gate"


def with_gate(plans: dict[str, Any], configuration: str, gate: Mapping[str, Any]) -> dict[str, Any]:
    """Copy of a trained model's ``plans`` with another ``gate`` section."""
    plans = deepcopy(plans)
    plans["configurations"][configuration][BLOCK][GATE] = dict(gate)
    return plans


def write_variant(
    dataset: str,
    source: str,
    name: str,
    configuration: str,
    method: str,
    changes: Mapping[str, Any],
    check: Callable[[Mapping[str, Any]], object] = RefineConfig.from_dict,
) -> Path:
    """Write ``nnUNet_preprocessed/DATASET/<name>.json``: the source plans plus a ``diffrefine`` block.

    Args:
        dataset: full dataset name.
        source: identifier of the plans to start from.
        name: identifier of the new plans, for ``nnUNetv2_train -p``.
        configuration: the 3D configuration to extend.
        method: whose preset the changes start from.
        changes: nested settings, as in :class:`RefineConfig`.
        check: reads the block as the method's trainer will.

    Raises:
        FileNotFoundError: the source plans do not exist.
        ConfigError: a setting cannot be used, or the source has no such configuration.
        FileExistsError: ``name`` exists with other content than an earlier variant of ours.
    """
    folder = preprocessed_dataset(dataset)
    plans = json.loads((folder / f"{source}.json").read_text())
    if configuration not in plans["configurations"]:
        raise ConfigError(
            f"Plans '{source}' have no configuration '{configuration}': {sorted(plans['configurations'])}."
        )
    target = folder / f"{name}.json"
    if target.exists() and not _is_variant(target):
        raise FileExistsError(f"{target} exists and is not a diffrefine variant; choose another name (-o).")
    before, _ = _block(plans["configurations"][configuration])
    wanted = merge(before, changes)
    block = merge(shipped_settings(method, wanted), wanted)
    _require_method(block, method)
    check(block)
    plans["plans_name"] = name
    plans["configurations"][configuration][BLOCK] = block
    temporary = target.with_suffix(".json.tmp")
    temporary.write_text(json.dumps(plans, indent=4))
    os.replace(temporary, target)
    return target


def _is_variant(file: Path) -> bool:
    return any(BLOCK in c for c in json.loads(file.read_text())["configurations"].values())
