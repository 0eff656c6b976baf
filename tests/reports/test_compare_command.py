"""The command: what it writes, and what it refuses before it writes."""

import csv
import json

import numpy as np
import pytest

from nnunet_diffrefine.cli import main
from nnunet_diffrefine.reports.tables import escape_latex

CASES = [f"case_{i:02d}" for i in range(10)]
KINDS = {"Dice": "1", "HD95": "mm", "volume_error": "mL", "reference_volume": "mL"}
LABELS = ("head|neck", "tail_1")


def rows_of(shift, seed=0, cases=CASES):
    """A metrics.csv: Dice falls and HD95 grows with the shift; the same noise for every system of a seed."""
    rng = np.random.default_rng(seed)
    own = np.random.default_rng(seed + 100)
    values = {"Dice": (0.8, -1), "HD95": (5.0, 10), "volume_error": (0.0, 1), "reference_volume": (3.0, 0)}
    for case in cases:
        for label in LABELS:
            for metric, (centre, slope) in values.items():
                noise = 0.01 * rng.normal() + 0.001 * own.normal()
                yield [case, label, metric, repr(centre + noise + slope * shift), KINDS[metric]]


def write_table(folder, rows, settings=None):
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "metrics.csv", "w", newline="") as file:
        csv.writer(file).writerows([["case", "label", "metric", "value", "unit"], *rows])
    if settings is not None:
        (folder / "metrics.json").write_text(json.dumps({"settings": settings}))
    return folder / "metrics.csv"


@pytest.fixture
def systems(tmp_path):
    return {
        "stage_one": write_table(tmp_path / "a", rows_of(0.1)),
        "refined": write_table(tmp_path / "b", rows_of(0.0, cases=CASES[::-1])),
        "worse": write_table(tmp_path / "c", rows_of(0.2)),
    }


def compare(folder, systems, *more):
    given = [f"{name}={file}" for name, file in systems.items()]
    with pytest.raises(SystemExit) as ended:
        main(["compare", *given, "-o", str(folder / "out"), *map(str, more)])
    return ended.value.code


def refused(folder, systems, capsys, *more):
    """The message of a run that ends with status 1 and leaves no output."""
    assert compare(folder, systems, *more) == 1
    assert not (folder / "out").exists()
    return capsys.readouterr().err


def found(folder):
    return json.loads((folder / "out" / "comparison.json").read_text())


def test_three_systems_pooled_and_per_fold(systems, tmp_path):
    halves = [CASES[:6], CASES[6:]]
    splits = tmp_path / "splits_final.json"
    splits.write_text(json.dumps([{"train": halves[1 - k], "val": halves[k]} for k in (0, 1)]))
    assert compare(tmp_path, systems, "--splits", splits) == 0
    content = found(tmp_path)
    assert content["baseline"] == "stage_one"
    rows = content["rows"]
    # 2 systems x (pooled, fold 0, fold 1) x 2 labels x 3 metrics that have a direction
    assert len(rows) == 2 * 3 * 2 * 3
    assert {row["metric"] for row in rows} == {"Dice", "HD95", "volume_error"}
    assert [row["result"]["n"] for row in rows if row["metric"] == "Dice"] == [10, 10, 6, 6, 4, 4] * 2
    for row in rows:
        result, wins = row["result"], row["system"] == "refined"
        assert (result["better"], result["worse"]) == ((result["n"], 0) if wins else (0, result["n"]))
        assert (result["p_wilcoxon"] < 0.1) == wins
        assert row["p_wilcoxon_holm"] >= result["p_wilcoxon"]
        if row["metric"] == "HD95":
            assert result["difference"] == pytest.approx(-1.0 if wins else 1.0, abs=0.1)
        low, high = result["interval"]
        assert low <= result["difference"] <= high


def test_cases_are_paired_by_name_not_by_order(systems, tmp_path):
    """The second table lists its cases backwards; noise that both systems share cancels only if pairs are right."""
    assert compare(tmp_path, {k: systems[k] for k in ("stage_one", "refined")}, "--metrics", "Dice") == 0
    for row in found(tmp_path)["rows"]:
        low, high = row["result"]["interval"]
        assert high - low < 0.02


