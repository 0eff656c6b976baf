"""The export predicts with the right network, starts where it stopped, and refuses before it predicts anything."""

import copy
import itertools
import json

import numpy as np
import pytest
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_diffrefine.paths import (
    StageOneId,
    export_folder,
    fold_folder,
    model_folder,
    preprocessed_dataset,
    splits_file,
)
from nnunet_diffrefine.stage_one import export as module
from nnunet_diffrefine.stage_one.export import export
from nnunet_diffrefine.stage_one.leak import check_out_of_fold
from nnunet_diffrefine.stage_one.manifest import Manifest
from nnunet_diffrefine.stage_one.splits import LeakError
from nnunet_diffrefine.stage_one.store import PriorStore, dequantise
from tests.stage_one.tiny import (
    DATASET,
    DATASET_JSON,
    SPLITS,
    STAGE_ONE,
    mended_by,
    tiny_network,
    tiny_plans,
    write_checkpoint,
    write_image,
    write_json,
)

CASES = ["c0", "c1", "c2", "c3"]


@pytest.fixture
def predicted(monkeypatch):
    """Names of the cases that were predicted."""
    names = []
    real = module.predict

    def predict(predictor, data, case):
        names.append(case)
        return real(predictor, data, case)

    monkeypatch.setattr(module, "predict", predict)
    return names


def run(stage_one=STAGE_ONE, **arguments):
    return export(DATASET, stage_one, device="cpu", **arguments)


def image_of(case):
    folder = preprocessed_dataset(DATASET) / "nnUNetPlans_3d_fullres"
    return torch.from_numpy(np.asarray(module._dataset_class(folder)(str(folder), [case]).load_case(case)[0][:]))


def mirrored_logits(network, image):
    """Mean logits (H, D, H, W) over the eight mirrored copies of an image that fits into one patch."""
    network.eval()
    axes = [c for n in range(4) for c in itertools.combinations((2, 3, 4), n)]
    with torch.no_grad():
        return torch.stack([network(image[None].flip(a)).flip(a) for a in axes]).mean(0)[0]


def inner(probabilities):
    """The middle of a tile. Near its corners nnU-Net's half precision Gaussian weights leave few digits of a logit."""
    return probabilities[:, 2:-2, 2:-2, 2:-2]


def stored_prior(case):
    return dequantise(PriorStore(export_folder(DATASET, STAGE_ONE)).read(case)[:])


def test_a_prior_is_the_prediction_of_the_fold_that_held_the_case_out(models):
    """Against the softmax of the mirrored outputs of each fold's network, up to 8 bits and nnU-Net's half precision."""
    manifest = run()
    for case in CASES:
        fold = next(f for f, split in enumerate(SPLITS) if case in split["val"])
        own, other = (mirrored_logits(tiny_network(seed=f), image_of(case)).softmax(0)[1:] for f in (fold, 1 - fold))
        assert manifest.cases[case].fold == fold
        assert np.abs(inner(stored_prior(case) - own.numpy())).max() < 0.5 / 255 + 1e-3
        assert np.abs(inner(stored_prior(case) - other.numpy())).max() > 0.02


def test_a_prior_is_nnunets_own_validation_prediction_everywhere(models):
    """Several tiles a side; the predictor is set up line by line as ``perform_actual_validation`` does."""
    write_image(preprocessed_dataset(DATASET) / "nnUNetPlans_3d_fullres" / "c3", seed=5, size=13)
    run(folds=[1])
    plans = PlansManager(tiny_plans())
    predictor = nnUNetPredictor(
        tile_step_size=0.5, use_gaussian=True, use_mirroring=True, device=torch.device("cpu"), allow_tqdm=False
    )
    configuration = plans.get_configuration("3d_fullres")
    predictor.manual_initialization(
        tiny_network(seed=1), plans, configuration, None, DATASET_JSON, "nnUNetTrainer", (0, 1, 2)
    )
    theirs = predictor.predict_sliding_window_return_logits(image_of("c3")).float().softmax(0).numpy()
    ours = stored_prior("c3")
    assert np.abs(ours - theirs[1:]).max() <= 0.5 / 255 + 1e-6
    best = theirs.argmax(0)
    disagree = np.concatenate((1 - ours.sum(0, keepdims=True), ours)).argmax(0) != best
    runner_up = np.sort(theirs, 0)[-2]
    assert ((theirs.max(0) - runner_up)[disagree] <= 3 * 0.5 / 255).all()
    assert disagree.mean() < 0.02


