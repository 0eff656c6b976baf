"""The diffrefine block in nnU-Net's plans: presets, variants a user writes, what a finished model records."""

import argparse
import copy
import json
import os
from pathlib import Path
from typing import Any

import pytest
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_diffrefine import plan_command
from nnunet_diffrefine.config import BLOCK, ConfigError, RefineConfig
from nnunet_diffrefine.methods import DEFAULT_METHOD, METHODS
from nnunet_diffrefine.paths import resource_folder
from nnunet_diffrefine.plans import (
    PAPER_LITERAL,
    Resolved,
    merge,
    preset,
    read_block,
    settings,
    with_block,
    write_variant,
)
from tests.builders import LABELS, REGIONS, method_of, with_ignore

DATASET = "Dataset999_Blobs"
SHIPPED = sorted(file.stem for file in resource_folder("plans").glob("*.json") if "." not in file.stem)
PRESETS = [name for name in SHIPPED if not name.startswith("recoseg")]  # whose settings are of another kind
SOURCE: dict[str, Any] = {
    "dataset_name": DATASET,
    "plans_name": "nnUNetPlans",
    "configurations": {
        "3d_fullres": {
            "batch_size": 2,
            "patch_size": [8, 8, 8],
            "architecture": {"network_class_name": "PlainConvUNet"},
        },
        "3d_large": {"inherits_from": "3d_fullres", "batch_size": 4},
    },
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path))
    folder = tmp_path / DATASET
    folder.mkdir()
    (folder / "nnUNetPlans.json").write_text(json.dumps(SOURCE))
    return folder


def write(name: str = "mine", configuration: str = "3d_fullres", method: str = "bridge", **changes: Any) -> Path:
    return write_variant(DATASET, "nnUNetPlans", name, configuration, method, changes)


def resolved(foreground=LABELS) -> Resolved:
    record = {"names": foreground.names, "exclusive": foreground.exclusive, "ignore_label": foreground.ignore_label}
    return Resolved(record, {"trainer": "nnUNetTrainer", "mirror_axes": [0, 1]})


class TestMerge:
    def test_the_second_wins_key_by_key(self) -> None:
        base = {"a": {"x": 1, "y": {"p": 1, "q": 2}}, "b": 3}
        over = {"a": {"y": {"q": 5}, "z": 6}, "c": 7}
        assert merge(base, over) == {"a": {"x": 1, "y": {"p": 1, "q": 5}, "z": 6}, "b": 3, "c": 7}

    def test_neither_argument_changes(self) -> None:
        base, over = {"a": {"x": 1}}, {"a": {"x": 2}, "b": {"y": 3}}
        copies = copy.deepcopy((base, over))
        merge(base, over)
        assert (base, over) == copies

    def test_a_value_replaces_a_group_and_the_reverse(self) -> None:
        assert merge({"a": {"x": 1}}, {"a": 2}) == {"a": 2}
        assert merge({"a": 2}, {"a": {"x": 1}}) == {"a": {"x": 1}}


class TestPresets:
    @pytest.mark.parametrize("name", PRESETS)
    @pytest.mark.parametrize("foreground", [LABELS, REGIONS], ids=["labels", "regions"])
    def test_each_builds_its_method(self, name: str, foreground) -> None:
        assert preset(name)["method"] == name
        built = method_of(foreground, name, **{k: v for k, v in preset(name).items() if k != "method"})
        state = 0 if built.config.process.kind == "none" else foreground.channels
        assert built.channels(3)[0] == built.condition_channels(3) + state

    def test_every_method_has_one_and_the_bridge_is_the_default(self) -> None:
        assert set(METHODS) == set(PRESETS)
        assert RefineConfig.from_dict(preset(DEFAULT_METHOD)).method == RefineConfig().method == DEFAULT_METHOD

    def test_an_unknown_one_is_answered_with_the_known(self) -> None:
        with pytest.raises(ConfigError, match=f"No preset 'brigde'.*{', '.join(SHIPPED)}"):
            preset("brigde")


