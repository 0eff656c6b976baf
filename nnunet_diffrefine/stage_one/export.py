"""Export of out-of-fold priors: each fold's model predicts the cases it was validated on, and never trained on.

The prediction is nnU-Net's own validation (``nnUNetTrainer.perform_actual_validation``): sliding window with half a
patch per step, Gaussian weighting, mirroring, on the preprocessed image; but its soft output is kept, in preprocessed
geometry. Any trained nnU-Net model can be exported; none has to be retrained.

A synthesis model (``ReCoSegSynthesisTrainer``) is exported alike: what is kept is by how much its channel differs.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class, nnUNetBaseDataset
from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from tqdm import tqdm

from nnunet_diffrefine.networks.recoseg import Synthesiser
from nnunet_diffrefine.paths import MANIFEST, StageOneId, export_folder, model_folder, residual_folder
from nnunet_diffrefine.stage_one.fingerprint import preprocessing_sha256, splits_sha256
from nnunet_diffrefine.stage_one.manifest import (
    ChannelRecord,
    FoldRecord,
    ForegroundRecord,
    Manifest,
    ModelRecord,
    update,
)
from nnunet_diffrefine.stage_one.preflight import (
    Sources,
    check_checkpoint,
    check_folds,
    check_held_out,
    check_preprocessed,
    read_sources,
)
from nnunet_diffrefine.stage_one.residual import residual_quantiles, stored_parts, synthesised_channel
from nnunet_diffrefine.stage_one.store import PriorStore

FINAL = "checkpoint_final.pth"
TILE_STEP_SIZE = 0.5


def export(
    dataset: str,
    stage_one: StageOneId,
    folds: Sequence[int | str] | None = None,
    num_parts: int = 1,
    part_id: int = 0,
    device: str = "cuda",
    checkpoint_name: str = FINAL,
) -> Manifest:
    """Export the out-of-fold priors of a stage one into ``nnUNet_preprocessed/DATASET/diffrefine/``.

    Of a synthesis model, what its channel differs by, into ``diffrefine_synthesis/``.

    Cases that are already exported, intact and by the same checkpoint are skipped. Several processes may export at
    once, each with its own ``part_id``.

    Args:
        dataset: name or id of the dataset.
        stage_one: trainer, plans and configuration of the model.
        folds: folds to export; None for all of the splits.
        num_parts: number of processes that share the work.
        part_id: which part this process does, 0 to ``num_parts`` - 1.
        device: ``cuda``, ``cpu`` or ``mps``.
        checkpoint_name: file name of the checkpoint in each fold's folder.

    Raises:
        ValueError: an argument cannot be used, or an image is not finite.
        RuntimeError: something on disk is missing or broken, or would make the priors leak (``LeakError``).
    """
    if not 0 <= part_id < num_parts:
        raise ValueError(f"part_id is {part_id}; it must be between 0 and num_parts - 1 ({num_parts - 1}).")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is 'cuda', but torch finds no CUDA device. Use -device cpu, or mps on a Mac.")
    dataset = maybe_convert_to_dataset_name(dataset)
    sources = read_sources(dataset, stage_one, checkpoint_name)
    chosen = check_folds(sources, folds)
    pairs = [(fold, case) for fold in chosen for case in sorted(sources.splits[fold]["val"])]
    dataset_class = _dataset_class(sources.data_folder)
    check_preprocessed(sources, dataset_class.get_identifiers(str(sources.data_folder)), [case for _, case in pairs])
    folder = (residual_folder if sources.channel else export_folder)(dataset, stage_one)
    folder.mkdir(parents=True, exist_ok=True)
    manifest = _begin(sources, chosen, folder)
    every = dataset_class(str(sources.data_folder), [case for _, case in pairs])
    todo = [pair for pair in pairs[part_id::num_parts] if not is_exported(manifest, PriorStore(folder), every, *pair)]
    with tqdm(total=len(todo), desc=f"export {stage_one.name}", unit="case", disable=not todo) as progress:
        for fold in sorted({fold for fold, _ in todo}):
            data = dataset_class(str(sources.data_folder), [case for of, case in todo if of == fold])
            export_cases(load_predictor(sources, fold, device), data, fold, folder, progress)
    manifest = Manifest.read(folder)
    print(summary(manifest, sources, folder))
    return manifest


def export_cases(
    predictor: nnUNetPredictor, data: nnUNetBaseDataset, fold: int, folder: Path, progress: tqdm | None = None
) -> None:
    """Predict and store every case of ``data``; the manifest in ``folder`` must know the fold's checkpoint.

    Args:
        predictor: initialised with the fold's network.
        data: nnU-Net's dataset of the cases to predict, none of which the network was trained on.
        fold: of the network.
        folder: of the export.
        progress: bar to advance after each case.

    Raises:
        ValueError: an image has values that are not finite.
    """
    store = PriorStore(folder)
    for case in data.identifiers:
        values = predict(predictor, data, case)
        record = store.write(case, values, fold)
        if channel := _channel(predictor):
            image = data.load_case(case)[0][:]
            record = replace(record, quantiles=residual_quantiles(values, image, channel.maximum))
        update(folder, lambda manifest: _known(manifest, folder).with_case(case, record))  # noqa: B023 (called at once)
        if progress is not None:
            progress.update()


def predict(predictor: nnUNetPredictor, data: nnUNetBaseDataset, case: str) -> np.ndarray:
    """Foreground probabilities (R, D, H, W), float32 in [0, 1], of a preprocessed case.

    Of a synthesis, excess and deficit of its channel, (2, D, H, W) in [0, 1].

    Raises:
        ValueError: the image has values that are not finite.
    """
    image = data.load_case(case)[0][:]
    if not np.isfinite(image).all():
        raise ValueError(f"The preprocessed image of case {case} has NaN or infinite values. Check the raw image.")
    tensor = torch.from_numpy(np.ascontiguousarray(image))
    logits = predictor.predict_sliding_window_return_logits(tensor)
    if channel := _channel(predictor):
        return stored_parts(logits, tensor, channel)
    probabilities = predictor.label_manager.apply_inference_nonlin(logits.cpu()).numpy()
    return probabilities if predictor.label_manager.has_regions else probabilities[1:]


def is_exported(manifest: Manifest, store: PriorStore, data: nnUNetBaseDataset, fold: int, case: str) -> bool:
    """Whether the manifest has the case from this fold, its file is intact and as large as the image is now."""
    record = manifest.cases.get(case)
    if record is None or record.fold != fold or not store.verify(case, record):
        return False
    return list(data.load_case(case)[0].shape[1:]) == record.shape[1:]


def load_predictor(sources: Sources, fold: int, device: str) -> nnUNetPredictor:
    """nnU-Net's predictor with one fold's checkpoint, set up as its own validation does."""
    with contextlib.redirect_stdout(io.StringIO()):  # its notes on device and trainer search would break the bar
        predictor = nnUNetPredictor(
            tile_step_size=TILE_STEP_SIZE,
            use_gaussian=True,
            use_mirroring=True,
            perform_everything_on_device=True,
            device=torch.device(device),
            allow_tqdm=False,
        )
        folder = str(model_folder(sources.dataset, sources.stage_one))
        predictor.initialize_from_trained_model_folder(folder, (fold,), sources.checkpoint_name)
    if sources.channel:
        predictor.network = Synthesiser(getattr(predictor.network, "_orig_mod", predictor.network))
        # The sliding window makes room for as many channels as there are heads.
        predictor.label_manager = SimpleNamespace(num_segmentation_heads=1)
    return predictor


def _channel(predictor: nnUNetPredictor) -> ChannelRecord | None:
    """The channel that the predictor synthesises, if it does."""
    if not isinstance(predictor.network, Synthesiser):
        return None
    return synthesised_channel(predictor.configuration_manager.configuration)


def summary(manifest: Manifest, sources: Sources, folder: Path) -> str:
    """One paragraph: how many cases, how many bytes, and what is still missing."""
    stored = sum(case.bytes for case in manifest.cases.values())
    images = sum(_image_bytes(sources.data_folder, case) for case in manifest.cases)
    wanted = {fold: set(split["val"]) for fold, split in enumerate(sources.splits)}
    missing = [str(fold) for fold, cases in wanted.items() if not cases <= manifest.cases.keys()]
    share = f" ({stored / images:.1%} of their preprocessed images)" if images else ""
    rest = f"Folds still missing or incomplete: {', '.join(missing)}." if missing else "All folds are complete."
    kind = f"syntheses of {manifest.channel.name}" if manifest.channel else "priors"
    return f"{len(manifest.cases)} out-of-fold {kind}, {stored / 1e6:.1f} MB{share}, in {folder}. {rest}"


def _image_bytes(data_folder: Path, case: str) -> int:
    files = (data_folder / f"{case}{ending}" for ending in (".b2nd", ".npz"))
    return sum(file.stat().st_size for file in files if file.is_file())


def _dataset_class(data_folder: Path) -> type[nnUNetBaseDataset]:
    try:
        return infer_dataset_class(str(data_folder))
    except (AssertionError, KeyError, FileNotFoundError) as error:
        raise RuntimeError(
            f"{data_folder} is not a folder of preprocessed cases ({error}). Run nnUNetv2_preprocess again."
        ) from error


def _begin(sources: Sources, folds: list[int], folder: Path) -> Manifest:
    """Check every checkpoint, then enter the folds; an earlier export from other sources is replaced."""
    earlier = Manifest.read(folder) if (folder / MANIFEST).is_file() else None
    records: dict[int, FoldRecord] = {}
    axes: dict[int, list[int] | None] = {}
    for fold in folds:
        records[fold], axes[fold] = check_checkpoint(sources, fold)
        check_held_out(sources, fold, records[fold], earlier)
    if any(axes[fold] != axes[folds[0]] for fold in folds):
        raise RuntimeError(f"The folds were trained with different mirroring axes, {axes}. Train them alike.")
    fresh = describe(sources, axes[folds[0]])

    def enter(manifest: Manifest | None) -> Manifest:
        if manifest is None or not manifest.same_source(fresh):
            if manifest is not None:
                print(f"{folder} was exported from other splits, data or network; it is exported anew.")
            manifest = fresh
        for fold, record in records.items():
            manifest = manifest.with_fold(fold, record)
        return manifest

    return update(folder, enter)


def describe(sources: Sources, mirror_axes: list[int] | None) -> Manifest:
    """The manifest of an export that has no fold and no case yet."""
    one = sources.stage_one
    with contextlib.redirect_stdout(io.StringIO()):
        trainer = recursive_find_trainer_class_by_name(one.trainer)
    builder = next(base.__name__ for base in trainer.__mro__ if "build_network_architecture" in vars(base))
    settings = PlansManager(sources.plans).get_configuration(one.configuration).configuration
    return Manifest(
        dataset=sources.dataset,
        stage_one=ModelRecord(
            one.trainer, one.plans, one.configuration, builder, settings["architecture"], mirror_axes, TILE_STEP_SIZE
        ),
        data_identifier=settings["data_identifier"],
        preprocessing_sha256=preprocessing_sha256(sources.plans, one.configuration),
        splits_sha256=splits_sha256(sources.splits),
        foreground=ForegroundRecord.from_dataset_json(sources.dataset_json),
        nnunetv2=version("nnunetv2"),
        channel=sources.channel,
    )


def _known(manifest: Manifest | None, folder: Path) -> Manifest:
    if manifest is None:
        raise RuntimeError(f"{folder / MANIFEST} vanished during the export. Run the export again.")
    return manifest