def test_an_export_passes_the_leak_check_and_knows_its_model(models, capsys):
    manifest = run()
    folder = export_folder(DATASET, STAGE_ONE)
    check_out_of_fold(
        Manifest.read(folder),
        folder,
        SPLITS,
        model_folder(DATASET, STAGE_ONE),
        tiny_plans(),
        "3d_fullres",
        DATASET_JSON,
    )
    one = manifest.stage_one
    assert (one.stage_one, one.builder, one.mirror_axes) == (STAGE_ONE, "nnUNetTrainer", [0, 1, 2])
    assert one.architecture == tiny_plans()["configurations"]["3d_fullres"]["architecture"]
    assert "4 out-of-fold priors" in capsys.readouterr().out


def test_all_regions_are_stored(models):
    regions = {**DATASET_JSON, "labels": {"background": 0, "whole": [1, 2], "core": 2}, "regions_class_order": [1, 2]}
    for folder in (preprocessed_dataset(DATASET), model_folder(DATASET, STAGE_ONE)):
        write_json(folder / "dataset.json", regions)
    for fold in range(2):
        write_checkpoint(fold, seed=fold, dataset_json=regions)
    manifest = run()
    logits = mirrored_logits(tiny_network(seed=1, dataset_json=regions), image_of("c2"))
    assert manifest.foreground.names == ["whole", "core"]
    assert np.abs(inner(stored_prior("c2") - logits.sigmoid().numpy())).max() < 0.5 / 255 + 1e-3


def test_a_trainer_without_mirroring_is_exported_without(models):
    for fold in range(2):
        write_checkpoint(fold, seed=fold, inference_allowed_mirroring_axes=None)
    assert run().stage_one.mirror_axes is None
    with torch.no_grad():
        logits = tiny_network(seed=0).eval()(image_of("c0")[None])[0]
    assert np.abs(inner(stored_prior("c0") - logits.softmax(0)[1:].numpy())).max() < 0.5 / 255 + 1e-3


def test_the_builder_is_the_class_that_defines_the_network(models, monkeypatch):
    class OwnNetwork(nnUNetTrainer):
        build_network_architecture = staticmethod(nnUNetTrainer.build_network_architecture)

    class LongerTraining(OwnNetwork):
        pass

    sources = module.read_sources(DATASET, STAGE_ONE, module.FINAL)
    monkeypatch.setattr(module, "recursive_find_trainer_class_by_name", lambda name: LongerTraining)
    assert module.describe(sources, None).stage_one.builder == "OwnNetwork"


# Starting again


def test_a_second_run_predicts_nothing(models, predicted, capsys):
    first = run()
    predicted.clear()
    assert run() == first
    assert predicted == []
    assert "All folds are complete" in capsys.readouterr().out


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_bytes(b"half")])
def test_only_a_damaged_case_is_done_again(models, predicted, damage):
    first = run()
    damage(export_folder(DATASET, STAGE_ONE) / "c1.b2nd")
    predicted.clear()
    assert run() == first
    assert predicted == ["c1"]


def test_a_replaced_checkpoint_redoes_its_fold_only(models, predicted):
    first = run()
    write_checkpoint(1, seed=7)
    predicted.clear()
    second = run()
    assert predicted == ["c2", "c3"]
    assert second.folds[0] == first.folds[0]
    assert second.folds[1] != first.folds[1]
    assert second.cases["c2"] != first.cases["c2"]


def test_an_image_of_another_size_is_done_again(models, predicted):
    run()
    write_image(preprocessed_dataset(DATASET) / "nnUNetPlans_3d_fullres" / "c3", seed=0, size=10)
    predicted.clear()
    assert run().cases["c3"].shape == [2, 10, 10, 10]
    assert predicted == ["c3"]


def test_a_crash_loses_one_case_at_most(models, predicted, monkeypatch):
    real = PriorStore.write

    def write(self, case, *rest):
        if case == "c2":
            raise KeyboardInterrupt
        return real(self, case, *rest)

    monkeypatch.setattr(PriorStore, "write", write)
    with pytest.raises(KeyboardInterrupt):
        run()
    assert Manifest.read(export_folder(DATASET, STAGE_ONE)).cases.keys() == {"c0", "c1"}
    monkeypatch.setattr(PriorStore, "write", real)
    predicted.clear()
    assert list(run().cases) == CASES
    assert predicted == ["c2", "c3"]


