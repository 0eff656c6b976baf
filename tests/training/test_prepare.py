"""Before a refiner fold trains: what cannot work is refused, with what mends it, and without a trace on disk."""

import argparse
import copy
import json
import os
import re
import shlex
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_diffrefine import plan_command
from nnunet_diffrefine.batch import Foreground
from nnunet_diffrefine.config import BLOCK, ConfigError, RefineConfig
from nnunet_diffrefine.methods import METHODS
from nnunet_diffrefine.paths import (
    StageOneId,
    environment_folder,
    export_folder,
    exports_folder,
    fold_folder,
    model_folder,
    preprocessed_dataset,
    splits_file,
)
from nnunet_diffrefine.plans import merge, preset, read_block, with_gate, write_variant
from nnunet_diffrefine.stage_one.leak import LeakError
from nnunet_diffrefine.stage_one.manifest import ForegroundRecord
from nnunet_diffrefine.stage_one.store import dequantise
from nnunet_diffrefine.training.prepare import prepare
from tests.stage_one import conftest as tiny_dataset
from tests.stage_one.tiny import (
    DATASET,
    DATASET_JSON,
    SPLITS,
    STAGE_ONE,
    mended_by,
    soft_sphere,
    tiny_plans,
    write_json,
)

folders, paper = tiny_dataset.folders, tiny_dataset.paper

OTHER = StageOneId("nnUNetTrainer", "nnUNetResEncUNetMPlans", "3d_fullres")
LONGER = StageOneId("nnUNetTrainer_2000epochs", "nnUNetPlans", "3d_fullres")
LARGE = {"inherits_from": "3d_fullres", "batch_size": 4}


def plans_of(name="nnUNetPlans", configurations=None, **block):
    """The tiny plans under a name, with more configurations and a block in ``3d_fullres``."""
    plans = tiny_plans()
    plans["plans_name"] = name
    plans["configurations"].update(configurations or {})
    if block:
        plans["configurations"]["3d_fullres"][BLOCK] = block
    return plans


def prepared(plans=None, configuration="3d_fullres", fold=0, dataset_json=DATASET_JSON, method="bridge"):
    return prepare(METHODS[method].trainer, method, plans or plans_of(), configuration, fold, dataset_json)


def refiner_folder(plans="nnUNetPlans"):
    return model_folder(DATASET, StageOneId(METHODS["bridge"].trainer, plans, "3d_fullres"))


def on_disk():
    """Every file's content, and every folder, below nnU-Net's three folders."""
    root = environment_folder("nnUNet_results").parent
    return {path: path.read_bytes() if path.is_file() else None for path in root.rglob("*")}


def refused(*words, error=RuntimeError, **given):
    """``prepare`` fails with exactly ``error``, says ``words``, and nothing on disk has changed; the message."""
    before = on_disk()
    with pytest.raises(error) as caught:
        prepared(**given)
    assert caught.type is error
    assert on_disk() == before
    message = str(caught.value)
    for word in words:
        assert str(word) in message
    return message


def export_also(paper, stage_one):
    """A second intact export, of another stage one with the same weights and priors."""
    shutil.copytree(paper.models, model_folder(DATASET, stage_one))
    shutil.copytree(paper.folder, export_folder(DATASET, stage_one))
    record = replace(paper.manifest.stage_one, **asdict(stage_one))
    replace(paper.manifest, stage_one=record).write(export_folder(DATASET, stage_one))


def chosen(**given):
    """The stage one that is refined; checkpoint, priors and record must agree on it."""
    ready = prepared(**given)
    stage_one = StageOneId(*(ready.resolved.stage_one[key] for key in ("trainer", "plans", "configuration")))
    assert ready.store.folder == export_folder(DATASET, stage_one)
    assert ready.checkpoint.parent.parent == model_folder(DATASET, stage_one)
    return stage_one


def follow(message):
    """Write the plans that the ``plan`` command of a message writes, and return them."""
    parser = argparse.ArgumentParser()
    plan_command.register(parser.add_subparsers())
    (line,) = re.findall(r"^ *nnUNetv2_diffrefine (plan .*)$", message, re.MULTILINE)
    args = parser.parse_args(shlex.split(line))
    file = write_variant(args.d, args.p, args.o, args.c, args.method, plan_command.parse_changes(args.set))
    assert f"train with -p {args.o}" in message
    return json.loads(file.read_text())


