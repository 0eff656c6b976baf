"""The promises of a working folder: its paths are nnU-Net's, and its folds hold every case out exactly once."""

import json
from pathlib import Path

import pytest

from nnunet_diffrefine.demo.pipeline import Demo
from nnunet_diffrefine.demo.steps import environment

STAGES = 3


@pytest.fixture
def demo(tmp_path):
    """A demo whose dataset nnU-Net has planned and preprocessed: the files that the small plans are made from."""
    demo = Demo(tmp_path, "Dataset042_Phantom", None, "cpu")
    kwargs = {
        "n_stages": STAGES,
        "features_per_stage": [32] * STAGES,
        "kernel_sizes": [[3, 3, 3]] * STAGES,
        "strides": [[1, 1, 1]] + [[2, 2, 2]] * (STAGES - 1),
        "n_conv_per_stage": [2] * STAGES,
        "n_conv_per_stage_decoder": [2] * (STAGES - 1),
    }
    full = {
        "data_identifier": "planned_data",
        "batch_size": 9,
        "patch_size": [40, 48, 128],
        "architecture": {"arch_kwargs": kwargs},
    }
    (demo.preprocessed / "planned_data").mkdir(parents=True)
    (demo.preprocessed / "nnUNetPlans.json").write_text(json.dumps({"configurations": {"3d_fullres": full}}))
    return demo


def preprocess(demo, cases):
    for case in range(cases):
        for ending in (".b2nd", "_seg.b2nd", ".pkl"):
            (demo.preprocessed / "planned_data" / f"case_{case}{ending}").touch()


def test_every_case_is_held_out_once_and_never_trained_on_where_it_is(demo):
    preprocess(demo, 7)
    demo.prepare_plans()
    splits = json.loads((demo.preprocessed / "splits_final.json").read_text())
    everyone = {f"case_{case}" for case in range(7)}
    assert sorted(case for split in splits for case in split["val"]) == sorted(everyone)
    for split in splits:
        assert split["val"]
        assert set(split["train"]) == everyone - set(split["val"])


def test_small_plans_keep_within_the_planned_ones_and_leave_them_alone(demo):
    preprocess(demo, 2)
    before = (demo.preprocessed / "nnUNetPlans.json").read_text()
    demo.prepare_plans()
    assert (demo.preprocessed / "nnUNetPlans.json").read_text() == before
    plans = json.loads((demo.preprocessed / f"{demo.plans}.json").read_text())
    small = plans["configurations"]["3d_fullres"]
    assert plans["plans_name"] == demo.plans
    assert small["patch_size"] == [40, 48, 64]
    assert len(small["architecture"]["arch_kwargs"]["features_per_stage"]) == STAGES


def test_too_few_cases_are_refused(demo):
    preprocess(demo, 1)
    with pytest.raises(RuntimeError, match="Dataset042_Phantom has 1 training cases; 2 folds need at least 2"):
        demo.prepare_plans()
    assert not (demo.preprocessed / "splits_final.json").exists()


def test_paths_lie_where_the_commands_look(demo):
    variables = environment(demo.folder)
    for path, variable in ((demo.raw, "raw"), (demo.preprocessed, "preprocessed"), (demo.model("T"), "results")):
        assert Path(variables[f"nnUNet_{variable}"]) / demo.dataset in (path, path.parent)
    assert demo.model("T").name == f"T__{demo.plans}__3d_fullres"
    assert demo.train(1, "T")[:4] == ["nnUNetv2_train", "42", "3d_fullres", "1"]