def test_folds_may_be_exported_one_by_one(models, predicted, capsys):
    run(folds=[1])
    assert predicted == ["c2", "c3"]
    assert "Folds still missing or incomplete: 0." in capsys.readouterr().out
    assert run(folds=[0]).cases.keys() == set(CASES)


def test_parts_share_the_cases_without_overlap(models, predicted):
    run(num_parts=2, part_id=1)
    other = list(predicted)
    run(num_parts=2, part_id=0)
    assert sorted(predicted) == CASES
    assert len(other) == 2


def test_other_splits_after_a_new_training_start_a_new_export(models, predicted):
    run()
    splits = [{"train": ["c1", "c3"], "val": ["c0", "c2"]}, {"train": ["c0", "c2"], "val": ["c1", "c3"]}]
    write_json(splits_file(DATASET), splits)
    for fold in range(2):
        write_checkpoint(fold, seed=10 + fold)
    predicted.clear()
    manifest = run()
    assert sorted(predicted) == CASES
    assert {case: record.fold for case, record in manifest.cases.items()} == {"c0": 0, "c2": 0, "c1": 1, "c3": 1}


# Refusals


@pytest.fixture
def refused(models, predicted):
    """Run the export, expect the error, and check that nothing was predicted or begun."""

    def check(kind, match, **arguments):
        with pytest.raises(kind, match=match) as caught:
            run(**arguments)
        assert predicted == []
        return str(caught.value)

    return check


def test_fold_all_is_refused_with_the_reason(refused):
    message = refused(ValueError, "none of its predictions is out-of-fold", folds=["all"])
    assert f"nnUNetv2_train {DATASET} 3d_fullres 0 -tr nnUNetTrainer -p nnUNetPlans" in message


def test_a_fold_beyond_the_splits_is_refused(refused):
    refused(ValueError, "Fold\\(s\\) 2, 5 are not in .*0 to 1", folds=[0, 5, 2])


@pytest.mark.parametrize(("num_parts", "part_id"), [(2, 2), (1, -1), (0, 0)])
def test_a_part_that_does_not_exist_is_refused(refused, num_parts, part_id):
    refused(ValueError, f"part_id is {part_id}", num_parts=num_parts, part_id=part_id)


def test_a_missing_cuda_device_is_refused(models, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="-device cpu"):
        export(DATASET, STAGE_ONE, device="cuda")


@pytest.mark.parametrize(
    ("configuration", "match"),
    [("2d", "is 2D"), ("3d_cascade", "second stage of a cascade"), ("3d_high", "'3d_high' is not in the plans")],
)
def test_a_configuration_that_cannot_be_refined_is_refused(refused, configuration, match):
    refused(ValueError, match, stage_one=StageOneId("nnUNetTrainer", "nnUNetPlans", configuration))


def test_unknown_plans_and_models_are_refused(refused):
    refused(RuntimeError, "nnUNetOther.json does not exist", stage_one=StageOneId("A", "nnUNetOther", "3d_fullres"))
    message = refused(RuntimeError, "does not exist", stage_one=StageOneId("A", "nnUNetPlans", "3d_fullres"))
    assert f"nnUNetv2_train {DATASET} 3d_fullres FOLD -tr A -p nnUNetPlans" in message


def test_an_unknown_dataset_is_refused(models):
    with pytest.raises(RuntimeError, match="nnUNetv2_plan_and_preprocess -d Dataset998_None"):
        export("Dataset998_None", STAGE_ONE, device="cpu")


def test_untrained_folds_are_named_with_the_command(refused):
    (fold_folder(DATASET, STAGE_ONE, 1) / "checkpoint_final.pth").unlink()
    message = refused(RuntimeError, "Fold\\(s\\) 1 of .* have no checkpoint_final.pth")
    assert f"nnUNetv2_train {DATASET} 3d_fullres 1 -tr nnUNetTrainer -p nnUNetPlans" in message


def test_a_truncated_checkpoint_is_refused(refused):
    path = fold_folder(DATASET, STAGE_ONE, 1) / "checkpoint_final.pth"
    path.write_bytes(path.read_bytes()[:1000])
    refused(RuntimeError, f"fold_1/checkpoint_final.pth cannot be opened .*truncated.*{DATASET} 3d_fullres 1 ")


