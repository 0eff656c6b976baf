"""``qc.csv``: the numbers of a case, the order of the cases, and that parts and continued runs lose none."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
import torch

from nnunet_diffrefine.calibration.agreement import Line
from nnunet_diffrefine.calibration.record import QualityRecord
from nnunet_diffrefine.inference.files import OutputFolder
from nnunet_diffrefine.inference.quality import CaseQuality, Judge, case_file, write_table
from nnunet_diffrefine.reports.selection import read_review
from tests.builders import LABELS, REGIONS, SPACE, generator
from tests.inference.small import ENDING, Everywhere, Folders, read_volume
from tests.inference.test_apply_command import run  # noqa: F401 (a fixture)

NAMES = ("edema", "core")
QUALITY = {"edema": QualityRecord(Line(0.1, 0.8), 0.5, 2.0, 9), "core": QualityRecord(Line(0.0, 1.0), None, None, 0)}
BOTH = pytest.mark.parametrize("foreground", [LABELS, REGIONS], ids=["labels", "regions"])


def table(folder) -> list[dict[str, str]]:
    with (folder / "qc.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


class TestCase:
    @BOTH
    def test_sure_and_right_is_1_and_half_sure_is_less(self, foreground):
        judge = Judge(NAMES, {}, "")
        logits = 9 * torch.randn(foreground.heads, *SPACE, generator=generator(0))
        m = foreground.decide(logits[None])[0]
        assert list(judge.dice(logits, m, foreground).values()) == pytest.approx([1, 1])
        for name, value in judge.dice(logits, 0.5 * m, foreground).items():
            assert value == pytest.approx(2 * 0.5 / 1.5), name

    def test_the_linear_map_is_that_of_the_calibration(self):
        logits = 9 * torch.randn(2, *SPACE, generator=generator(0))
        m = REGIONS.decide(logits[None])[0]
        found = Judge(NAMES, QUALITY, "").dice(logits, 0.5 * m, REGIONS)
        assert found == {"edema": pytest.approx(0.1 + 0.8 * 2 / 3), "core": pytest.approx(2 / 3)}

    def test_volumes_changes_and_limits(self):
        masks = {name: np.zeros((6, 6, 6), bool) for name in NAMES}
        masks["edema"][:2] = True
        changed = np.zeros((6, 6, 6), bool)
        changed[0, 0, :3] = True
        changed[1, 1, 3] = True  # touches at a corner
        changed[5, 5, 5] = True
        found = Judge(NAMES, QUALITY, "").case("case", {"edema": 0.9, "core": None}, masks, changed, 0.002)
        assert found.volume_ml == {"edema": pytest.approx(72 * 0.002), "core": 0}
        assert found.limits_ml["edema"] == (pytest.approx(36 * 0.002), pytest.approx(144 * 0.002))
        assert found.limits_ml["core"] == (None, None)
        assert found.largest_change_ml == pytest.approx(4 * 0.002)
        assert found.changed_share == pytest.approx(5 / 216)
        assert found.note == "nothing found of core"


class TestTable:
    def write(self, folder, **cases):
        output = OutputFolder(folder)
        with output.begun():
            for name, dice in cases.items():
                limits = dict.fromkeys(dice, (None, 2.0))
                quality = CaseQuality(name, dice, dict.fromkeys(dice, 1.0), limits, 0.01, 0.5, "")
                output.write(case_file(name), lambda file: file.write_text(quality.json()))  # noqa: B023
                (folder / f"{name}{ENDING}").touch()
            write_table(output, ENDING)

    def test_the_most_doubtful_class_decides_and_nothing_found_comes_first(self, tmp_path):
        self.write(
            tmp_path,
            sure={"edema": 0.9, "core": 0.8}, doubtful={"edema": 0.95, "core": 0.3}, none={"edema": None, "core": None},
            partly={"edema": 0.85, "core": None},
        )  # fmt: skip
        rows = table(tmp_path)
        assert [(row["case"], row["need_of_review"]) for row in rows] == [
            ("none", "1"), ("doubtful", "2"), ("sure", "3"), ("partly", "4"),
        ]  # fmt: skip
        assert rows[0]["predicted_Dice_edema"] == ""
        assert rows[3]["volume_high_ml_core"] == "2"

    def test_a_case_without_a_class_that_most_have_comes_before_low_dice(self, tmp_path):
        """Of a class that is found in half of the cases or fewer that says nothing."""
        self.write(
            tmp_path,
            low={"edema": 0.1, "core": 0.9, "rare": None}, sure={"edema": 0.9, "core": 0.9, "rare": 0.9},
            none={"edema": None, "core": None, "rare": None}, lacks={"edema": 0.8, "core": None, "rare": 0.9},
            lacks_less={"edema": None, "core": 0.95, "rare": None}, fair={"edema": 0.7, "core": 0.9, "rare": None},
        )  # fmt: skip
        assert [row["case"] for row in table(tmp_path)] == ["none", "lacks", "lacks_less", "low", "fair", "sure"]

    def test_only_cases_whose_mask_is_there_count(self, tmp_path):
        self.write(tmp_path, old={"edema": 0.1}, new={"edema": 0.9})
        (tmp_path / f"old{ENDING}").unlink()
        self.write(tmp_path)
        assert [row["case"] for row in table(tmp_path)] == ["new"]

    def test_other_classes_have_columns_of_their_own(self, tmp_path):
        self.write(tmp_path, a={"edema": 0.9}, b={"liver": 0.5})
        rows = table(tmp_path)
        dice = [(row["predicted_Dice_edema"], row["predicted_Dice_liver"]) for row in rows]
        assert dice == [("", "0.5"), ("0.9", "")]

    def test_a_leftover_that_is_damaged_does_not_count_either(self, tmp_path):
        self.write(tmp_path, a={"edema": 0.9})
        (tmp_path / "qc" / "old.json").write_text("{")
        self.write(tmp_path)
        assert len(table(tmp_path)) == 1

    def test_the_report_reads_it(self, tmp_path):
        self.write(tmp_path, a={"edema": 0.9, "core": 0.7}, b={"edema": 0.5, "core": None})
        review = read_review(tmp_path / "qc.csv", {"a", "b"})
        assert review.order == ("b", "a")
        assert review.dice == {"a": 0.7, "b": 0.5}

    def test_a_damaged_case_is_named(self, tmp_path):
        self.write(tmp_path, a={"edema": 0.9})
        (tmp_path / "qc" / "a.json").write_text('{"case": "a"')
        with pytest.raises(RuntimeError, match=r"a.json is damaged .*--continue_prediction"):
            self.write(tmp_path)


class TestApply:
    @pytest.mark.parametrize("kind", ["labels", "regions"])
    def test_numbers_are_those_of_the_files(self, tmp_path, run, kind):  # noqa: F811
        folders = Folders(tmp_path, kind, (0.9, 1.0, 2.0))
        before = folders.add("case")
        (result,) = run(folders, Everywhere)
        after = read_volume(folders.out / f"case{ENDING}")
        (row,) = table(folders.out)
        labels = {"labels": {"edema": [1], "core": [2]}, "regions": {"whole": [1, 2], "core": [2]}}[kind]
        for name, values in labels.items():
            volume = np.isin(after, values).sum() * 0.9 * 1.0 * 2.0 / 1000
            assert float(row[f"volume_ml_{name}"]) == pytest.approx(volume, rel=1e-5)
            assert row[f"volume_low_ml_{name}"] == ""
        assert float(row["changed_share"]) == pytest.approx((before != after).mean(), rel=1e-5)
        assert float(row["changed_share"]) == pytest.approx(result.changed, rel=1e-5)
        assert row["note"].startswith("not calibrated")

    def test_label_maps_say_so(self, tmp_path, run):  # noqa: F811
        folders = Folders(tmp_path)
        folders.add("case", soft=False)
        run(folders)
        assert table(folders.out)[0]["note"] == "not calibrated: the input has no probabilities"

    def test_parts_and_continued_runs_make_one_table(self, tmp_path, run):  # noqa: F811
        folders = Folders(tmp_path)
        for k in range(4):
            folders.add(f"case_{k}", k)
        run(folders, output=tmp_path / "whole")
        run(folders, num_parts=2, part_id=1)
        assert [row["case"] for row in table(folders.out)] != folders.cases
        run(folders, num_parts=2, part_id=0)
        (folders.out / "qc" / "case_2.json").unlink()
        assert [r.case for r in run(folders, continue_prediction=True)] == ["case_2"]
        assert (folders.out / "qc.csv").read_bytes() == (tmp_path / "whole" / "qc.csv").read_bytes()

    def test_the_record_says_what_was_used(self, tmp_path, run):  # noqa: F811
        folders = Folders(tmp_path)
        folders.add("case")
        run(folders)
        record = json.loads((folders.out / "apply.json").read_text())
        assert record["gate"] == {"unchanged": [], "offsets": {}}
        assert record["calibration"] is None