# --- the intact case --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fold", [0, 1])
def test_each_fold_gets_its_own_checkpoint_and_the_priors(paper, fold):
    ready = prepared(fold=fold)
    assert ready.checkpoint == fold_folder(DATASET, STAGE_ONE, fold) / "checkpoint_final.pth"
    assert ready.checkpoint.read_text() == f"weights of fold {fold}"
    for case in (case for split in SPLITS for case in split["val"]):
        assert np.abs(dequantise(ready.store.read(case)[:]) - soft_sphere()).max() <= 0.5 / 255 + 1e-6


def test_the_checkpoint_is_the_one_that_was_exported(paper):
    renamed = paper.models / "fold_1" / "checkpoint_best.pth"
    (paper.models / "fold_1" / "checkpoint_final.pth").rename(renamed)
    record = replace(paper.manifest.folds[1], checkpoint=renamed.name)
    replace(paper.manifest, folds={**paper.manifest.folds, 1: record}).write(paper.folder)
    assert prepared(fold=1).checkpoint == renamed


@pytest.mark.parametrize("method", METHODS)
def test_settings_are_the_plans_block_over_the_preset(paper, method):
    ready = prepared(plans_of(method=method, sampling={"seed": 7}), method=method)
    assert ready.config == RefineConfig.from_dict(merge(preset(method), {"sampling": {"seed": 7}}))


def test_the_record_rebuilds_stage_one_after_a_round_trip_through_json(paper):
    built = {
        "builder": "TrainerThatBuilds",
        "architecture": tiny_plans()["configurations"]["3d_fullres"]["architecture"],
        "mirror_axes": [0, 2],
    }
    replace(paper.manifest, stage_one=replace(paper.manifest.stage_one, **built)).write(paper.folder)
    ready = prepared(plans_of(sampling={"steps": 3}))
    stage_one = ready.resolved.stage_one
    assert {key: stage_one[key] for key in built} == built
    assert (stage_one["trainer"], stage_one["plans"], stage_one["configuration"]) == tuple(STAGE_ONE.name.split("__"))
    written = PlansManager(json.loads(json.dumps(ready.plans)))
    config, resolved = read_block(written.get_configuration("3d_fullres").configuration)
    assert config == ready.config == RefineConfig.from_dict(merge(preset("bridge"), {"sampling": {"steps": 3}}))
    assert resolved.stage_one == stage_one
    assert resolved.channels() == ready.resolved.channels() == Foreground(("core", "rim"), True, None)


def test_regions_are_recorded_in_their_order(paper):
    regions = {**DATASET_JSON, "labels": {"background": 0, "whole": [2, 1], "core": 1, "ignore": 3}}
    replace(paper.manifest, foreground=ForegroundRecord.from_dataset_json(regions)).write(paper.folder)
    assert prepared(dataset_json=regions).resolved.channels() == Foreground(("whole", "core"), False, 3, (None, 0))


def test_only_the_block_is_new_in_the_plans_and_those_given_stay_as_they_were(paper):
    given = plans_of(sampling={"steps": 3})
    before = copy.deepcopy(given)
    ready = prepared(given)
    assert given == before
    assert ready.plans["configurations"]["3d_fullres"].pop(BLOCK) == {
        **ready.config.to_dict(),
        "resolved": asdict(ready.resolved),
    }
    del before["configurations"]["3d_fullres"][BLOCK]
    assert ready.plans == before


def test_preparing_writes_nothing(paper):
    before = on_disk()
    prepared()
    assert on_disk() == before


# --- which export -----------------------------------------------------------------------------------------------------


def test_without_an_export_the_command_that_makes_it_is_named(folders):
    message = refused("No out-of-fold predictions", exports_folder(DATASET))
    (mend,) = mended_by(message)
    assert (mend.d, mend.tr, mend.p, mend.c) == (DATASET, *STAGE_ONE.name.split("__"))