class TestSettings:
    def test_stock_plans_get_the_preset(self) -> None:
        configuration = SOURCE["configurations"]["3d_fullres"]
        assert settings(configuration, "bridge") == RefineConfig.from_dict(preset("bridge"))
        assert settings(configuration, "mask_diffusion") == RefineConfig.from_dict(preset("mask_diffusion"))

    def test_a_block_goes_over_the_preset(self) -> None:
        block = {"process": {"timesteps": 50}, "sampling": {"seed": 3}}
        config = settings({BLOCK: block}, "mask_diffusion")
        assert (config.process.timesteps, config.sampling.seed) == (50, 3)
        assert (config.process.input_scale, config.sampling.samples) == (0.5, 2)

    def test_a_block_of_another_method_is_refused(self) -> None:
        with pytest.raises(ConfigError, match="for method 'bridge', not for 'mask_diffusion'"):
            settings({BLOCK: {"method": "bridge"}}, "mask_diffusion")

    def test_a_wrong_block_is_refused(self) -> None:
        with pytest.raises(ConfigError, match="sampling.step"):
            settings({BLOCK: {"sampling": {"step": 3}}}, "bridge")

    def test_what_a_trainer_resolved_does_not_disturb(self) -> None:
        plans = with_block(SOURCE, "3d_fullres", RefineConfig(), resolved())
        assert settings(plans["configurations"]["3d_fullres"], "bridge") == RefineConfig()


class TestRecord:
    @pytest.mark.parametrize("foreground", [LABELS, REGIONS, with_ignore(LABELS)], ids=["labels", "regions", "ignore"])
    def test_a_finished_model_gives_back_settings_and_record(self, foreground) -> None:
        config = RefineConfig.from_dict({"process": {"timesteps": 5}, "sampling": {"steps": 4}})
        plans = json.loads(json.dumps(with_block(SOURCE, "3d_large", config, resolved(foreground))))
        read, record = read_block(PlansManager(plans).get_configuration("3d_large").configuration)
        assert read == config
        assert record.channels() == foreground
        assert record.stage_one == {"trainer": "nnUNetTrainer", "mirror_axes": [0, 1]}
        assert BLOCK not in plans["configurations"]["3d_fullres"]

    def test_the_plans_given_are_left_alone(self) -> None:
        before = copy.deepcopy(SOURCE)
        with_block(SOURCE, "3d_fullres", RefineConfig(), resolved())
        assert before == SOURCE

    @pytest.mark.parametrize("configuration", [{}, {BLOCK: {"method": "bridge"}}], ids=["none", "unresolved"])
    def test_plans_of_no_trained_refiner_are_refused(self, configuration: dict) -> None:
        with pytest.raises(ConfigError, match="no resolved 'diffrefine' block.*model folder"):
            read_block(configuration)


