"""``calibrate`` in this process: what it decides, what it writes, how it goes on, and what it refuses."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace

import numpy as np
import pytest
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2

from nnunet_diffrefine.calibration.record import FILE
from nnunet_diffrefine.config import BLOCK
from nnunet_diffrefine.inference import calibrate as module
from nnunet_diffrefine.inference import calibrate_command
from nnunet_diffrefine.inference.calibrate import calibrate
from nnunet_diffrefine.inference.decided import override, read_record, with_record
from nnunet_diffrefine.paths import calibration_folder, fold_folder, preprocessed_dataset, splits_file
from nnunet_diffrefine.stage_one.fingerprint import file_sha256, splits_sha256
from nnunet_diffrefine.stage_one.leak import LeakError
from nnunet_diffrefine.stage_one.manifest import FoldRecord, Manifest
from nnunet_diffrefine.stage_one.origin import ORIGIN, origin_of
from nnunet_diffrefine.stage_one.splits import read_splits
from tests.inference.calibrated import CASES, REFINER, Calibrated, prior, reference
from tests.stage_one import conftest as tiny_dataset
from tests.stage_one.tiny import DATASET, SPLITS, STAGE_ONE, write_json

folders, paper = tiny_dataset.folders, tiny_dataset.paper


@pytest.fixture
def model(paper, monkeypatch):
    calibrated = Calibrated(paper.folder)
    calibrated.write(paper.manifest)
    monkeypatch.setattr(module, "load_model", calibrated.load)
    calibrated.recorded = {}  # of each fold, what its checkpoint says it was trained from
    monkeypatch.setattr(
        module,
        "read_checkpoint",
        lambda file: {BLOCK: {ORIGIN: of} if (of := calibrated.recorded.get(int(file.parent.name[-1]))) else {}},
    )
    return calibrated


def change_splits(model):
    """Exchange the folds' validation cases, and leave behind what training and exporting stage one again would."""
    splits = SPLITS[::-1]
    write_json(splits_file(DATASET), splits)
    manifest = Manifest.read(model.export)
    cases = {name: replace(case, fold=1 - case.fold) for name, case in manifest.cases.items()}
    replace(manifest, splits_sha256=splits_sha256(splits), cases=cases).write(model.export)
    for fold in (0, 1):
        train_stage_one_again(model, fold)


def train_stage_one_again(model, fold):
    """Another checkpoint of stage one, exported."""
    file = fold_folder(DATASET, STAGE_ONE, fold) / "checkpoint_final.pth"
    file.write_bytes(f"trained again, fold {fold}".encode())
    manifest = Manifest.read(model.export)
    record = FoldRecord(file.name, file_sha256(file), file.stat().st_size)
    replace(manifest, folds={**manifest.folds, fold: record}).write(model.export)


def record_origins(model):
    """As trainings record it."""
    manifest, splits = Manifest.read(model.export), read_splits(DATASET, STAGE_ONE)
    model.recorded.update({fold: origin_of(manifest, splits, fold) for fold in (0, 1)})


@pytest.fixture
def refined(monkeypatch):
    """Names of the cases that went through the network, and after how many it is to be stopped."""

    class Seen(list):
        most = 99

    seen, inner = Seen(), module.refined_case

    def counted(plan, network, fold, case, device):
        if len(seen) >= seen.most:
            raise KeyboardInterrupt
        seen.append(case)
        return inner(plan, network, fold, case, device)

    monkeypatch.setattr(module, "refined_case", counted)
    return seen


def dice(found: np.ndarray, wanted: np.ndarray) -> float:
    return 2 * (found & wanted).sum() / (found.sum() + wanted.sum())


