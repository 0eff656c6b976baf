"""``nnUNetv2_diffrefine export`` takes nnU-Net's flags and hands them to the export unchanged."""

import os

import pytest

from nnunet_diffrefine.environment import VARIABLE
from nnunet_diffrefine.paths import StageOneId, resource_folder
from nnunet_diffrefine.stage_one import export as module
from nnunet_diffrefine.stage_one.mending import export_command
from tests.stage_one.tiny import mended_by


@pytest.fixture
def call(monkeypatch):
    monkeypatch.setenv(VARIABLE, "/elsewhere")

    def run(line):
        given = []
        monkeypatch.setattr(module, "export", lambda *arguments: given.extend(arguments))
        (args,) = mended_by(f"nnUNetv2_diffrefine {line}")
        args.func(args)
        return given

    return run


def test_defaults_are_those_of_nnunet(call):
    stock = StageOneId("nnUNetTrainer", "nnUNetPlans", "3d_fullres")
    assert call("export -d 4") == ["4", stock, None, 1, 0, "cuda", "checkpoint_final.pth"]


def test_every_flag_arrives(call):
    line = "export -d 4 -c 3d_lowres -tr T -p P -f 0 all -chk best.pth -num_parts 3 -part_id 2 -device cpu"
    assert call(line) == ["4", StageOneId("T", "P", "3d_lowres"), [0, "all"], 3, 2, "cpu", "best.pth"]


def test_a_fold_that_is_no_number_is_refused(call):
    with pytest.raises(ValueError, match="-f is first; wanted fold numbers"):
        call("export -d 4 -f 0 first")


def test_our_trainers_are_found_without_setting_the_variable(call):
    call("export -d 4")
    assert os.environ[VARIABLE].split(os.pathsep) == ["/elsewhere", str(resource_folder("trainers"))]


def test_the_command_that_messages_name_means_what_it_says(call):
    one = StageOneId("nnUNetTrainer_250epochs", "nnUNetResEncUNetLPlans", "3d_lowres")
    assert call(export_command("Dataset004_X", one, [2, 3]).removeprefix("nnUNetv2_diffrefine "))[:3] == [
        "Dataset004_X", one, [2, 3],
    ]  # fmt: skip