def test_holm_is_over_labels_and_metrics_of_one_system(systems, tmp_path):
    assert compare(tmp_path, systems, "--metrics", "Dice", "HD95") == 0
    refined = [row for row in found(tmp_path)["rows"] if row["system"] == "refined"]
    # all ten of ten better: 2^-10 each, times 2 labels x 2 metrics
    assert [row["result"]["p_wilcoxon"] for row in refined] == pytest.approx([2**-10] * 4)
    assert [row["p_wilcoxon_holm"] for row in refined] == pytest.approx([4 * 2**-10] * 4)


def test_the_baseline_can_be_chosen(systems, tmp_path):
    assert compare(tmp_path, systems, "--baseline", "refined", "--losses", "2") == 0
    content = found(tmp_path)
    assert {row["system"] for row in content["rows"]} == {"stage_one", "worse"}
    assert all(row["result"]["better"] == 0 for row in content["rows"])
    assert all(len(row["result"]["losses"]) == 2 for row in content["rows"])


def test_markdown_tables_have_one_width_whatever_the_names(systems, tmp_path, capsys):
    assert compare(tmp_path, {"a|b": systems["stage_one"], "c": systems["refined"]}) == 0
    text = (tmp_path / "out" / "comparison.md").read_text(encoding="utf-8")
    assert text in capsys.readouterr().out
    lines = [line.replace(r"\|", "") for line in text.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in lines} == {10}  # nine columns; nothing became worse, so no other table
    assert len(lines) == 2 + 2 * 3
    assert "None: no case became worse." in text


def test_latex_rows_have_one_width_and_nothing_unescaped(systems, tmp_path):
    assert compare(tmp_path, {"a & b": systems["stage_one"], "50%": systems["refined"]}) == 0
    lines = (tmp_path / "out" / "comparison.tex").read_text(encoding="utf-8").splitlines()
    rows = [line for line in lines if line.endswith(r" \\")]
    assert len(rows) == 1 + 2 * 3
    assert {row.replace(r"\&", "").count("&") for row in rows} == {8}
    assert r"a \& b & 50\%" in rows[0]
    assert all("tail_1" not in row for row in rows)
    assert escape_latex("a_b\\{~^$\n}") == r"a\_b\textbackslash{}\{\textasciitilde{}\textasciicircum{}\$ \}"


def test_the_same_seed_gives_the_same_bytes(systems, tmp_path):
    pair = {k: systems[k] for k in ("stage_one", "refined")}
    outputs = []
    for seed in (1, 1, 2):
        assert compare(tmp_path, pair, "--seed", seed) == 0
        outputs.append({file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()})
        intervals = [row["result"]["interval"] for row in found(tmp_path)["rows"]]
        outputs[-1]["intervals"] = intervals
    assert outputs[0] == outputs[1]
    assert outputs[0]["intervals"] != outputs[2]["intervals"]


def test_values_that_only_one_system_has_are_announced(tmp_path):
    one = write_table(tmp_path / "a", [["x", "l", "Dice", "", "1"], ["y", "l", "Dice", "0.5", "1"]])
    two = write_table(tmp_path / "b", [["x", "l", "Dice", "0", "1"], ["y", "l", "Dice", "0.6", "1"]])
    assert compare(tmp_path, {"one": one, "two": two}) == 0
    result = found(tmp_path)["rows"][0]["result"]
    assert (result["n"], result["better"], result["worse"], result["n_one_sided"]) == (1, 1, 1, 1)
    assert "1 values exist in one system only" in (tmp_path / "out" / "comparison.md").read_text()


def test_unpaired_cases_are_listed(systems, tmp_path, capsys):
    systems["refined"] = write_table(tmp_path / "b", rows_of(0.0, cases=[*CASES[1:], "extra"]))
    message = refused(tmp_path, systems, capsys)
    assert "stage_one lacks 1 case(s): extra." in message
    assert "refined lacks 1 case(s): case_00." in message