class TestVariant:
    def test_is_read_back_with_its_new_settings_through_nnunet(self, folder: Path) -> None:
        file = write(configuration="3d_large", sampling={"steps": 3}, process={"state": "discrete"})
        plans = PlansManager(str(file))
        assert file == folder / "mine.json"
        assert plans.plans_name == "mine"
        configuration = plans.get_configuration("3d_large").configuration
        assert (configuration["patch_size"], configuration["batch_size"]) == ([8, 8, 8], 4)
        config = settings(configuration, "bridge")
        assert (config.sampling.steps, config.process.state) == (3, "discrete")
        changes = {"sampling": {"steps": 3}, "process": {"state": "discrete"}}
        assert config == RefineConfig.from_dict(merge(preset("bridge"), changes))

    def test_an_inherited_block_reaches_the_heirs(self, folder: Path) -> None:
        file = write(configuration="3d_fullres", sampling={"steps": 3})
        assert (
            settings(PlansManager(str(file)).get_configuration("3d_large").configuration, "bridge").sampling.steps == 3
        )

    def test_everything_else_stays_as_it_was(self, folder: Path) -> None:
        plans = json.loads(write(sampling={"steps": 3}).read_text())
        del plans["configurations"]["3d_fullres"][BLOCK]
        assert plans == {**SOURCE, "plans_name": "mine"}
        assert json.loads((folder / "nnUNetPlans.json").read_text()) == SOURCE
        assert sorted(os.listdir(folder)) == ["mine.json", "nnUNetPlans.json"]

    def test_changes_start_from_the_preset_of_the_method(self, folder: Path) -> None:
        configuration = json.loads(write(method="mask_diffusion", sampling={"seed": 9}).read_text())["configurations"]
        config = settings(configuration["3d_fullres"], "mask_diffusion")
        assert config == RefineConfig.from_dict(merge(preset("mask_diffusion"), {"sampling": {"seed": 9}}))
        with pytest.raises(ConfigError, match="mask_diffusion"):
            settings(configuration["3d_fullres"], "bridge")

    def test_an_earlier_variant_may_be_replaced(self, folder: Path) -> None:
        write(sampling={"steps": 3})
        block = json.loads(write(sampling={"samples": 2}).read_text())["configurations"]["3d_fullres"][BLOCK]
        assert block["sampling"] == {**preset("bridge")["sampling"], "samples": 2}

    @pytest.mark.parametrize("name", ["nnUNetPlans", "someone_elses"])
    def test_other_plans_are_never_overwritten(self, folder: Path, name: str) -> None:
        file = folder / f"{name}.json"
        file.write_text(json.dumps(SOURCE))
        before = file.read_bytes()
        with pytest.raises(FileExistsError, match=f"{name}.json exists and is not a diffrefine variant.*-o"):
            write(name)
        assert file.read_bytes() == before

    def test_a_bad_setting_writes_nothing(self, folder: Path) -> None:
        with pytest.raises(ConfigError, match="Nearest valid one: 'sampling.steps'"):
            write(sampling={"step": 3})
        assert os.listdir(folder) == ["nnUNetPlans.json"]

    def test_missing_sources_are_named(self, folder: Path) -> None:
        with pytest.raises(ConfigError, match="no configuration '3d_lowres'.*3d_fullres"):
            write(configuration="3d_lowres")
        with pytest.raises(FileNotFoundError, match="nothing.json"):
            write_variant(DATASET, "nothing", "mine", "3d_fullres", "bridge", {})
        assert os.listdir(folder) == ["nnUNetPlans.json"]

    @pytest.mark.parametrize("broken", ["write", "replace"])
    def test_an_interruption_leaves_the_earlier_variant_whole(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch, broken: str
    ) -> None:
        before = write(sampling={"steps": 3}).read_bytes()
        original = Path.write_text

        def half(self: Path, text: str, *args: Any, **kwargs: Any) -> None:
            original(self, text[: len(text) // 2], *args, **kwargs)
            raise OSError("disk full")

        def never(*paths: Any) -> None:
            raise OSError("disk full")

        if broken == "write":
            monkeypatch.setattr(Path, "write_text", half)
        else:
            monkeypatch.setattr(os, "replace", never)
        with pytest.raises(OSError, match="disk full"):
            write(sampling={"steps": 4})
        assert (folder / "mine.json").read_bytes() == before


class TestCommand:
    def parse(self, *arguments: str) -> argparse.Namespace:
        parser = argparse.ArgumentParser()
        plan_command.register(parser.add_subparsers())
        return parser.parse_args(["plan", "-d", DATASET, *arguments])

    def test_pairs_become_nested_settings_with_json_values(self) -> None:
        pairs = ["sampling.steps=3", "stage_one.mirroring=true", "process.state=discrete", "process.input_scale=0.5"]
        assert plan_command.parse_changes(pairs) == {
            "sampling": {"steps": 3},
            "stage_one": {"mirroring": True},
            "process": {"state": "discrete", "input_scale": 0.5},
        }
        assert plan_command.parse_changes(["stage_one.trainer=a=b"]) == {"stage_one": {"trainer": "a=b"}}

    @pytest.mark.parametrize("pairs", [["sampling.steps"], ["sampling=3", "sampling.steps=2"]], ids=["no =", "clash"])
    def test_senseless_pairs_are_named(self, pairs: list[str]) -> None:
        with pytest.raises(ConfigError, match="sampling"):
            plan_command.parse_changes(pairs)

    def test_writes_what_a_training_reads(self, folder: Path, capsys: pytest.CaptureFixture) -> None:
        assert plan_command.run(self.parse("-o", "three", "--set", "sampling.steps=3")) == 0
        configuration = PlansManager(str(folder / "three.json")).get_configuration("3d_fullres").configuration
        assert settings(configuration, "bridge").sampling.steps == 3
        assert f"nnUNetv2_train {DATASET} 3d_fullres FOLD -tr DiffRefineTrainer -p three" in capsys.readouterr().out

    def test_names_the_trainer_of_the_method(self, folder: Path, capsys: pytest.CaptureFixture) -> None:
        plan_command.run(self.parse("-o", "masks", "-m", "mask_diffusion"))
        assert "-tr DiffRefineTrainer_MaskDiffusion -p masks" in capsys.readouterr().out

    @pytest.mark.parametrize("method", SHIPPED)
    @pytest.mark.parametrize("literal", [False, True])
    def test_every_shipped_preset_can_be_shown(self, method: str, literal: bool, capsys) -> None:
        arguments = ["--show", "-m", method, "--set", f"paper_literal={str(literal).lower()}"]
        if literal and not (resource_folder("plans") / f"{method}.{PAPER_LITERAL}.json").is_file():
            with pytest.raises(ConfigError, match="has no such form"):
                plan_command.run(self.parse(*arguments))
            return
        assert plan_command.run(self.parse(*arguments)) == 0
        shown = json.loads(capsys.readouterr().out)
        assert (shown["method"], shown["paper_literal"]) == (method, literal)

    @pytest.mark.parametrize(("method", "trainer"), [("recoseg", "ReCoSegTrainer"), ("bridge", "DiffRefineTrainer")])
    def test_a_variant_of_recoseg_is_checked_as_recoseg(self, folder: Path, method: str, trainer: str, capsys) -> None:
        change = "keep_target=false" if method == "recoseg" else "sampling.steps=2"
        assert plan_command.run(self.parse("-o", "own", "-m", method, "--set", change)) == 0
        assert f"-tr {trainer} -p own" in capsys.readouterr().out
        with pytest.raises(ConfigError, match="Unknown diffrefine setting"):
            plan_command.run(self.parse("-o", "bad", "-m", method, "--set", "keep=1"))
        assert not (folder / "bad.json").exists()

    def test_show_writes_nothing(self, folder: Path, capsys: pytest.CaptureFixture) -> None:
        plan_command.run(self.parse("--show", "-m", "mask_diffusion", "--set", "sampling.steps=7"))
        shown = RefineConfig.from_dict(json.loads(capsys.readouterr().out))
        assert shown == RefineConfig.from_dict(merge(preset("mask_diffusion"), {"sampling": {"steps": 7}}))
        assert os.listdir(folder) == ["nnUNetPlans.json"]

    def test_settings_are_shown_without_a_dataset(self, capsys: pytest.CaptureFixture) -> None:
        parser = argparse.ArgumentParser()
        plan_command.register(parser.add_subparsers())
        assert plan_command.run(parser.parse_args(["plan", "--show"])) == 0
        assert RefineConfig.from_dict(json.loads(capsys.readouterr().out)) == RefineConfig.from_dict(preset("bridge"))

    def test_a_dataset_is_needed_to_write(self, folder: Path) -> None:
        parser = argparse.ArgumentParser()
        plan_command.register(parser.add_subparsers())
        with pytest.raises(ConfigError, match="-d is missing"):
            plan_command.run(parser.parse_args(["plan", "-o", "three"]))

    def test_a_name_is_needed_to_write(self, folder: Path) -> None:
        with pytest.raises(ConfigError, match="-o is missing"):
            plan_command.run(self.parse("--set", "sampling.steps=3"))
