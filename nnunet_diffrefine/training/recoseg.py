"""What ReCoSeg's two trainings need before they start: settings, channel, out-of-fold syntheses."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from nnunet_diffrefine.config import BLOCK, ConfigError
from nnunet_diffrefine.errors.maps import nesting_from_labels
from nnunet_diffrefine.methods.recoseg import Synthesis
from nnunet_diffrefine.methods.recoseg_settings import (
    RECOSEG,
    SYNTHESIS,
    ReCoSegConfig,
    SourceConfig,
    SynthesisConfig,
    channel_names,
    find_channel,
    to_dict,
)
from nnunet_diffrefine.paths import (
    StageOneId,
    fold_folder,
    model_folder,
    residual_folder,
    residuals_folder,
    splits_file,
)
from nnunet_diffrefine.plans import merge, shipped_settings
from nnunet_diffrefine.settings_block import read_settings
from nnunet_diffrefine.stage_one.fingerprint import resolve_configuration
from nnunet_diffrefine.stage_one.leak import open_export
from nnunet_diffrefine.stage_one.manifest import ChannelRecord, Manifest
from nnunet_diffrefine.stage_one.mending import train_commands
from nnunet_diffrefine.stage_one.residual import median_quantile
from nnunet_diffrefine.stage_one.splits import read_splits
from nnunet_diffrefine.stage_one.store import PriorStore
from nnunet_diffrefine.training.prepare import ID_KEYS, exported, refuse_mixed_settings, refuse_other_windows

STANDARDISED = ("ZScoreNormalization", "CTNormalization")
Config = TypeVar("Config", SynthesisConfig, ReCoSegConfig)


@dataclass(frozen=True)
class PreparedSynthesis:
    """Plans with the resolved block, settings, and the channel's record."""

    plans: dict[str, Any]
    config: SynthesisConfig
    channel: ChannelRecord


@dataclass(frozen=True)
class PreparedReCoSeg:
    """What the segmentation's trainer needs, all checked.

    Attributes:
        plans: plans with the resolved block.
        config: settings.
        manifest: of the out-of-fold syntheses.
        channel: the synthesised channel.
        store: the out-of-fold syntheses.
        checkpoint: the synthesis of this fold.
    """

    plans: dict[str, Any]
    config: ReCoSegConfig
    manifest: Manifest
    channel: ChannelRecord
    store: PriorStore
    checkpoint: Path

    def scale(self, cases: Sequence[str]) -> torch.Tensor:
        """What counts as the largest residual in SD: median over ``cases`` of their saturation quantile."""
        quantiles = {case: self.manifest.cases[case].quantiles or [1.0] for case in cases}
        return median_quantile(quantiles, self.config.residual.saturation)


def prepare_synthesis(
    trainer: str, plans: dict[str, Any], configuration: str, fold: int | str, dataset_json: dict[str, Any]
) -> PreparedSynthesis:
    """Resolve the settings of a synthesis training before anything is written.

    Raises:
        ConfigError: a setting cannot be used, or there is no such channel.
        NotImplementedError: a cascade configuration, or a channel that is not in standard deviations.
        RuntimeError: fold ``all``, or a fold that the splits do not define.
    """
    settled = _settled(plans, configuration)
    config = _settings(SynthesisConfig, settled, SYNTHESIS)
    index = find_channel(config.channel, dataset_json)
    names = channel_names(dataset_json)
    scheme = settled["normalization_schemes"][index]
    if scheme not in STANDARDISED:
        raise NotImplementedError(
            f"diffrefine setting 'channel' is {config.channel!r}, which these plans normalise by {scheme}. Residuals "
            f"are bounded in standard deviations, so it must be one of {', '.join(STANDARDISED)}: name the channel "
            "after its modality in dataset.json and preprocess again."
        )
    channel = ChannelRecord(names[index], index, len(names), config.maximum, to_dict(config))
    own = StageOneId(trainer, plans["plans_name"], configuration)
    _refuse_fold(plans["dataset_name"], own, fold)
    plans = _with_block(plans, configuration, to_dict(config), asdict(channel))
    folder = model_folder(plans["dataset_name"], own)
    refuse_mixed_settings(folder, fold, plans, configuration, to_dict(SynthesisConfig()))
    return PreparedSynthesis(plans, config, channel)


