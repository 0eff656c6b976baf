"""The refinement curves: what is written, and that an interrupted run leaves no trace in them."""

import csv
import os
from pathlib import Path

import matplotlib.image
import pytest

from nnunet_diffrefine.training.curves import RefinementCurves


def logged(*rows: tuple[int, float, float]) -> RefinementCurves:
    curves = RefinementCurves()
    for row in rows:
        curves.log(*row)
    return curves


def test_each_epoch_is_kept_in_order() -> None:
    assert logged((0, 0.5, 0.6), (1, 0.55, 0.7)).columns == ([0, 1], [0.5, 0.55], [0.6, 0.7])


@pytest.mark.parametrize("resumed", [0, 1, 2, 3])
def test_resuming_drops_what_came_later(resumed: int) -> None:
    curves = logged((0, 0.1, 0.2), (1, 0.3, 0.4), (2, 0.5, 0.6))
    curves.log(resumed, 0.8, 0.9)
    kept = [0, 1, 2][:resumed]
    assert curves.epoch == [*kept, resumed]
    assert curves.stage_one_dice == [*[0.1, 0.3, 0.5][:resumed], 0.8]
    assert curves.refined_dice == [*[0.2, 0.4, 0.6][:resumed], 0.9]


def test_columns_rebuild_the_curves() -> None:
    curves = logged((0, 0.1, 0.2), (1, 0.3, 0.4))
    copy = RefinementCurves(*(list(column) for column in curves.columns))
    copy.log(2, 0.5, 0.6)
    assert curves.epoch == [0, 1]
    assert copy.columns == ([0, 1, 2], [0.1, 0.3, 0.5], [0.2, 0.4, 0.6])


def test_two_curves_share_nothing() -> None:
    logged((0, 0.1, 0.2))
    assert RefinementCurves().columns == ([], [], [])


def test_table_and_figure_are_written_and_nothing_else(tmp_path: Path) -> None:
    curves = logged((0, 0.5, 0.625), (1, 0.75, 0.5))
    curves.save(tmp_path)
    with (tmp_path / "refinement.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["epoch", "stage_one_dice", "refined_dice", "change"]
    assert [[float(v) for v in row.values()] for row in rows] == [[0, 0.5, 0.625, 0.125], [1, 0.75, 0.5, -0.25]]
    image = matplotlib.image.imread(tmp_path / "refinement.png")
    assert min(image.shape[:2]) > 300
    assert image[..., :3].std() > 0.01  # something is drawn
    assert sorted(os.listdir(tmp_path)) == ["refinement.csv", "refinement.png"]
    curves.log(2, 0.5, 0.5)
    curves.save(tmp_path)
    assert len((tmp_path / "refinement.csv").read_text().splitlines()) == 4
    assert sorted(os.listdir(tmp_path)) == ["refinement.csv", "refinement.png"]


def test_an_interrupted_save_leaves_the_earlier_table_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    curves = logged((0, 0.5, 0.6))
    curves.save(tmp_path)
    before = {name: (tmp_path / name).read_bytes() for name in ("refinement.csv", "refinement.png")}

    def never(*paths: object) -> None:
        raise OSError("disk full")

    curves.log(1, 0.7, 0.8)
    monkeypatch.setattr(os, "replace", never)
    with pytest.raises(OSError, match="disk full"):
        curves.save(tmp_path)
    assert before == {name: (tmp_path / name).read_bytes() for name in before}


def test_no_figure_stays_open(tmp_path: Path) -> None:
    import matplotlib.pyplot as plt

    before = plt.get_fignums()
    logged((0, 0.5, 0.6)).save(tmp_path)
    assert plt.get_fignums() == before
