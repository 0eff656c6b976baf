"""The table beside ``summary.json``: written when validation is done, and never in the way of it."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from nnunet_diffrefine.training import trainer_evaluation
from nnunet_diffrefine.training.trainer_evaluation import evaluate_validation
from tests.evaluation.shapes import box, write

SHAPE = (8, 8, 8)


@pytest.fixture
def trainer(tmp_path):
    """What the function uses of a trainer: two references, of which one belongs to another fold, one prediction."""
    data, fold = tmp_path / "data", tmp_path / "fold_0"
    for folder in (data / "gt_segmentations", fold / "validation"):
        folder.mkdir(parents=True)
    dataset = {"labels": {"background": 0, "a": 1, "b": 2}, "file_ending": ".nii.gz"}
    (data / "dataset.json").write_text(json.dumps(dataset))
    for case in ("case_0", "case_1"):
        write(data / "gt_segmentations" / f"{case}.nii.gz", box(SHAPE, ((2, 6),) * 3).astype(np.uint8))
    write(fold / "validation" / "case_0.nii.gz", box(SHAPE, ((2, 6), (2, 6), (2, 4))).astype(np.uint8))
    log = []
    return SimpleNamespace(
        local_rank=0,
        preprocessed_dataset_folder_base=str(data),
        output_folder=str(fold),
        print_to_log_file=log.append,
        log=log,
        validation=fold / "validation",
    )


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    monkeypatch.setattr(trainer_evaluation, "default_num_processes", 1)


def test_the_log_holds_the_means_of_the_classes_that_have_any(trainer):
    """Half of the only present class is found: Dice 2/3. The other class is empty in both and has no value."""
    evaluate_validation(trainer)
    (line,) = trainer.log
    assert "Dice 0.6667, " in line
    assert "HD95 2 mm, " in line
    assert "NSD@1mm 0." in line
    content = json.loads((trainer.validation / "metrics.json").read_text())
    assert list(content["cases"]) == ["case_0"]
    assert (trainer.validation / "metrics.csv").is_file()


def test_nothing_is_written_on_the_other_ranks(trainer):
    trainer.local_rank = 1
    evaluate_validation(trainer)
    assert not trainer.log
    assert not list(trainer.validation.glob("metrics.*"))


@pytest.mark.parametrize("error", [None, MemoryError("no memory"), RuntimeError("killed")])
def test_an_error_becomes_a_warning_with_the_command_to_run(trainer, monkeypatch, error):
    def fails(*_, **__):
        raise error

    if error:
        monkeypatch.setattr(trainer_evaluation, "evaluate_folders", fails)
    else:
        (trainer.validation / "case_0.nii.gz").write_bytes(b"nothing")
    evaluate_validation(trainer)
    (text,) = trainer.log
    assert text.startswith("WARNING: ")
    assert str(error or "case_0.nii.gz") in text
    command = text.splitlines()[-1].split()
    data = trainer.validation.parents[1] / "data"
    assert command == ["nnUNetv2_diffrefine", "evaluate", str(data / "gt_segmentations"), str(trainer.validation),
                       "-djfile", str(data / "dataset.json"), "--chill"]  # fmt: skip