@pytest.mark.parametrize(
    "changes",
    [
        {"init_args": {"fold": 0, "configuration": "3d_fullres"}},
        {"init_args": {"fold": "all", "configuration": "3d_fullres"}},
        {"init_args": {"fold": 1, "configuration": "3d_lowres"}},
        {"trainer_name": "nnUNetTrainer_5epochs"},
    ],
)
def test_a_checkpoint_copied_from_elsewhere_is_refused(refused, changes):
    write_checkpoint(1, seed=1, **changes)
    refused(RuntimeError, "fold_1/checkpoint_final.pth says it is .*copied from elsewhere")


def test_folds_mirrored_differently_are_refused(refused):
    write_checkpoint(1, seed=1, inference_allowed_mirroring_axes=(0,))
    refused(RuntimeError, "different mirroring axes")


def test_cases_that_are_not_preprocessed_are_named(refused):
    for file in (preprocessed_dataset(DATASET) / "nnUNetPlans_3d_fullres").glob("c2*"):
        file.unlink()
    refused(RuntimeError, f"c2 of the splits are not preprocessed.*nnUNetv2_preprocess -d {DATASET}")


@pytest.mark.parametrize("text", ["[", "{}", "[]", '[{"train": []}]', '[{"train": [], "val": "c0"}]'])
def test_broken_splits_are_refused(refused, text):
    splits_file(DATASET).write_text(text)
    refused(RuntimeError, "splits_final.json is no")


def test_splits_that_hold_a_case_out_twice_are_refused(refused):
    splits = copy.deepcopy(SPLITS)
    splits[1] = {"train": ["c1"], "val": ["c0", "c2", "c3"]}
    write_json(splits_file(DATASET), splits)
    refused(LeakError, "c0 are in the validation sets of several folds")


def test_data_planned_anew_after_the_training_are_refused(refused):
    plans = tiny_plans()
    plans["configurations"]["3d_fullres"]["spacing"] = [2.0, 2.0, 2.0]
    write_json(preprocessed_dataset(DATASET) / "nnUNetPlans.json", plans)
    refused(RuntimeError, f"preprocessed otherwise.*nnUNetv2_train {DATASET}")


def test_other_labels_than_in_the_training_are_refused(refused):
    other = {**DATASET_JSON, "labels": {"background": 0, "tumour": 1}}
    write_json(preprocessed_dataset(DATASET) / "dataset.json", other)
    refused(RuntimeError, "trained with other labels")


SWAPPED = [{"train": ["c1", "c3"], "val": ["c0", "c2"]}, {"train": ["c0", "c2"], "val": ["c1", "c3"]}]


@pytest.mark.parametrize("separator", ["/", "\\"])
def test_splits_changed_after_the_training_are_seen_in_nnunets_validation(refused, separator):
    """The checkpoint cannot say what it trained on; the summary of its validation can, on any system."""
    for fold, split in enumerate(SPLITS):
        cases = [{"prediction_file": f"x{separator}validation{separator}{case}.nii.gz"} for case in split["val"]]
        write_json(fold_folder(DATASET, STAGE_ONE, fold) / "validation" / "summary.json", {"metric_per_case": cases})
    write_json(splits_file(DATASET), SWAPPED)
    message = refused(LeakError, "Fold 0 .*may have trained on c2: the splits were changed after")
    assert mended_by(message)[0].f == ["0"]


def test_splits_changed_after_an_export_of_the_same_networks_are_seen_in_its_manifest(models, predicted):
    first = run()
    write_json(splits_file(DATASET), SWAPPED)
    predicted.clear()
    with pytest.raises(LeakError, match="Fold 0 .*may have trained on c2"):
        run()
    assert predicted == []
    assert Manifest.read(export_folder(DATASET, STAGE_ONE)) == first


def test_a_broken_manifest_stops_the_export(models, predicted):
    run()
    path = export_folder(DATASET, STAGE_ONE) / "manifest.json"
    path.write_text(path.read_text()[:-20])
    predicted.clear()
    with pytest.raises(RuntimeError, match=f"rm '{path}'"):
        run()
    assert predicted == []


@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_an_image_that_is_not_finite_is_named(models, value):
    write_image(preprocessed_dataset(DATASET) / "nnUNetPlans_3d_fullres" / "c1", seed=0, value=value)
    with pytest.raises(ValueError, match="image of case c1 has NaN or infinite"):
        run()
    assert Manifest.read(export_folder(DATASET, STAGE_ONE)).cases.keys() == {"c0"}
    json.loads((export_folder(DATASET, STAGE_ONE) / "manifest.json").read_text())