class TestDecision:
    def test_what_helps_is_refined_and_what_harms_keeps_stage_one(self, model):
        record = calibrate(model.request())
        assert [c.decision for c in record.classes.values()] == ["refine", "keep"]
        core, rim = record.classes["core"], record.classes["rim"]
        assert core.better == len(CASES)
        assert rim.worse == len(CASES)
        assert core.interval[0] > 0 > rim.interval[1]
        assert model.gate()["unchanged"] == ["rim"]
        assert rim.result == rim.stage_one

    def test_dice_is_that_of_whole_volumes(self, model):
        """Voxels in and out of the region together; computed here from reference and prior alone."""
        record = calibrate(model.request())
        for label, name in ((1, "core"), (2, "rim")):
            decided = [(np.round(255 * prior(c)) / 255)[label - 1] > 0.5 for c in CASES]
            wanted = np.mean([dice(d, reference(c) == label) for d, c in zip(decided, CASES, strict=True)])
            assert record.classes[name].stage_one == pytest.approx(wanted, abs=1e-6)
        assert record.classes["core"].refined == pytest.approx(1, abs=0.01)
        assert record.classes["rim"].refined < 0.1

    def test_recall_counts_every_wrong_voxel(self, model):
        record = calibrate(model.request())
        wrong = 0
        for case in CASES:
            p = np.round(255 * prior(case)) / 255
            heads = np.concatenate((1 - p.sum(0, keepdims=True), p))
            wrong += int((heads.argmax(0) != reference(case)).sum())
        assert record.recall.wrong == wrong
        assert record.recall.found <= wrong
        everywhere = calibrate(model.request(region={"everywhere": True}))
        assert (everywhere.recall.found, everywhere.recall.wrong) == (wrong, wrong)

    def test_a_single_fold_is_enough(self, model):
        record = calibrate(model.request(folds=(1,)))
        assert (record.folds, record.cases) == ([1], 2)
        assert record.classes["core"].n == 2

    def test_the_file_is_the_record(self, model):
        record = calibrate(model.request())
        assert read_record(DATASET, REFINER) == record
        assert model.gate() == record.gate

    def test_everything_else_in_the_plans_stays(self, model):
        before = model.plans()
        calibrate(model.request())
        after = model.plans()
        for plans in (before, after):
            del plans["configurations"]["3d_fullres"]["diffrefine"]["gate"]
        assert before == after


class TestContinue:
    def test_stopped_and_started_again(self, model, refined):
        refined.most = 3
        with pytest.raises(KeyboardInterrupt):
            calibrate(model.request())
        assert not (model.folder / FILE).exists()
        assert model.gate()["unchanged"] == []
        refined.most = 99
        record = calibrate(model.request())
        assert refined == CASES
        assert calibrate(model.request()) == record
        assert len(refined) == len(CASES)

    def test_a_changed_checkpoint_is_seen(self, model, refined):
        calibrate(model.request())
        model.checkpoint(1).write_bytes(b"trained again")
        refined.clear()
        calibrate(model.request())
        assert refined == CASES[2:]

    @pytest.mark.parametrize("fault", [lambda f: f.unlink(), lambda f: f.write_bytes(f.read_bytes()[:-40])])
    def test_a_stored_case_that_is_damaged_is_made_again(self, model, refined, fault):
        record = calibrate(model.request())
        fault(calibration_folder(DATASET, REFINER) / f"{CASES[1]}.npz")
        refined.clear()
        assert calibrate(model.request()) == record
        assert refined == [CASES[1]]

    def test_a_changed_reference_is_seen(self, model, refined):
        """Corrected in place and preprocessed again, with images and priors as they were."""
        before = calibrate(model.request())
        labels = reference(CASES[2])[None]
        image = labels.astype(np.float32)
        labels[labels == 2] = 0
        file = preprocessed_dataset(DATASET) / "nnUNetPlans_3d_fullres" / CASES[2]
        for old in file.parent.glob(f"{CASES[2]}*"):
            old.unlink()
        nnUNetDatasetBlosc2.save_case(image, labels, {}, str(file), chunks=image.shape, blocks=image.shape)
        refined.clear()
        assert calibrate(model.request()).classes["rim"].stage_one < before.classes["rim"].stage_one
        assert refined == [CASES[2]]

    def test_another_region_is_another_calibration(self, model, refined):
        calibrate(model.request())
        calibrate(model.request(region={"margin": 1}))
        assert len(refined) == 2 * len(CASES)