def test_the_command_exports_the_trainer_and_plans_of_the_settings(folders):
    wanted = {"trainer": "nnUNetTrainer_5epochs", "plans": "nnUNetResEncUNetMPlans"}
    (mend,) = mended_by(refused(plans=plans_of(stage_one=wanted)))
    assert (mend.d, mend.tr, mend.p, mend.c) == (DATASET, *wanted.values(), "3d_fullres")


def test_the_command_exports_the_configuration_of_the_settings(folders):
    (mend,) = mended_by(refused(plans=plans_of(stage_one={"configuration": "3d_lowres"})))
    assert mend.c == "3d_lowres"


def test_an_export_that_the_settings_do_not_mean_is_listed_not_taken(paper):
    message = refused(f"Exports there are: {STAGE_ONE.name}.", plans=plans_of(stage_one={"trainer": LONGER.trainer}))
    (mend,) = mended_by(message)
    assert mend.tr == LONGER.trainer


def test_an_export_of_other_plans_is_taken_when_none_fits_the_own_plans(paper):
    assert chosen(plans=plans_of("nnUNetResEncUNetMPlans")) == STAGE_ONE


def test_an_export_of_another_configuration_is_taken_when_there_is_no_other(paper):
    assert chosen(plans=plans_of(configurations={"3d_large": LARGE}), configuration="3d_large") == STAGE_ONE


@pytest.mark.parametrize("own", [STAGE_ONE, OTHER], ids=lambda one: one.plans)
def test_an_export_of_the_own_plans_wins(paper, own):
    export_also(paper, OTHER)
    assert chosen(plans=plans_of(own.plans)) == own


@pytest.mark.parametrize("wanted", [STAGE_ONE, OTHER], ids=lambda one: one.plans)
def test_settings_that_name_an_export_choose_it_whatever_the_own_plans_are(paper, wanted):
    export_also(paper, OTHER)
    assert chosen(plans=plans_of(stage_one={"plans": wanted.plans})) == wanted


def test_several_exports_are_listed_and_choosing_one_mends_it(paper):
    export_also(paper, LONGER)
    message = refused("Several stage ones", DATASET, STAGE_ONE.name, LONGER.name)
    assert chosen(plans=follow(message)) in (STAGE_ONE, LONGER)
    for one in (STAGE_ONE, LONGER):
        assert chosen(plans=plans_of(stage_one={"trainer": one.trainer})) == one


def test_choosing_mends_it_when_the_exports_differ_in_plans(paper):
    export_also(paper, OTHER)
    write_json(preprocessed_dataset(DATASET) / "nnUNetPlans_mine.json", plans_of("nnUNetPlans_mine"))
    message = refused(STAGE_ONE.name, OTHER.name, plans=plans_of("nnUNetPlans_mine"))
    assert chosen(plans=follow(message)) in (STAGE_ONE, OTHER)


def test_choosing_mends_it_when_exports_of_other_plans_have_the_same_trainer(paper):
    export_also(paper, LONGER)
    export_also(paper, replace(LONGER, plans=OTHER.plans))
    export_also(paper, OTHER)
    message = refused(STAGE_ONE.name, LONGER.name)
    assert chosen(plans=follow(message)) in (STAGE_ONE, LONGER)


def test_choosing_mends_it_for_every_method(paper):
    export_also(paper, LONGER)
    message = refused(STAGE_ONE.name, LONGER.name, method="mask_diffusion")
    assert chosen(plans=follow(message), method="mask_diffusion") in (STAGE_ONE, LONGER)


def test_a_folder_that_is_no_export_does_not_disturb(paper):
    shutil.copytree(paper.folder, exports_folder(DATASET) / "backup")
    assert chosen() == STAGE_ONE


# --- folds ------------------------------------------------------------------------------------------------------------


def test_fold_all_is_refused_with_the_reason(paper):
    refused("Fold 'all' cannot be refined", "no out-of-fold prediction", "Train folds 0..1 ", "-f 0 1.", fold="all")


@pytest.mark.parametrize("fold", [2, -1])
def test_a_fold_that_the_splits_do_not_define(paper, fold):
    refused(f"Fold {fold} is not in {splits_file(DATASET)}", "folds 0..1", fold=fold)


def test_missing_splits(paper):
    splits_file(DATASET).unlink()
    refused(splits_file(DATASET), f"nnUNetv2_train {DATASET} 3d_fullres 0 -tr nnUNetTrainer -p nnUNetPlans")