def test_other_labels_or_metrics_are_listed(systems, tmp_path, capsys):
    rows = [row for row in rows_of(0.0) if row[1:3] != ["tail_1", "HD95"]]
    systems["refined"] = write_table(tmp_path / "b", rows)
    assert "refined lacks 1 label and metric: tail_1 HD95." in refused(tmp_path, systems, capsys)


def test_a_single_missing_value_is_named(systems, tmp_path, capsys):
    rows = [row for row in rows_of(0.0) if row[:3] != ["case_03", "tail_1", "HD95"]]
    systems["refined"] = write_table(tmp_path / "b", rows)
    assert "refined lacks 1 tail_1 HD95 of: case_03." in refused(tmp_path, systems, capsys)


def test_tables_evaluated_differently_are_refused(tmp_path, capsys):
    files = {
        name: write_table(tmp_path / name, rows_of(0.0), {"empty_policy": policy, "tolerances_mm": [1.0]})
        for name, policy in (("one", "nnunet"), ("two", "brats"))
    }
    assert "evaluated differently (empty_policy: nnunet and brats" in refused(tmp_path, files, capsys)


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ([{"train": [], "val": CASES[1:]}], "case_00 (fold(s) none)"),
        ([{"train": [], "val": CASES}, {"train": [], "val": CASES[:1]}], "case_00 (fold(s) [0, 1])"),
        ({"a": 1}, "is not nnU-Net's splits_final.json"),
        ([{"train": []}], "is not nnU-Net's splits_final.json"),
    ],
)
def test_splits_that_do_not_fit_are_refused(systems, tmp_path, capsys, splits, message):
    (tmp_path / "splits.json").write_text(json.dumps(splits))
    assert message in refused(tmp_path, systems, capsys, "--splits", tmp_path / "splits.json")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([["x", "l", "Dice", "good", "1"]], "line 2: x, l, Dice has value 'good'; wanted a number"),
        ([["x", "l", "Dice", "inf", "1"]], "is infinite"),
        ([["x", "l", "Dice", "1", "1"]] * 2, "line 3: x, l, Dice is there twice"),
        ([["x", "l", "Mystery", "1", "1"]], "There is no metric 'Mystery'"),
        ([], "has no rows"),
    ],
)
def test_broken_tables_are_refused(tmp_path, capsys, rows, message):
    file = write_table(tmp_path / "a", rows)
    assert message in refused(tmp_path, {"one": file, "two": file}, capsys)


def test_wrong_arguments_are_refused(systems, tmp_path, capsys):
    pair = {k: systems[k] for k in ("stage_one", "refined")}
    assert "wanted two or more NAME=FILE" in refused(tmp_path, {"stage_one": systems["stage_one"]}, capsys)
    assert "--baseline is none; wanted one of stage_one, refined" in refused(
        tmp_path, pair, capsys, "--baseline", "none"
    )
    assert "--metrics has dice; the tables have Dice" in refused(tmp_path, pair, capsys, "--metrics", "dice")
    assert "neither good nor bad" in refused(tmp_path, pair, capsys, "--metrics", "reference_volume")
    assert "--losses is -1" in refused(tmp_path, pair, capsys, "--losses", "-1")
    with pytest.raises(SystemExit, match="1"):
        main(["compare", "no_file", "a=b", "-o", str(tmp_path / "out")])
    assert "Given 'no_file'; wanted NAME=METRICS_CSV" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="1"):
        main(["compare", "a=x", "a=y", "-o", str(tmp_path / "out")])
    assert "Two systems are named 'a'" in capsys.readouterr().err
    (tmp_path / "wrong.csv").write_text("case,value\nx,1\n")
    assert "lacks column(s) label, metric, unit" in refused(tmp_path, {**pair, "c": tmp_path / "wrong.csv"}, capsys)
    assert "No such file" in refused(tmp_path, {**pair, "c": tmp_path / "missing.csv"}, capsys)
