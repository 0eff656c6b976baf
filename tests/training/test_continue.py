"""``--c`` and ``--val``: a checkpoint is loaded into the training that it is of, or refused before anything changes."""

import json
from dataclasses import replace

import pytest
import torch

from nnunet_diffrefine.config import BLOCK, ConfigError
from nnunet_diffrefine.networks.denoiser import TimeConditionedUNet
from nnunet_diffrefine.paths import StageOneId, fold_folder, model_folder, preprocessed_dataset, splits_file
from nnunet_diffrefine.plans import with_gate
from nnunet_diffrefine.stage_one.fingerprint import file_sha256, splits_sha256
from nnunet_diffrefine.stage_one.leak import LeakError
from nnunet_diffrefine.stage_one.manifest import FoldRecord, Manifest
from nnunet_diffrefine.stage_one.origin import ORIGIN
from nnunet_diffrefine.training.trainer import DiffRefineTrainer
from tests.stage_one import conftest as tiny_dataset
from tests.stage_one.tiny import (
    DATASET,
    DATASET_JSON,
    SPLITS,
    STAGE_ONE,
    tiny_plans,
    write_checkpoint,
    write_image,
    write_json,
)

folders, paper = tiny_dataset.folders, tiny_dataset.paper
OWN = StageOneId("DiffRefineTrainer", "nnUNetPlans", "3d_fullres")


def export(paper, seed=0, **changes):
    """Stage one's folds, trained and exported anew."""
    manifest = replace(Manifest.read(paper.folder), **changes)
    for fold in range(len(SPLITS)):
        file = write_checkpoint(fold, seed=seed + fold)
        record = FoldRecord(file.name, file_sha256(file), file.stat().st_size)
        manifest = replace(manifest, folds={**manifest.folds, fold: record})
    architecture = tiny_plans()["configurations"]["3d_fullres"]["architecture"]
    replace(manifest, stage_one=replace(manifest.stage_one, architecture=architecture)).write(paper.folder)


@pytest.fixture
def data(paper):
    """The tiny dataset, with a stage one of untrained networks."""
    images = preprocessed_dataset(DATASET) / "nnUNetPlans_3d_fullres"
    images.mkdir()
    write_image(images / "c0", seed=0)
    export(paper)
    return paper


def trainer_of(fold=0, **block):
    plans = {**tiny_plans(), "continue_training": False}  # nnU-Net says so with --val
    plans["configurations"]["3d_fullres"] |= {"batch_dice": False, BLOCK: block}
    return DiffRefineTrainer(plans, "3d_fullres", fold, DATASET_JSON, torch.device("cpu"))


@pytest.fixture
def saved(data):
    """A checkpoint, and the weights that it holds."""
    trainer = trainer_of()
    trainer.initialize()
    with torch.no_grad():
        for parameter in trainer.denoiser.parameters():
            parameter.add_(0.5)
    for name in ("train_losses", "val_losses", "mean_fg_dice", "ema_fg_dice"):
        trainer.logger.log(name, 0.5, 0)
    file = fold_folder(DATASET, OWN, 0) / "checkpoint_final.pth"
    trainer.save_checkpoint(str(file))
    write_json(model_folder(DATASET, OWN) / "plans.json", trainer.plans_manager.plans)
    return file, {name: value.clone() for name, value in trainer.denoiser.state_dict().items()}


def refused(file, trainer, *words, error=RuntimeError):
    """Loading fails with exactly ``error``, says ``words``, and no weight has changed."""
    trainer.initialize()
    before = {name: value.clone() for name, value in trainer.network.state_dict().items()}
    with pytest.raises(error) as caught:
        trainer.load_checkpoint(str(file))
    assert caught.type is error
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert all(torch.equal(value, before[name]) for name, value in trainer.network.state_dict().items())


def test_the_same_training_goes_on(saved):
    file, weights = saved
    trainer = trainer_of()
    trainer.load_checkpoint(str(file))
    assert all(torch.equal(value, weights[name]) for name, value in trainer.denoiser.state_dict().items())


def test_what_a_new_training_would_start_from_does_not_matter(saved, monkeypatch):
    """Folds that earlier versions let begin with a part of stage one's weights go on."""

    def refuse(*_, **__):
        raise ConfigError("another architecture")

    monkeypatch.setattr(TimeConditionedUNet, "start_from", refuse)
    trainer_of().load_checkpoint(str(saved[0]))
    with pytest.raises(ConfigError):
        trainer_of().initialize()


def test_another_stage_one_is_refused(data, saved):
    """Otherwise the old one would come back from the checkpoint, and the new one's priors be trained on."""
    export(data, seed=7)
    words = f"Fold 0 of {OWN.name} contains another stage one", "folder without checkpoints", "restore the export"
    refused(saved[0], trainer_of(), *words, f"nnUNetv2_train {DATASET} 3d_fullres 0 -tr {OWN.trainer}")


def test_another_split_is_refused(data, saved):
    write_json(splits_file(DATASET), SPLITS[::-1])
    cases = {name: replace(case, fold=1 - case.fold) for name, case in data.manifest.cases.items()}
    export(data, cases=cases, splits_sha256=splits_sha256(SPLITS[::-1]))
    refused(saved[0], trainer_of(), f"Fold 0 of {OWN.name} was trained with other cases", error=LeakError)


def test_what_an_earlier_version_did_not_record_stays_unknown(data, saved):
    file, _ = saved
    checkpoint = torch.load(file, weights_only=False)
    assert checkpoint[BLOCK].pop(ORIGIN)["stage_one"] == file_sha256(
        fold_folder(DATASET, STAGE_ONE, 0) / "checkpoint_final.pth"
    )
    torch.save(checkpoint, file)
    export(data, seed=7)
    trainer = trainer_of()
    trainer.load_checkpoint(str(file))
    trainer.save_checkpoint(str(file))
    assert torch.load(file, weights_only=False)[BLOCK][ORIGIN] == {}


@pytest.mark.parametrize(
    ("block", "differing"), [({"sampling": {"steps": 2}}, "(sampling)"), ({"training": {"warmup": 0.2}}, "(training)")]
)
def test_other_settings_are_refused_in_the_only_fold_too(saved, block, differing):
    refused(saved[0], trainer_of(**block), "fold 0", differing, "-o NEW_PLANS", "-p NEW_PLANS")


def test_no_training_sees_the_gate_and_the_model_folder_keeps_it(saved):
    """Whatever the number of folds: a validation shows the refiner as it is."""
    file, _ = saved
    gate, plans = {"unchanged": ["core", "rim"], "offsets": {}}, model_folder(DATASET, OWN) / "plans.json"
    write_json(plans, with_gate(json.loads(plans.read_text()), "3d_fullres", gate))
    first, second = trainer_of(), trainer_of(fold=1)
    first.load_checkpoint(str(file))
    second.initialize()
    image = torch.randn(1, 1, 8, 8, 8)
    for trainer in (first, second):
        network = trainer.network.eval()
        trainer.set_deep_supervision_enabled(False)
        stage_one = network.stage_one_logits(image)
        assert torch.equal(network(image), network.refined(image, stage_one))
        assert not network.gate.unchanged
    assert second.plans_manager.plans["configurations"]["3d_fullres"][BLOCK]["gate"] == gate
