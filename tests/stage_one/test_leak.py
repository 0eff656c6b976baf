"""One planted fault a test: each is refused, named, and answered with the command that mends it."""

import copy
import json
from dataclasses import replace

import pytest

from nnunet_diffrefine.stage_one import leak
from nnunet_diffrefine.stage_one.leak import LeakError, open_export
from nnunet_diffrefine.stage_one.store import PriorStore
from tests.stage_one.tiny import DATASET, SPLITS, STAGE_ONE, mended_by, soft_sphere


def refused(paper, *words, folds=None):
    """The check fails, says ``words``, and names an export command of this stage one for ``folds``."""
    with pytest.raises(LeakError) as caught:
        paper.check()
    message = str(caught.value)
    for word in words:
        assert word in message
    (mend,) = mended_by(message)
    assert (mend.d, mend.tr, mend.p, mend.c) == (DATASET, *STAGE_ONE.name.split("__"))
    assert mend.f == folds
    return message


def test_an_intact_export_passes(paper):
    paper.check()


def test_an_intact_export_is_opened_from_its_folders(paper):
    manifest, store = open_export(DATASET, STAGE_ONE, paper.plans, "3d_fullres", paper.dataset_json)
    assert manifest == paper.manifest
    assert store.verify("c3", manifest.cases["c3"])


def test_without_an_export_the_command_that_makes_it_is_named(folders):
    with pytest.raises(RuntimeError, match=f"nnUNetv2_diffrefine export -d {DATASET} -c 3d_fullres -tr nnUNetTrainer"):
        open_export(DATASET, STAGE_ONE, {}, "3d_fullres", {})


@pytest.mark.parametrize("where", ["folds", "cases"])
def test_fold_all(paper, where):
    if where == "folds":
        paper.manifest = replace(paper.manifest, folds={"all": paper.manifest.folds[0]})
    else:
        paper.replace_case("c0", fold="all")
    message = refused(paper, "Fold 'all' trains on every case")
    assert f"nnUNetv2_train {DATASET} 3d_fullres 1 -tr nnUNetTrainer -p nnUNetPlans" in message


def test_a_case_of_the_splits_without_export(paper):
    del paper.manifest.cases["c3"]
    refused(paper, "c3", "not exported", folds=["1"])


def test_an_exported_case_that_no_fold_held_out(paper):
    paper.manifest = paper.manifest.with_case("stranger", paper.manifest.cases["c0"])
    refused(paper, "stranger", "no fold's validation set")


def test_a_case_that_two_folds_held_out(paper):
    splits = copy.deepcopy(SPLITS)
    splits[1]["val"].append("c0")
    splits[1]["train"].remove("c0")
    paper.accept_splits(splits)
    refused(paper, "c0", "several folds")


def test_a_training_case_that_no_fold_held_out(paper):
    splits = copy.deepcopy(SPLITS)
    splits[0]["train"].append("extra")
    paper.accept_splits(splits)
    refused(paper, "extra", "no fold held them out")


def test_a_fold_that_trains_on_its_own_validation_case(paper):
    splits = copy.deepcopy(SPLITS)
    splits[0]["train"].append("c1")
    paper.accept_splits(splits)
    refused(paper, "c1", "training and the validation set of the same fold")


def test_a_case_predicted_by_the_fold_that_trained_on_it(paper):
    paper.replace_case("c2", fold=0)
    refused(paper, "c2", "trained on them", folds=["1"])


def test_probabilities_of_another_number_of_classes(paper):
    record = paper.manifest.cases["c2"]
    channels = len(paper.manifest.foreground.names)
    paper.manifest.cases["c2"] = replace(record, shape=[channels + 1, *record.shape[1:]])
    refused(paper, "c2", f"do not have {channels} channels", folds=["1"])


def test_splits_changed_since_the_export(paper):
    paper.splits = [
        {"train": ["c1", "c2"], "val": ["c0", "c3"]},
        {"train": ["c0", "c3"], "val": ["c1", "c2"]},
    ]
    message = refused(paper, "splits_final.json changed")
    assert f"nnUNetv2_train {DATASET} 3d_fullres 0 " in message


