"""The promises of ``demo`` about the user's files: only its own are deleted, and two demos are never mixed."""

import argparse
import json
from pathlib import Path

import pytest

from nnunet_diffrefine.demo import command, pipeline, summary
from nnunet_diffrefine.demo.pipeline import NNUNET_FOLDERS, RECORD, WRITTEN, Demo
from nnunet_diffrefine.demo.steps import Step


@pytest.fixture
def demo(tmp_path, monkeypatch):
    """Run the command on the CPU; its steps make the raw data, a file of each kind, and stop where they are told to."""

    def quick(self, fails):
        def work():
            for name in NNUNET_FOLDERS[1:]:
                (self.folder / name / self.dataset).mkdir(parents=True, exist_ok=True)
                (self.folder / name / self.dataset / "made").touch()
            if fails:
                raise KeyboardInterrupt

        return [Step("dataset", self.prepare_raw), Step("the rest", work)]

    def run(*options, folder="work", fails=False):
        monkeypatch.setattr(Demo, "steps", lambda self: quick(self, fails))
        parser = argparse.ArgumentParser()
        command.register(parser.add_subparsers())
        args = parser.parse_args(["demo", "--dir", str(tmp_path / folder), "-device", "cpu", *map(str, options)])
        return args.func(args)

    monkeypatch.setattr(pipeline, "write_dataset", lambda folder, *_, **__: folder.mkdir(parents=True))
    monkeypatch.setattr(summary, "figure", lambda demo: (demo.folder / "demo.png").touch())
    monkeypatch.setattr(summary, "table", lambda demo: f"the table of {demo.dataset}")
    return run


def raw_dataset(parent: Path, name: str = "Dataset042_Mine") -> Path:
    for part in ("imagesTr", "labelsTr"):
        (parent / name / part).mkdir(parents=True)
    (parent / name / "dataset.json").write_text("{}")
    return parent / name


def tree(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# --- the user's folders -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WRITTEN)
def test_a_folder_that_holds_what_no_demo_made_is_refused_untouched(demo, tmp_path, name):
    (tmp_path / "work" / name).mkdir(parents=True)
    (tmp_path / "work" / name / "mine").touch()
    before = tree(tmp_path)
    with pytest.raises(ValueError, match=rf"holds {name} without a demo's {RECORD}.* --dir NEW_FOLDER"):
        demo()
    assert tree(tmp_path) == before


def test_nnunets_folders_of_the_user_survive_a_table_that_is_there(demo, tmp_path):
    """As if a demo had been finished there: it would only print its table and delete."""
    raw_dataset(tmp_path / "work" / "nnUNet_raw")
    (tmp_path / "work" / "table.md").write_text("a table")
    with pytest.raises(ValueError, match=r"holds nnUNet_raw, table\.md"):
        demo()
    assert (tmp_path / "work" / "nnUNet_raw" / "Dataset042_Mine" / "dataset.json").is_file()


def test_a_finished_demo_leaves_its_results_and_the_users_other_files(demo, tmp_path):
    work = tmp_path / "work"
    work.mkdir()
    (work / "notes.txt").touch()
    assert demo() == 0
    assert {path.name for path in work.iterdir()} == {"notes.txt", RECORD, "steps", "table.md", "demo.png"}


def test_only_the_demos_dataset_is_deleted(demo, tmp_path):
    demo("--keep")
    for name in NNUNET_FOLDERS:
        (tmp_path / "work" / name / "Dataset001_Other").mkdir()
    demo()
    for name in NNUNET_FOLDERS:
        assert tree(tmp_path / "work" / name) == ["Dataset001_Other"]


def test_a_users_dataset_is_only_linked(demo, tmp_path):
    source = raw_dataset(tmp_path / "data")
    before = tree(source)
    demo("--dataset", source)
    assert tree(source) == before
    assert not any((tmp_path / "work" / name).exists() for name in NNUNET_FOLDERS)


def test_what_appears_after_the_clean_up_is_not_the_demos(demo, tmp_path):
    """Even under the name of its dataset."""
    source = raw_dataset(tmp_path / "data")
    demo("--dataset", source)
    for name in NNUNET_FOLDERS:
        raw_dataset(tmp_path / "work" / name)
    before = tree(tmp_path)
    demo("--dataset", source)
    assert tree(tmp_path) == before


def test_a_dataset_in_the_place_of_the_link_is_neither_used_nor_deleted(demo, tmp_path):
    """The record is there already: an interrupted demo, into whose folder the user has put data."""
    source = raw_dataset(tmp_path / "data")
    Demo(tmp_path / "work", source.name, source, "cpu").claim()
    own = raw_dataset(tmp_path / "work" / "nnUNet_raw")
    with pytest.raises(FileExistsError):
        demo("--dataset", source)
    Demo(tmp_path / "work", source.name, source, "cpu").clean()
    assert (own / "dataset.json").is_file()


# --- one folder, one demo ---------------------------------------------------------------------------------------------


def test_an_interrupted_demo_continues_with_the_same_arguments(demo, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        demo(fails=True)
    assert not (tmp_path / "work" / "table.md").exists()
    assert demo() == 0
    assert (tmp_path / "work" / "table.md").is_file()


@pytest.mark.parametrize("interrupted", [True, False])
@pytest.mark.parametrize(
    ("option", "said"),
    [("--cases", "--cases is 5, was 16"), ("--dataset", r"--dataset is .*Dataset042_Mine, was none")],
)
def test_other_arguments_are_refused_by_name(demo, tmp_path, capsys, interrupted, option, said):
    if interrupted:
        with pytest.raises(KeyboardInterrupt):
            demo(fails=True)
    else:
        demo()
    capsys.readouterr()
    value = 5 if option == "--cases" else raw_dataset(tmp_path / "data")
    with pytest.raises(ValueError, match=said) as refusal:
        demo(option, value)
    assert f"demo --dir {tmp_path / 'work'} --cases 16 -device cpu" in str(refusal.value)
    assert "the table of" not in capsys.readouterr().out
    assert demo(option, value, folder="another") == 0


def test_another_device_is_refused_and_the_number_of_phantoms_is_none_of_a_datasets(tmp_path):
    source = raw_dataset(tmp_path / "data")
    Demo(tmp_path / "work", source.name, source, "cpu", 16).claim()
    Demo(tmp_path / "work", source.name, source, "cpu", 99).claim()
    with pytest.raises(ValueError, match="arguments: -device is mps, was cpu"):
        Demo(tmp_path / "work", source.name, source, "mps", 16).claim()
    recorded = {"--dataset": str(source), "--cases": None, "-device": "cpu"}
    assert json.loads((tmp_path / "work" / RECORD).read_text()) == recorded


@pytest.mark.parametrize("name", NNUNET_FOLDERS)
def test_a_dataset_of_the_same_number_is_refused(demo, tmp_path, name):
    demo("--keep")
    (tmp_path / "work" / name / "Dataset990_Mine").mkdir()
    with pytest.raises(ValueError, match=rf"Dataset990_DiffRefinePhantom has the number of .*{name}/Dataset990_Mine"):
        demo("--keep")


def test_a_demo_that_cannot_start_claims_nothing(demo, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="--cases is 1; it must be at least 2"):
        demo("--cases", 1)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ValueError, match="-device is 'cuda'"):
        demo("-device", "cuda")
    assert not (tmp_path / "work").exists()