def test_broken_splits(paper):
    splits_file(DATASET).write_text('[{"train": ["c2"')
    refused(splits_file(DATASET), f"nnUNetv2_train {DATASET} 3d_fullres 0 -tr nnUNetTrainer -p nnUNetPlans")


def test_a_fold_without_validation_cases_that_was_not_exported(paper):
    splits = [*SPLITS, {"train": ["c0", "c1", "c2", "c3"], "val": []}]
    write_json(splits_file(DATASET), splits)
    paper.accept_splits(splits)
    paper.manifest.write(paper.folder)
    (mend,) = mended_by(refused("Fold 2", fold=2))
    assert mend.f == ["2"]


# --- configurations ---------------------------------------------------------------------------------------------------


def test_a_2d_configuration(paper):
    refused("Configuration '2d' is 2D", "3d_fullres", error=NotImplementedError, configuration="2d")


def test_a_configuration_that_inherits_a_2d_patch(paper):
    plans = plans_of(configurations={"2d_large": {"inherits_from": "2d", "batch_size": 4}})
    refused("'2d_large' is 2D", error=NotImplementedError, plans=plans, configuration="2d_large")


@pytest.mark.parametrize("name", ["3d_cascade", "3d_cascade_large"])
def test_a_cascade_stage_of_its_own_or_inherited(paper, name):
    plans = plans_of(configurations={"3d_cascade_large": {"inherits_from": "3d_cascade", "batch_size": 4}})
    refused(f"'{name}' is a cascade", "3d_fullres", error=NotImplementedError, plans=plans, configuration=name)


@pytest.mark.parametrize("missing", ["3d_fulres", "3d_large"])
def test_an_unknown_configuration_or_parent_is_answered_with_those_there_are(paper, missing):
    plans = plans_of(configurations={"3d_small": {"inherits_from": "3d_large"}})
    name = "3d_small" if missing == "3d_large" else missing
    refused(
        f"'{missing}' is not in the plans", *plans["configurations"], error=ValueError, plans=plans, configuration=name
    )


def test_a_configuration_that_inherits_from_itself(paper):
    plans = plans_of(configurations={"3d_loop": {"inherits_from": "3d_loop"}})
    refused("'3d_loop'", "inherits from itself", error=ValueError, plans=plans, configuration="3d_loop")


def test_an_heir_has_what_it_inherits_as_nnunet_resolves_it(paper):
    plans = plans_of(configurations={"3d_large": LARGE}, sampling={"steps": 3})
    ready = prepared(plans, "3d_large")
    written = PlansManager(json.loads(json.dumps(ready.plans)))
    assert read_block(written.get_configuration("3d_large").configuration)[0] == ready.config
    assert ready.config.sampling.steps == 3
    assert written.get_configuration("3d_large").patch_size == [8, 8, 8]
    assert ready.plans["configurations"]["3d_fullres"] == plans["configurations"]["3d_fullres"]


def test_an_heirs_own_block_replaces_the_inherited_one(paper):
    plans = plans_of(configurations={"3d_large": {**LARGE, BLOCK: {"sampling": {"seed": 5}}}}, sampling={"steps": 3})
    assert prepared(plans, "3d_large").config == RefineConfig.from_dict(
        merge(preset("bridge"), {"sampling": {"seed": 5}})
    )


# --- windows ---


def with_strides(paper, strides):
    architecture = tiny_plans()["configurations"]["3d_fullres"]["architecture"]
    architecture["arch_kwargs"]["strides"] = strides
    replace(paper.manifest, stage_one=replace(paper.manifest.stage_one, architecture=architecture)).write(paper.folder)


@pytest.mark.parametrize("strides", [[[1, 1, 1], [2, 2, 2], [1, 2, 8]], [1, 4, 4], [[1, 1], [2, 2]]])
def test_a_stage_one_that_cannot_run_in_the_windows(paper, strides):
    """Its network would fail in the validation, after all of the training."""
    with_strides(paper, strides)
    words = STAGE_ONE.name, "does not fit windows of [8, 8, 8]", "same plans", f"-p {STAGE_ONE.plans}"
    refused(*words, error=NotImplementedError)