class TestOverride:
    def test_a_user_decides_and_a_new_calibration_leaves_it(self, model):
        calibrate(model.request())
        record = override(DATASET, REFINER, ["1=keep", "rim=refine"])
        assert [(c.decision, c.by) for c in record.classes.values()] == [("keep", "user"), ("refine", "user")]
        assert model.gate()["unchanged"] == ["core"]
        assert calibrate(model.request()).gate == record.gate
        assert override(DATASET, REFINER, ["all=measured"]) == calibrate(model.request())
        assert model.gate()["unchanged"] == ["rim"]

    @pytest.mark.parametrize("pair", ["3=keep", "tumour=keep", "0=refine"])
    def test_unknown_class(self, model, pair):
        calibrate(model.request())
        with pytest.raises(ValueError, match=r"which there is not. Classes: 1 or 'core', 2 or 'rim', or all"):
            override(DATASET, REFINER, [pair])

    @pytest.mark.parametrize("pair", ["core", "core=yes", "=keep"])
    def test_no_decision(self, model, pair):
        calibrate(model.request())
        with pytest.raises(ValueError, match="wanted CLASS=DECISION, with a decision of refine, keep, measured"):
            override(DATASET, REFINER, [pair])

    def test_nothing_to_override_yet(self, model):
        with pytest.raises(RuntimeError, match=r"there are none yet. Calibrate: nnUNetv2_diffrefine calibrate -d"):
            override(DATASET, REFINER, ["1=keep"])

    def test_the_command_shows_and_sets(self, model, capsys, monkeypatch):
        monkeypatch.setenv("nnUNet_extTrainer", "")
        parser = argparse.ArgumentParser()
        calibrate_command.register(parser.add_subparsers())

        def command(*options):
            args = parser.parse_args(["calibrate", "-d", DATASET, "-device", "cpu", *options])
            args.func(args)
            return capsys.readouterr().out

        with pytest.raises(RuntimeError, match="nothing to show yet"):
            command("--show")
        computed = command("--disable_progress_bar", "--margin", "2")
        assert command("--show") == computed
        for words in ("keep (measured)", "refine (measured)", "Recall of the doubtful region", "ships"):
            assert words in computed
        assert "keep (user)" in command("--set", "core=keep")


