"""Load a trained refiner for use on given priors: the network, each fold's weights, and its settings."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import Tensor, nn

from nnunet_diffrefine.calibration.record import Record
from nnunet_diffrefine.config import BLOCK, ConfigError
from nnunet_diffrefine.methods import METHODS
from nnunet_diffrefine.methods.composition import ComposedMethod
from nnunet_diffrefine.networks.refinement import RefinementNetwork
from nnunet_diffrefine.paths import StageOneId, model_folder
from nnunet_diffrefine.plans import read_block

STAGE_ONE = "stage_one."


@dataclass(frozen=True)
class Model:
    """A trained refiner.

    Attributes:
        network: without stage one; :meth:`folds` loads weights into it.
        weights: state of the network less stage one, one a fold.
        plans: nnU-Net's plans of the model folder, with the sampling settings in use.
        configuration: name of the configuration.
        dataset_json: of the model folder.
        folder: the model folder.
        record: of the calibration that holds for these folds, or None.
    """

    network: RefinementNetwork
    weights: Sequence[Mapping[str, Tensor]]
    plans: dict[str, Any]
    configuration: str
    dataset_json: dict[str, Any]
    folder: Path
    record: Record | None = None

    @property
    def method(self) -> ComposedMethod:
        """The method of the network."""
        return cast(ComposedMethod, self.network.method)

    @property
    def settings(self) -> Any:  # noqa: ANN401 (nnU-Net's ConfigurationManager)
        """The configuration, with what it inherits."""
        return PlansManager(self.plans).get_configuration(self.configuration)

    @property
    def patch(self) -> tuple[int, int, int]:
        """Size of a window."""
        return cast("tuple[int, int, int]", tuple(self.settings.patch_size))

    @property
    def labels(self) -> Any:  # noqa: ANN401 (nnU-Net's LabelManager)
        """nnU-Net's label manager."""
        return PlansManager(self.plans).get_label_manager(self.dataset_json)

    def folds(self) -> Iterator[RefinementNetwork]:
        """The network with each fold's weights in turn."""
        for weights in self.weights:
            self.network.load_state_dict(weights)
            yield self.network


def load_model(
    dataset: str,
    identity: StageOneId,
    folds: Sequence[int],
    checkpoint_name: str,
    sampling: Mapping[str, int | None],
    device: torch.device,
) -> Model:
    """Load a refiner.

    Args:
        dataset: name or id.
        identity: trainer, plans and configuration of the refiner.
        folds: to average over.
        checkpoint_name: file in each fold's folder.
        sampling: settings to use instead of the model's own; None keeps that.
        device: of the denoiser.

    Raises:
        ValueError: a sampling setting cannot be used (``ConfigError``).
        RuntimeError: the model is missing, of another dataset, or no refiner.
    """
    dataset = maybe_convert_to_dataset_name(dataset)
    folder = model_folder(dataset, identity)
    if not (folder / "plans.json").is_file():
        raise RuntimeError(f"There is no trained model {folder}. Train it: nnUNetv2_train ... -tr {identity.trainer}")
    dataset_json = json.loads((folder / "dataset.json").read_text())
    plans = json.loads((folder / "plans.json").read_text())
    if plans.get("dataset_name") != dataset:
        raise RuntimeError(f"{folder} is a model of {plans.get('dataset_name')}, not of {dataset} (-d).")
    if identity.configuration not in plans["configurations"]:
        raise RuntimeError(f"{folder / 'plans.json'} has no configuration {identity.configuration} (-c).")
    plans = with_sampling(plans, identity.configuration, sampling)
    files = _checkpoints(folder, folds, checkpoint_name)
    states = [_weights(file, identity, fold) for fold, file in zip(folds, files, strict=True)]
    network = _network(identity, plans, dataset_json)
    for file, state in zip(files, states, strict=True):
        _load(network, state, file)
    network.stage_one = nn.Identity()  # its predictions are given
    kept = [{key: value for key, value in state.items() if not key.startswith(STAGE_ONE)} for state in states]
    return Model(network.to(device).eval(), kept, plans, identity.configuration, dataset_json, folder)


def with_sampling(plans: dict[str, Any], configuration: str, sampling: Mapping[str, int | None]) -> dict[str, Any]:
    """Copy of a trained refiner's plans with other sampling settings.

    Raises:
        ConfigError: the plans are not those of a trained refiner.
    """
    settings = PlansManager(plans).get_configuration(configuration).configuration
    if (method := settings.get(BLOCK, {}).get("method", "bridge")) not in METHODS:
        raise ConfigError(f"These plans (-p) are of a model of '{method}', which takes no predictions to refine.")
    read_block(settings)
    block = deepcopy(settings[BLOCK])
    given = {key: value for key, value in sampling.items() if value is not None}
    block["sampling"] = {**block.get("sampling", {}), **given}
    plans = deepcopy(plans)
    plans["configurations"][configuration][BLOCK] = block
    read_block(plans["configurations"][configuration])
    return plans