@pytest.mark.parametrize("strides", [[[1, 1, 1], [2, 2, 2], [1, 4, 1]], [1, 2, 4], None])
def test_a_stage_one_that_can(paper, strides):
    with_strides(paper, strides)
    prepared()


# --- leaks and labels -------------------------------------------------------------------------------------------------


def test_a_leak_stops_the_training_before_its_folder_exists(paper):
    write_json(
        splits_file(DATASET),
        [{"train": ["c1", "c2"], "val": ["c0", "c3"]}, {"train": ["c0", "c3"], "val": ["c1", "c2"]}],
    )
    message = refused("splits_final.json changed", f"nnUNetv2_train {DATASET} 3d_fullres 0 ", error=LeakError)
    (mend,) = mended_by(message)
    assert (mend.d, mend.tr, mend.p, mend.c) == (DATASET, *STAGE_ONE.name.split("__"))
    assert not refiner_folder().exists()


@pytest.mark.parametrize("labels", [{"core": 1}, {"core": 1, "shell": 2}, {"core": 2, "rim": 1}])
def test_other_labels_than_the_export_has(paper, labels):
    dataset_json = {**DATASET_JSON, "labels": {"background": 0, **labels}}
    found = ", ".join(f"{name}={value}" for name, value in sorted(labels.items(), key=lambda item: item[1]))
    words = "2 classes (core=1, rim=2; ignore=None)", f"{len(labels)} classes ({found}; ignore=None)", "dataset.json"
    (mend,) = mended_by(refused(*words, error=LeakError, dataset_json=dataset_json))
    assert mend.tr == STAGE_ONE.trainer


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("block", "words"),
    [
        ({"sampling": {"step": 3}}, ["'sampling.step'", "Nearest valid one: 'sampling.steps'"]),
        ({"proces": {}}, ["'proces'", "Nearest valid one: 'process'"]),
        ({"sampling": {"steps": 11}}, ["'sampling.steps' is 11", "at most process.timesteps (10)"]),
        ({"training": {"learning_rate": "fast"}}, ["'training.learning_rate'"]),
    ],
)
def test_a_setting_that_cannot_be_used_is_named(paper, block, words):
    refused(*words, error=ConfigError, plans=plans_of(**block))


@pytest.mark.parametrize(("written", "used"), [("bridge", "mask_diffusion"), ("mask_diffusion", "bridge")])
def test_a_block_of_another_method(paper, written, used):
    words = f"for method '{written}'", f"for '{used}'", "Use the trainer of that method", "-p"
    refused(*words, error=ConfigError, plans=plans_of(method=written), method=used)


# --- one model folder, one set of settings ----------------------------------------------------------------------------


def train(fold, checkpoint="checkpoint_final.pth", **block):
    """Leave behind what the training of a fold leaves: the resolved plans and a checkpoint."""
    write_json(refiner_folder() / "plans.json", prepared(plans_of(**block), fold=fold).plans)
    folder = refiner_folder() / f"fold_{fold}"
    folder.mkdir()
    (folder / "training_log.txt").write_text("epoch 0")
    if checkpoint:
        (folder / checkpoint).write_bytes(b"weights")


@pytest.mark.parametrize("checkpoint", ["checkpoint_final.pth", "checkpoint_best.pth", "checkpoint_latest.pth"])
@pytest.mark.parametrize(
    ("block", "differing"),
    [
        ({"sampling": {"steps": 2}}, "(sampling)"),
        ({"training": {"recycling": 0.0}, "process": {"timesteps": 5}}, "(process, training)"),
    ],
)
def test_a_fold_with_other_settings_than_the_folds_there_are(paper, checkpoint, block, differing):
    train(0, checkpoint)
    words = (
        refiner_folder(),
        "holds fold_0 trained with",
        differing,
        "same settings",
        "-o NEW_PLANS",
        "-p NEW_PLANS",
    )
    refused(*words, plans=plans_of(**block), fold=1)


def test_another_stage_one_is_another_setting(paper):
    train(0)
    replace(paper.manifest, stage_one=replace(paper.manifest.stage_one, mirror_axes=None)).write(paper.folder)
    refused("holds fold_0 trained with", "(resolved)", fold=1)


