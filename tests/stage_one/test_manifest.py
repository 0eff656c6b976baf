"""The manifest survives crashes, concurrent writers and nothing else: what is broken is refused, not guessed."""

import json
import multiprocessing
import os
from dataclasses import replace

import pytest
from nnunetv2.utilities.label_handling.label_handling import LabelManager

from nnunet_diffrefine.paths import MANIFEST
from nnunet_diffrefine.stage_one.manifest import FoldRecord, ForegroundRecord, Manifest, update
from tests.stage_one.tiny import DATASET, mended_by
from tests.stage_one.writer import RECORD, add_cases


def test_what_is_written_is_read_back(paper):
    assert Manifest.read(paper.folder) == paper.manifest


def test_the_file_has_the_documented_keys(paper):
    values = json.loads((paper.folder / MANIFEST).read_text())
    assert list(values)[0] == "format"
    assert values["format"] == 1
    assert set(values) == {
        "format", "dataset", "stage_one", "data_identifier", "preprocessing_sha256", "splits_sha256", "foreground",
        "nnunetv2", "folds", "cases",
    }  # fmt: skip
    assert values["stage_one"]["mirror_axes"] == [0, 1, 2]
    assert values["folds"]["0"].keys() == {"checkpoint", "sha256", "bytes"}
    assert values["cases"]["c0"].keys() == {"fold", "shape", "sha256", "bytes"}


def _edit(paper, change):
    path = paper.folder / MANIFEST
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def _repeat_a_case(text):
    return text.replace('"c1": {', '"c0": {', 1)


@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (lambda text: text[: len(text) // 2], "Expecting|Unterminated"),
        (lambda text: "", "Expecting value"),
        (lambda text: "[]", "format is None"),
        (_repeat_a_case, "c0 appear more than once"),
        (lambda text: text.replace('"format": 1', '"format": 2'), "format is 2, this version reads 1"),
        (lambda text: text.replace('"format": 1,', ""), "format is None"),
        (lambda text: text.replace('"splits_sha256"', '"splits_sha"'), "splits_sha"),
        (lambda text: text.replace('"0": {', '"zero": {', 1), "zero"),
    ],
)
def test_a_broken_manifest_is_refused_with_the_command_that_mends_it(paper, damage, word):
    path = paper.folder / MANIFEST
    path.write_text(damage(path.read_text()))
    with pytest.raises(RuntimeError, match=word) as caught:
        Manifest.read(paper.folder)
    (mend,) = mended_by(str(caught.value))
    assert f"rm '{path}'" in str(caught.value)
    assert (mend.d, mend.tr, mend.p, mend.c) == (DATASET, "nnUNetTrainer", "nnUNetPlans", "3d_fullres")


def test_a_value_of_the_wrong_type_is_refused(paper):
    _edit(paper, lambda values: values["cases"]["c0"].update(bytes="many"))
    with pytest.raises(RuntimeError, match="bytes"):
        Manifest.read(paper.folder)


def test_a_crash_before_the_rename_leaves_the_old_manifest(paper, monkeypatch):
    def crash(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        update(paper.folder, lambda manifest: manifest.with_case("new", RECORD))
    assert Manifest.read(paper.folder) == paper.manifest
    assert not list(paper.folder.glob(".*.tmp"))


def test_two_processes_updating_at_once_lose_nothing(paper):
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=add_cases, args=(paper.folder, prefix, 25)) for prefix in "xy"]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    added = {f"{prefix}{i}" for prefix in "xy" for i in range(25)}
    assert Manifest.read(paper.folder).cases.keys() == paper.manifest.cases.keys() | added


def test_a_new_checkpoint_drops_the_cases_of_its_fold_only(paper):
    changed = paper.manifest.with_fold(1, FoldRecord("checkpoint_final.pth", "f" * 64, 1))
    assert changed.cases.keys() == {"c0", "c1"}
    assert paper.manifest.with_fold(1, paper.manifest.folds[1]) == paper.manifest


def test_another_nnunet_version_is_the_same_source_but_other_splits_are_not(paper):
    blank = replace(paper.manifest, folds={}, cases={})
    assert paper.manifest.same_source(replace(blank, nnunetv2="2.9"))
    assert not paper.manifest.same_source(replace(blank, splits_sha256="0"))


@pytest.mark.parametrize(
    ("labels", "names", "ignore"),
    [
        ({"background": 0, "a": 1, "b": 2}, ["a", "b"], None),
        ({"background": 0, "b": 2, "a": [1], "ignore": 3}, ["a", "b"], 3),
        ({"background": 0, "whole": [1, 2, 3], "core": [2, 3], "ring": 3}, ["whole", "core", "ring"], None),
        ({"background": 0, "core": [2, 1], "whole": (1, 2, 3), "ignore": 4}, ["core", "whole"], 4),
    ],
)
def test_channels_are_those_of_nnunets_label_manager(labels, names, ignore):
    """Same number of heads, same order of what the channels mean, same ignore label."""
    host = LabelManager(labels, regions_class_order=[1] * len(names))
    record = ForegroundRecord.from_dataset_json({"labels": labels})
    assert (record.names, record.exclusive, record.ignore_label) == (names, not host.has_regions, ignore)
    assert record.foreground.heads == host.num_segmentation_heads
    if host.has_regions:
        hosts = [list(region) if isinstance(region, tuple) else [region] for region in host.foreground_regions]
        assert record.regions == hosts
    else:
        assert record.labels == [int(label) for label in host.foreground_labels]