def test_reindented_and_reordered_splits_are_the_same_splits(paper):
    reordered = [{"val": fold["val"][::-1], "train": fold["train"][::-1]} for fold in SPLITS]
    paper.splits = json.loads(json.dumps(reordered, indent=7))
    paper.check()


@pytest.mark.parametrize(
    ("key", "value"), [("spacing", [2.0, 1.0, 1.0]), ("normalization_schemes", ["CTNormalization"])]
)
def test_preprocessing_changed_since_the_export(paper, key, value):
    paper.plans["configurations"]["3d_fullres"][key] = value
    refused(paper, "preprocessed otherwise")


def test_a_refiner_on_other_plans_with_the_same_preprocessing_is_welcome(paper):
    paper.plans["plans_name"] = "nnUNetResEncUNetLPlans"
    paper.plans["configurations"]["3d_fullres"].update(patch_size=[64, 64, 64], batch_size=1, architecture={})
    paper.check()


@pytest.mark.parametrize(
    "labels", [{"background": 0, "core": 1}, {"background": 0, "core": 1, "shell": 2}, {"background": 0, "rim": 1}]
)
def test_labels_changed_since_the_export(paper, labels):
    paper.dataset_json = {**paper.dataset_json, "labels": labels}
    refused(paper, "2 classes (core=1, rim=2; ignore=None)", f"{len(labels) - 1} classes")


def test_a_fold_without_any_export(paper):
    del paper.manifest.cases["c2"], paper.manifest.cases["c3"]
    refused(paper, "Fold(s) 1 ", "not exported", folds=["1"])


def test_a_fold_whose_checkpoint_is_unknown(paper):
    del paper.manifest.folds[0]
    refused(paper, "Fold(s) 0 ", "not exported", folds=["0"])


def test_a_checkpoint_replaced_by_one_of_the_same_size(paper):
    checkpoint = paper.models / "fold_1" / "checkpoint_final.pth"
    checkpoint.write_bytes(checkpoint.read_bytes().swapcase())
    refused(paper, "fold(s) 1 ", "replaced since the export", folds=["1"])


def test_a_missing_checkpoint(paper):
    (paper.models / "fold_0" / "checkpoint_final.pth").unlink()
    message = refused(paper, "fold(s) 0 ", "gone", folds=["0"])
    assert f"nnUNetv2_train {DATASET} 3d_fullres 0 -tr nnUNetTrainer -p nnUNetPlans" in message


def test_every_checkpoint_is_hashed_once(paper, monkeypatch):
    hashed = []
    real = leak.file_sha256
    monkeypatch.setattr(leak, "file_sha256", lambda path: hashed.append(path) or real(path))
    paper.check()
    assert sorted(hashed) == sorted(paper.models.glob("fold_*/checkpoint_final.pth"))


def _truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def _flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "word"), [(lambda path: path.unlink(), "missing"), (_truncate, "truncated"), (_flip_a_bit, "altered")]
)
def test_a_damaged_prior(paper, damage, word):
    damage(paper.folder / "c2.b2nd")
    refused(paper, "c2", word, folds=["1"])


def test_a_prior_exchanged_for_another(paper):
    PriorStore(paper.folder).write("c0", 1 - soft_sphere(), 0)
    refused(paper, "c0", folds=["0"])


def test_many_cases_of_one_kind_make_one_message(paper):
    names = [f"case{i:03d}" for i in range(12)]
    paper.accept_splits([{"train": [], "val": [*SPLITS[0]["val"], *names]}, SPLITS[1]])
    message = refused(paper, "case000, case001, case002, case003, case004, ... (12 in all)", folds=["0"])
    assert "case005" not in message


def test_checkpoints_exchanged_between_folds_are_replaced_checkpoints(paper):
    paper.manifest = replace(paper.manifest, folds={0: paper.manifest.folds[1], 1: paper.manifest.folds[0]})
    refused(paper, "0, 1", "replaced", folds=["0", "1"])
