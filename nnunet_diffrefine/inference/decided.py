"""A calibration's decisions on disk: ``refinement.json``, the gate in ``plans.json``, and whether both still hold."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name

from nnunet_diffrefine.calibration.record import DECISIONS, FILE, Record
from nnunet_diffrefine.inference.model import Model
from nnunet_diffrefine.networks.gate import Gate
from nnunet_diffrefine.paths import StageOneId, model_folder
from nnunet_diffrefine.plans import read_block, with_gate
from nnunet_diffrefine.stage_one.fingerprint import file_sha256
from nnunet_diffrefine.stage_one.manifest import write_atomically


def calibrate_command(dataset: str, refiner: StageOneId) -> str:
    """The command line that calibrates a refiner, for messages."""
    line = f"nnUNetv2_diffrefine calibrate -d {dataset} -c {refiner.configuration} -tr {refiner.trainer}"
    return f"{line} -p {refiner.plans}"


def read_record(dataset: str, refiner: StageOneId) -> Record | None:
    """The record of a refiner, or None.

    Raises:
        RuntimeError: it is damaged.
    """
    name = maybe_convert_to_dataset_name(dataset)
    folder = model_folder(name, refiner)
    return Record.read(folder, f"Delete it and calibrate again: {calibrate_command(name, refiner)}")


def put_down(record: Record, folder: Path, configuration: str) -> None:
    """Write the record, and its gate into the model folder's plans; each file as a whole."""
    record.write(folder)
    file = folder / "plans.json"
    plans = with_gate(json.loads(file.read_text()), configuration, record.gate)
    write_atomically(file, json.dumps(plans, indent=4).encode())


def override(dataset: str, refiner: StageOneId, pairs: Sequence[str]) -> Record:
    """Write a user's decisions, ``CLASS=refine``, ``=keep`` or ``=measured``; CLASS is a name, a number or ``all``.

    Raises:
        ValueError: no such class or decision.
        RuntimeError: the refiner was never calibrated.
    """
    record = read_record(dataset, refiner)
    if record is None:
        command = calibrate_command(dataset, refiner)
        raise RuntimeError(f"--set changes decisions that calibrate made, and there are none yet. Calibrate: {command}")
    changes: dict[str, str] = {}
    for pair in pairs:
        key, _, decision = pair.rpartition("=")
        if decision not in DECISIONS or not key:
            raise ValueError(f"--set got '{pair}'; wanted CLASS=DECISION, with a decision of {', '.join(DECISIONS)}.")
        changes |= dict.fromkeys(_classes(key, list(record.classes)), decision)
    record = record.decided(changes)
    put_down(record, model_folder(maybe_convert_to_dataset_name(dataset), refiner), refiner.configuration)
    return record


def _classes(key: str, names: list[str]) -> list[str]:
    if key in names:
        return [key]
    if key == "all":
        return names
    if key.isdigit() and 1 <= int(key) <= len(names):
        return [names[int(key) - 1]]
    numbered = ", ".join(f"{number} or '{name}'" for number, name in enumerate(names, 1))
    raise ValueError(f"--set names class '{key}', which there is not. Classes: {numbered}, or all.")


def with_record(model: Model, refiner: StageOneId, folds: Sequence[int], checkpoint: str, gate: bool) -> Model:
    """The model with its calibration, if there is one; ``gate=False`` refines every class.

    Raises:
        RuntimeError: it was calibrated on other checkpoints, or its record is damaged. Without gate the record of
            other checkpoints is left out instead.
    """
    dataset = model.plans["dataset_name"]
    command = calibrate_command(dataset, refiner)
    record = Record.read(model.folder, f"Delete it and calibrate again: {command}")
    if not gate:
        model.network.gate = Gate(model.network.foreground)
    if record is None:
        return model
    if (reason := _stale(record, model, folds, checkpoint)) is None:
        return replace(model, record=record)
    if gate:
        raise RuntimeError(f"{model.folder / FILE} does not hold for this model: {reason}. Calibrate again: {command} "
                           "(or refine every class, without calibrated maps: --no_gate)")  # fmt: skip
    print(f"Not calibrated: {reason}.")
    return model


def other_decisions(record: Record, gate: Gate) -> list[str]:
    """Classes on which a gate decides otherwise than the calibration's results were measured with."""
    found = []
    for channel, (name, c) in enumerate(record.classes.items()):
        measured = "keep" if c.measured == "keep" else c.offset
        offset = gate.offsets[channel] if gate.offsets else 0.0
        if measured != ("keep" if channel in gate.unchanged else offset):
            found.append(name)
    return found


def _stale(record: Record, model: Model, folds: Sequence[int], checkpoint: str) -> str | None:
    """Why a record does not hold, or None."""
    if record.checkpoint != checkpoint:
        return f"{record.checkpoint} was calibrated, not {checkpoint} (-chk)"
    if tuple(record.classes) != model.network.foreground.names:
        return f"it is of classes {list(record.classes)}"
    if missing := [fold for fold in folds if str(fold) not in record.checkpoints]:
        return f"fold(s) {missing} were not calibrated, only {record.folds}"
    changed = [
        fold for fold in folds
        if file_sha256(model.folder / f"fold_{fold}" / checkpoint) != record.checkpoints[str(fold)]
    ]  # fmt: skip
    if changed:
        return f"the {checkpoint} of fold(s) {changed} changed since"
    settings, _ = read_block(model.settings.configuration)
    given = {"unchanged": settings.gate.unchanged, "offsets": settings.gate.offsets}
    return None if given == record.gate else f"the gate in plans.json is {given}, the record's is {record.gate}"