class TestRefused:
    def test_no_trained_fold(self, model):
        for fold in (0, 1):
            model.checkpoint(fold).unlink()
        with pytest.raises(
            RuntimeError, match=r"no trained fold with a checkpoint_final.pth. Train one: nnUNetv2_train"
        ):
            calibrate(model.request())

    def test_changed_priors(self, model):
        file = model.export / f"{CASES[0]}.b2nd"
        file.write_bytes(file.read_bytes()[:-1])
        with pytest.raises(LeakError, match=r"c0.* truncated.*nnUNetv2_diffrefine export"):
            calibrate(model.request())

    def test_missing_export(self, model):
        (model.export / "manifest.json").unlink()
        with pytest.raises(RuntimeError, match="No out-of-fold export"):
            calibrate(model.request())

    def test_fold_that_the_splits_do_not_have(self, model):
        with pytest.raises(RuntimeError, match=r"Fold\(s\) \[7\] are not in splits_final.json"):
            calibrate(model.request(folds=(0, 7)))

    def test_fold_without_validation_cases(self, model, monkeypatch):
        splits = [*read_splits(DATASET, STAGE_ONE), {"train": CASES, "val": []}]
        monkeypatch.setattr(module, "read_splits", lambda *_: splits)
        with pytest.raises(RuntimeError, match=r"Fold\(s\) \[2\] have no validation cases"):
            calibrate(model.request(folds=(0, 2)))

    def test_other_splits(self, model):
        write_json(
            splits_file(DATASET), [{"train": CASES[:2], "val": CASES[2:]}, {"train": CASES[2:], "val": CASES[:2]}]
        )
        with pytest.raises(LeakError, match="splits_final.json changed"):
            calibrate(model.request())

    @pytest.mark.parametrize("known_by", ["nnU-Net's validation", "the checkpoint"])
    def test_a_refiner_trained_under_other_splits(self, model, refined, known_by):
        """Stage one was trained and exported again, so its own leak check has nothing to say."""
        if known_by == "the checkpoint":
            record_origins(model)
        else:
            for fold, split in enumerate(SPLITS):
                of_cases = [{"prediction_file": f"{model.folder}/fold_{fold}/{c}.nii.gz"} for c in split["val"]]
                summary = model.checkpoint(fold).parent / "validation" / "summary.json"
                write_json(summary, {"metric_per_case": of_cases})
            assert calibrate(model.request()).cases == len(CASES)
            refined.clear()
        change_splits(model)
        with pytest.raises(
            LeakError, match=rf"Fold 0 of {REFINER.name} .*in a folder without checkpoints.*nnUNetv2_tr"
        ):
            calibrate(model.request())
        assert refined == []

    def test_a_refiner_that_contains_another_stage_one(self, model, refined):
        record_origins(model)
        assert calibrate(model.request()).cases == len(CASES)
        refined.clear()
        train_stage_one_again(model, 1)
        with pytest.raises(RuntimeError, match=r"Fold 1 of .* contains another stage one .* or restore the export"):
            calibrate(model.request())
        assert refined == []
        assert calibrate(model.request(folds=(0,))).cases == 2

    def test_what_earlier_versions_did_not_record_is_not_compared(self, model):
        change_splits(model)
        assert calibrate(model.request()).cases == len(CASES)

    @pytest.mark.parametrize(
        "content", ["{", "[]", '{"format": 7}', '{"format": 1}'], ids=["no JSON", "a list", "format", "fields"]
    )
    def test_damaged_record(self, model, content):
        (model.folder / FILE).write_text(content)
        with pytest.raises(RuntimeError, match=r"refinement.json cannot be used: .*Delete it and calibrate again"):
            calibrate(model.request())


class TestUse:
    """What ``apply`` makes of the record."""

    @pytest.fixture
    def use(self, model):
        calibrate(model.request())
        return lambda folds=(0, 1), checkpoint="checkpoint_final.pth", gate=True: with_record(
            model.load(DATASET, REFINER, folds), REFINER, folds, checkpoint, gate
        )

    def test_it_holds_for_calibrated_folds(self, model, use):
        for folds in ((0, 1), (1,)):
            used = use(folds)
            assert used.record == read_record(DATASET, REFINER)
            assert used.network.gate.unchanged == {1}

    def test_without_gate_every_class_is_refined(self, use):
        used = use(gate=False)
        assert used.network.gate.unchanged == set()
        assert used.record is not None

    def test_other_checkpoints_are_refused_with_what_mends_it(self, model, use, capsys):
        model.checkpoint(1).write_bytes(b"trained again")
        assert use((0,)).record is not None
        with pytest.raises(
            RuntimeError, match=r"fold\(s\) \[1\] changed since. Calibrate again: nnUNetv2_diff.*--no_gate"
        ):
            use()
        assert use(gate=False).record is None
        assert "Not calibrated: the checkpoint_final.pth of fold(s) [1] changed since" in capsys.readouterr().out

    def test_what_was_not_calibrated_is_refused(self, use):
        with pytest.raises(RuntimeError, match="checkpoint_final.pth was calibrated, not checkpoint_best.pth"):
            use(checkpoint="checkpoint_best.pth")
        with pytest.raises(RuntimeError, match=r"fold\(s\) \[2\] were not calibrated, only \[0, 1\]"):
            use((0, 2))

    def test_plans_that_say_something_else(self, model, use):
        plans = model.plans()
        plans["configurations"]["3d_fullres"]["diffrefine"]["gate"] = {"unchanged": [], "offsets": {}}
        (model.folder / "plans.json").write_text(json.dumps(plans))
        with pytest.raises(RuntimeError, match="the gate in plans.json is"):
            use()

    def test_no_record_no_calibration(self, model):
        used = with_record(model.load(DATASET, REFINER, (0,)), REFINER, (0,), "checkpoint_final.pth", True)
        assert used.record is None