def test_a_fold_that_continues_keeps_its_settings(paper):
    train(0, sampling={"steps": 2})
    anew, on = plans_of(sampling={"steps": 3}), plans_of(sampling={"steps": 3})
    anew["continue_training"], on["continue_training"] = False, True
    assert prepared(anew, fold=0).config.sampling.steps == 3
    refused("holds fold_0 trained with", "sampling", plans=on, fold=0)


def test_a_fold_with_the_same_settings_is_welcome(paper):
    train(0, sampling={"steps": 2})
    ready = prepared(plans_of(sampling={"steps": 2}), fold=1)
    assert json.loads(json.dumps(ready.plans)) == json.loads((refiner_folder() / "plans.json").read_text())


def test_a_folder_from_before_a_setting_existed_takes_further_folds(paper):
    train(0)
    file = refiner_folder() / "plans.json"
    plans = json.loads(file.read_text())
    del plans["configurations"]["3d_fullres"][BLOCK]["condition"]["skip"]
    write_json(file, plans)
    assert prepared(fold=1).config.condition.skip == "none"
    refused("(condition)", plans=plans_of(condition={"skip": "prior"}), fold=1)


GATE = {"unchanged": ["rim"], "offsets": {"core": 0.5}}


def gate_of(plans):
    return plans["configurations"]["3d_fullres"][BLOCK]["gate"]


def calibrate():
    """Leave behind what a calibration leaves in the plans."""
    file = refiner_folder() / "plans.json"
    write_json(file, with_gate(json.loads(file.read_text()), "3d_fullres", GATE))


def test_a_calibrated_folder_takes_further_folds_and_keeps_its_gate(paper):
    """The gate is no setting of a training, and a new plans.json must not open it."""
    train(0)
    calibrate()
    assert gate_of(prepared(fold=1).plans) == GATE
    continued = plans_of()
    continued["continue_training"] = True
    assert gate_of(prepared(continued, fold=0).plans) == GATE
    refused("holds fold_0 trained with", "(sampling)", plans=plans_of(sampling={"steps": 2}), fold=1)


def test_the_gate_of_folds_that_are_gone_is_gone(paper):
    train(0)
    calibrate()
    assert gate_of(prepared(fold=0).plans) == {"unchanged": [], "offsets": {}}


def test_the_only_fold_may_be_trained_again_with_other_settings(paper):
    train(0)
    assert prepared(plans_of(sampling={"steps": 2}), fold=0).config.sampling.steps == 2


def test_the_other_folds_refuse_a_fold_to_be_trained_again_with_other_settings(paper):
    train(0)
    train(1)
    refused("holds fold_1 trained with", "(sampling)", plans=plans_of(sampling={"steps": 2}), fold=0)


def test_a_fold_that_never_saved_a_checkpoint_does_not_bind_the_others(paper):
    train(0, checkpoint=None)
    assert prepared(plans_of(sampling={"steps": 2}), fold=1).config.sampling.steps == 2


def test_other_settings_are_welcome_under_another_plans_name(paper):
    train(0)
    assert prepared(plans_of("nnUNetPlans_mine", sampling={"steps": 2}), fold=1).config.sampling.steps == 2


# --- where the model will be written ----------------------------------------------------------------------------------


def closed(monkeypatch, folder):
    """Make one folder read-only, as ``os.access`` tells it: superusers may write everywhere."""
    real = os.access
    monkeypatch.setattr(
        os, "access", lambda path, mode, **kw: not (mode & os.W_OK and Path(path) == folder) and real(path, mode, **kw)
    )


def test_results_that_cannot_be_written_to(paper, monkeypatch):
    nearest = refiner_folder().parent
    closed(monkeypatch, nearest)
    refused(f"Cannot write the model to {refiner_folder()}: {nearest} is not", "permissions", "set nnUNet_results")


def test_a_model_folder_that_cannot_be_written_to(paper, monkeypatch):
    train(0)
    closed(monkeypatch, refiner_folder())
    refused(f"Cannot write the model to {refiner_folder()}: {refiner_folder()} is not", "set nnUNet_results", fold=1)


def test_a_file_where_the_model_folder_should_be(paper):
    refiner_folder().write_text("in the way")
    refused(f"{refiner_folder()} is not a folder", "set nnUNet_results")