def prepare_recoseg(
    trainer: str, plans: dict[str, Any], configuration: str, fold: int | str, dataset_json: dict[str, Any]
) -> PreparedReCoSeg:
    """Resolve settings and synthesis, and check that every synthesis is out-of-fold, before anything is written.

    Raises:
        ConfigError: a setting cannot be used.
        NotImplementedError: a cascade configuration, or a synthesis whose windows cannot be this configuration's.
        RuntimeError: no export, several to choose from, fold ``all``, or a leak (:class:`LeakError`).
    """
    dataset = plans["dataset_name"]
    settled = _settled(plans, configuration)
    config = _settings(ReCoSegConfig, settled, RECOSEG)
    own = StageOneId(trainer, plans["plans_name"], configuration)
    _refuse_fold(dataset, own, fold)
    synthesis = find_synthesis(dataset, config.synthesis, own)
    folder = residual_folder(dataset, synthesis)
    manifest, store = open_export(dataset, synthesis, plans, configuration, dataset_json, folder)
    if (channel := manifest.channel) is None:
        raise RuntimeError(f"{folder} holds no synthesis, although it should. Delete it and export again.")
    refuse_other_windows(settled["patch_size"], manifest.stage_one)
    parents = nesting_from_labels(manifest.foreground.regions or ())
    resolved = {
        "foreground": asdict(replace(manifest.foreground.foreground, parents=parents)),
        "synthesis": asdict(manifest.stage_one),
        "channel": asdict(channel),
    }
    plans = _with_block(plans, configuration, to_dict(config), resolved)
    refuse_mixed_settings(model_folder(dataset, own), fold, plans, configuration, to_dict(ReCoSegConfig()))
    checkpoint = fold_folder(dataset, synthesis, fold) / manifest.folds[int(fold)].checkpoint
    return PreparedReCoSeg(plans, config, manifest, channel, store, checkpoint)


def find_synthesis(dataset: str, wanted: SourceConfig, own: StageOneId) -> StageOneId:
    """The exported synthesis that the settings name, else the only one for these plans, or at all.

    Raises:
        RuntimeError: none fits, or several do.
    """
    root = residuals_folder(dataset)
    found, fitting = exported(root, wanted, own)
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise RuntimeError(
            f"Several syntheses are exported for {dataset}: {', '.join(one.name for one in fitting)}. Choose one with "
            f"synthesis.trainer, synthesis.plans, synthesis.configuration in the plans' '{BLOCK}' block."
        )
    known = {key: getattr(own, key) if getattr(wanted, key) == "auto" else getattr(wanted, key) for key in ID_KEYS}
    if wanted.trainer == "auto":
        known["trainer"] = Synthesis.trainer
    there = f" There are: {', '.join(one.name for one in found)}." if found else ""
    raise RuntimeError(
        f"No out-of-fold synthesis in {root} for {own.name}.{there} Train it in every fold; each exports itself: "
        f"{train_commands(dataset, StageOneId(**known), _folds(dataset, own))}"
    )


def _settings(cls: type[Config], configuration: Mapping[str, Any], method: str) -> Config:
    """Settings to train with: the plans' own block, if there is one, over the method's preset."""
    block = {key: value for key, value in configuration.get(BLOCK, {}).items() if key != "resolved"}
    if block.get("method", method) != method:
        raise ConfigError(
            f"The diffrefine block is for method '{block['method']}', not for '{method}'. Use the trainer of that "
            "method, or other plans (-p)."
        )
    return read_settings(cls, merge(shipped_settings(method, block), block))


def _with_block(
    plans: dict[str, Any], configuration: str, settings: dict[str, Any], resolved: dict[str, Any]
) -> dict[str, Any]:
    plans = deepcopy(plans)
    plans["configurations"][configuration][BLOCK] = json.loads(json.dumps({**settings, "resolved": resolved}))
    return plans


def _settled(plans: dict[str, Any], configuration: str) -> dict[str, Any]:
    settled = resolve_configuration(plans, configuration)
    if settled.get("previous_stage"):
        raise NotImplementedError(
            f"Configuration '{configuration}' is a cascade stage, which ReCoSeg cannot use. Use 3d_fullres or 2d."
        )
    return settled


def _folds(dataset: str, own: StageOneId) -> range:
    """Folds of the splits; nnU-Net's five where it has not written them yet."""
    return range(len(read_splits(dataset, own))) if splits_file(dataset).is_file() else range(5)


def _refuse_fold(dataset: str, own: StageOneId, fold: int | str) -> None:
    folds = _folds(dataset, own)
    if fold == "all":
        raise RuntimeError(
            "Fold 'all' trains on every case, so no residual of it is out-of-fold, and neither training is possible. "
            f"Train the folds of the cross-validation: {train_commands(dataset, own, folds)}"
        )
    if int(fold) not in folds:
        raise RuntimeError(f"Fold {fold} is not in {splits_file(dataset)}, which defines folds 0..{folds[-1]}.")
