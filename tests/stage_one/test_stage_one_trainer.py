"""The trainer exports exactly when its fold has something out-of-fold, once, after the validation."""

import types

import pytest
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_diffrefine.stage_one import trainer as module
from nnunet_diffrefine.stage_one.trainer import DiffRefineStageOneTrainer

ID = module.StageOneId("DiffRefineStageOneTrainer", "nnUNetPlans", "3d_fullres")


@pytest.fixture
def validate(monkeypatch):
    """Run the end of a training with nnU-Net's validation, the barrier and the export replaced by notes."""
    notes = []
    monkeypatch.setattr(
        nnUNetTrainer, "perform_actual_validation", lambda self, save: notes.append(("validated", save))
    )
    monkeypatch.setattr(module.dist, "barrier", lambda: notes.append("barrier"))
    monkeypatch.setattr(module, "export", lambda *given, **named: notes.append(("exported", given, named)))

    def run(**attributes):
        trainer = object.__new__(DiffRefineStageOneTrainer)
        trainer.__dict__.update(is_ddp=False, local_rank=0, fold=3, disable_checkpointing=False)
        trainer.__dict__.update(configuration_name="3d_fullres", device=torch.device("cpu"))
        trainer.plans_manager = types.SimpleNamespace(dataset_name="Dataset999_Tiny", plans_name="nnUNetPlans")
        trainer.print_to_log_file = lambda text: notes.append(text)
        trainer.__dict__.update(attributes)
        trainer.perform_actual_validation(True)
        return notes

    return run


def test_its_own_fold_is_exported_after_the_validation(validate):
    notes = validate()
    assert notes[0] == ("validated", True)
    assert notes[-1] == ("exported", ("Dataset999_Tiny", ID), {"folds": [3], "device": "cpu"})


def test_only_the_first_rank_exports_and_not_before_the_others_are_done(validate):
    notes = validate(is_ddp=True)
    assert notes.index("barrier") < len(notes) - 1
    assert notes[-1][0] == "exported"


def test_other_ranks_wait_and_export_nothing(validate):
    assert validate(is_ddp=True, local_rank=1) == [("validated", True), "barrier"]


@pytest.mark.parametrize(
    ("attributes", "reason"),
    [({"fold": "all"}, "none of its predictions is out-of-fold"), ({"disable_checkpointing": True}, "disabled")],
)
def test_what_cannot_be_out_of_fold_is_not_exported_and_says_why(validate, attributes, reason):
    (validated, text) = validate(**attributes)
    assert validated == ("validated", True)
    assert reason in text