def trained_folds(folder: Path, checkpoint_name: str) -> list[int]:
    """The folds of a model folder that have a checkpoint of this name."""
    names = [file.parent.name.removeprefix("fold_") for file in folder.glob(f"fold_*/{checkpoint_name}")]
    return sorted(int(name) for name in names if name.isdigit())


def _checkpoints(folder: Path, folds: Sequence[int], name: str) -> list[Path]:
    files = [folder / f"fold_{fold}" / name for fold in folds]
    if missing := [str(fold) for fold, file in zip(folds, files, strict=True) if not file.is_file()]:
        trained = trained_folds(folder, name)
        has = f"-f {' '.join(map(str, trained))}" if trained else "none"
        raise RuntimeError(f"Fold(s) {' '.join(missing)} (-f) have no {name} in {folder}; trained folds: {has}.")
    return files


def _weights(file: Path, identity: StageOneId, fold: int) -> dict[str, Tensor]:
    checkpoint = read_checkpoint(file)
    of = checkpoint["init_args"]
    found = (checkpoint["trainer_name"], of.get("configuration"), of.get("fold"))
    wanted = (identity.trainer, identity.configuration, fold)
    if found != wanted:
        raise RuntimeError(f"{file} says it is (trainer, configuration, fold) {found}; wanted {wanted}. "
                           "It was copied from elsewhere.")  # fmt: skip
    weights: dict[str, Tensor] = checkpoint["network_weights"]
    return weights


def read_checkpoint(file: Path) -> dict[str, Any]:
    """Open a refiner's checkpoint without running code from it (PyTorch 2.5 and newer).

    Raises:
        RuntimeError: damaged, holding other things than tensors, numbers and text, or not of a refiner.
    """
    try:
        with _numbers_allowed():
            checkpoint = torch.load(file, map_location="cpu", weights_only=hasattr(torch.serialization, "safe_globals"))
    except Exception as error:  # torch and pickle raise a dozen kinds
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise RuntimeError(
            f"{file} is damaged, or not a checkpoint of nnU-Net: {reason} It was not loaded, because what else is in "
            "it might run code."
        ) from error
    keys = {"network_weights", "trainer_name", "init_args", BLOCK}
    if not isinstance(checkpoint, dict) or not keys <= checkpoint.keys():
        raise RuntimeError(f"{file} is no checkpoint of a refiner of this package (-tr): it lacks "
                           f"{', '.join(sorted(keys - set(checkpoint)))}.")  # fmt: skip
    return checkpoint


def _numbers_allowed() -> contextlib.AbstractContextManager[None]:
    """NumPy's numbers, which nnU-Net's logs hold, on top of what PyTorch trusts."""
    if not hasattr(torch.serialization, "safe_globals"):
        return contextlib.nullcontext()
    scalar: Any = np.float64(0).__reduce__()[0]
    types = [type(np.dtype(kind)) for kind in ("f2", "f4", "f8", "i4", "i8", "u1", "?")]
    names = [(scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    allowed: contextlib.AbstractContextManager[None] = torch.serialization.safe_globals([*names, np.dtype, *types])
    return allowed


def _network(identity: StageOneId, plans: dict[str, Any], dataset_json: dict[str, Any]) -> RefinementNetwork:
    manager = PlansManager(plans)
    configuration = manager.get_configuration(identity.configuration)
    channels = determine_num_input_channels(manager, configuration, dataset_json)
    heads = manager.get_label_manager(dataset_json).num_segmentation_heads
    with contextlib.redirect_stdout(io.StringIO()):  # notes of the trainer search
        trainer = recursive_find_trainer_class_by_name(identity.trainer)
    network: Any = trainer.build_network_architecture(
        manager, configuration, channels, heads, enable_deep_supervision=False
    )
    if not isinstance(network, RefinementNetwork) or not isinstance(network.method, ComposedMethod):
        raise RuntimeError(f"{identity.trainer} (-tr) does not train a refiner that takes priors.")
    return network


def _load(network: RefinementNetwork, state: dict[str, Tensor], file: Path) -> None:
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise RuntimeError(f"{file} does not fit the network that plans.json describes: {error}") from error
