"""The page: what it says is what the tables say, nothing hostile gets in, nothing is fetched, bad input is refused."""

import csv
import json
import re
import shlex
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from nnunet_diffrefine.cli import main
from nnunet_diffrefine.inference import quality
from nnunet_diffrefine.inference.case_work import MAPS
from nnunet_diffrefine.reports import report_command, selection, svg
from nnunet_diffrefine.reports.selection import read_review
from nnunet_diffrefine.reports.tables import row_cells
from tests.reports import study

HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>$x_$"


def report(out, before, after, options=(), *more):
    """Exit status of the command."""
    given = [str(part) for pair in dict(options).items() for part in pair]
    with pytest.raises(SystemExit) as ended:
        main(["report", f"nnU-Net={before}", f"refined={after}", "-o", str(out), *given, *map(str, more)])
    return ended.value.code


class Page(HTMLParser):
    """Tags with their attributes, ids, and the cells of each table."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.tables, self._cell = [], [], None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "table":
            self.tables.append([])
        elif tag == "tr" and self.tables:
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self._cell = ""

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self.tables[-1][-1].append(self._cell.strip())
            self._cell = None

    def handle_data(self, data):
        if self._cell is not None:
            self._cell += data

    @property
    def ids(self):
        return [attrs["id"] for _, attrs in self.tags if "id" in attrs]


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    return study.build(tmp_path_factory.mktemp("study"))


def tables_of(given):
    folder = given["-djfile"].parent
    return folder / "metrics_before" / "metrics.csv", folder / "metrics_after" / "metrics.csv"


@pytest.fixture(scope="module")
def whole(given, tmp_path_factory):
    """Folder of a report with everything."""
    out = tmp_path_factory.mktemp("whole") / "report"
    assert report(out, *tables_of(given), given) == 0
    return out


@pytest.fixture(scope="module")
def text(whole):
    return (whole / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(text):
    return Page(text)


def test_the_summary_equals_the_comparison(page, given, tmp_path):
    from nnunet_diffrefine.reports.compare import compare_files

    before, after = tables_of(given)
    rows = compare_files({"nnU-Net": before, "refined": after}, tmp_path)
    shown = [row for row in page.tables[0][1:] if len(row) > 1]
    assert shown == [row_cells(row)[1:] for row in rows]
    assert {row[0] for row in shown} >= {"Dice ↑", "HD95 [mm] ↓", "NSD@1mm ↑"}


def test_every_case_and_class_is_in_the_table_with_its_values(page, given):
    from nnunet_diffrefine.reports.metrics_table import read_metrics

    before, after = (read_metrics(name, file) for name, file in zip("ab", tables_of(given), strict=True))
    rows = page.tables[-1][1:]
    assert [row[:2] for row in rows] == [[case, label] for case in sorted(study.CASES) for label in ("head", "tail")]
    for case, label, volume, *values in rows:
        assert float(volume) == pytest.approx(before.values[label, "reference_volume"][case], rel=1e-3)
        shown = [float(value.replace("−", "-")) for value in values]
        for metric, (old, new, change) in zip(("Dice", "HD95"), (shown[:3], shown[3:]), strict=True):
            a, b = (t.values[label, metric][case] for t in (before, after))
            assert [old, new] == pytest.approx([a, b], rel=1e-3)
            assert change == pytest.approx(b - a, rel=1e-2)


def test_the_chosen_cases_are_the_extremes(text):
    found = re.findall(r'<article id="(case-\d)">\s*<h3>(.*?) <span class="quiet">(.*?)</span>', text)
    reasons = {case: why for _, case, why in found}
    assert reasons["case_a"] == "most improved"
    assert reasons["case_b"] == "most harmed, worst Dice"
    assert [*reasons.values()][2:] == ["median"]


def test_pictures_have_the_row_of_the_papers(text):
    article = re.search(r'<article id="case-1">.*?</article>', text, re.S)[0]
    titles = re.findall(r"<figcaption>(.*?)</figcaption>", article)
    assert titles[-8:] == ["T1", "T2", "reference", "nnU-Net", "error map", "refined", "uncertainty", "change"]
    assert "axial slice" in article
    assert re.search(r"on it (\d+) wrong voxels before, (\d+) after", article)


def test_figures_are_written_as_svg_and_png(whole):
    names = {file.name for file in (whole / "figures").iterdir()}
    stems = {"cases_Dice", "cases_HD95", "sizes_Dice", "sizes_HD95", "reliability", "case_01", "case_02", "case_03"}
    assert names == {f"{stem}.{ending}" for stem in stems for ending in ("svg", "png")}
    assert all((whole / "figures" / name).stat().st_size > 2000 for name in names)
    assert {file.name for file in whole.iterdir()} == {"report.html", "figures"}


def test_no_number_is_shown_as_source_of_a_formula(text):
    """Matplotlib labels logarithmic axes with formulas unless told otherwise, and the page does not typeset them."""
    assert "mathdefault" not in text


def test_the_page_needs_nothing_but_itself(text, page):
    assert "http:" not in text
    assert "https:" not in text
    assert "@import" not in text
    for _tag, attrs in page.tags:
        assert "src" not in attrs
        for name in ("href", "xlink:href"):
            assert attrs.get(name, "#").strip().startswith(("#", "data:image/png;base64,"))
        assert not re.search(r"url\((?!#)", attrs.get("style", ""))
    assert not {"link", "iframe", "object", "embed", "base"} & {tag for tag, _ in page.tags}


def test_ids_are_unique_and_every_link_has_its_target(page):
    assert len(page.ids) == len(set(page.ids))
    anchors = [attrs for tag, attrs in page.tags if tag == "a"]
    assert all({*attrs} <= {"href", "tabindex"} for attrs in anchors)
    used = [attrs["xlink:href"] for tag, attrs in page.tags if tag == "use"]
    targets = [attrs["href"] for attrs in anchors] + used
    links = {target[1:] for target in targets}
    assert {"row-0", "case-1"} <= links <= set(page.ids)


def test_a_hostile_name_stays_text(tmp_path):
    cases = [HOSTILE, *(f"c{i}" for i in range(10))]
    before = study.write_table(tmp_path / "a.csv", study.table(cases))
    after = study.write_table(tmp_path / "b.csv", ([*r[:3], r[3], r[4]] for r in study.table(cases, 1.0)))
    for file in (before, after):
        file.write_text(file.read_text().replace(",organ,", f',"{HOSTILE.replace(chr(34), chr(34) * 2)}",'))
    assert report(tmp_path / "out", before, after) == 0
    text = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert "img" not in [tag for tag, _ in page.tags]
    assert not any(name.startswith("on") for _, attrs in page.tags for name in attrs)
    assert [HOSTILE, HOSTILE] in [row[:2] for row in page.tables[-1]]
    assert all(row[1] == HOSTILE for row in page.tables[-1][1:])


def test_tables_alone_make_a_report_without_pictures(given, tmp_path):
    assert report(tmp_path, *tables_of(given), {}, "--metrics", "Dice") == 0
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<article" not in text
    assert "Is the error map right" not in text
    assert {row[0] for row in Page(text).tables[0][1:]} == {"head", "tail", "Dice ↑"}


def test_error_maps_alone_give_their_reliability(given, tmp_path):
    options = {key: given[key] for key in ("-gt", "-s", "--error_maps", "-djfile")}
    assert report(tmp_path, *tables_of(given), options) == 0
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Is the error map right" in text
    assert "<article" not in text


def test_the_same_input_gives_the_same_bytes(given, tmp_path):
    options = {key: given[key] for key in ("-gt", "-s", "--error_maps", "-djfile")}
    for name in ("one", "two"):
        assert report(tmp_path / name, *tables_of(given), options) == 0
    first, second = (
        {f.relative_to(tmp_path / name): f.read_bytes() for f in (tmp_path / name).rglob("*.*")}
        for name in ("one", "two")
    )
    assert first == second


def test_qc_replaces_the_worst_dice(given, tmp_path):
    qc = write_qc(tmp_path, {case: (0.9 - 0.1 * i, 0.9) for i, case in enumerate(study.CASES)})
    options = {key: given[key] for key in ("-i", "-gt", "-s", "-r", "-djfile")}
    assert report(tmp_path / "out", *tables_of(given), {**options, "--qc": qc}) == 0
    text = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    found = dict(re.findall(r'<h3>(.*?) <span class="quiet">(.*?)</span>', text))
    assert [case for case, why in found.items() if "first to review" in why] == ["case_&lt;b&gt;&amp;&#39;&#34;_d"]
    table = Page(text).tables[-1]
    assert table[0][-1] == "least predicted Dice"
    shown = {row[0]: float(row[-1]) for row in table[1:]}
    assert shown == pytest.approx({case: 0.9 - 0.1 * i for i, case in enumerate(study.CASES)})


def write_qc(folder, dice, ranks=None):
    """A qc.csv of predicted Dice of head and tail, None where nothing was found, with or without ranks."""
    with open(folder / "qc.csv", "w", newline="") as file:
        writer = csv.writer(file)
        rank = ["need_of_review"] if ranks else []
        writer.writerow(["case", *rank, "predicted_Dice_head", "predicted_Dice_tail"])
        for case, values in dice.items():
            writer.writerow([case, *([ranks[case]] if ranks else []), *("" if v is None else v for v in values)])
    return folder / "qc.csv"


QC = {"a": (0.9, 0.9), "b": (0.95, 0.6), "c": (None, None), "d": (0.7, None)}


def test_without_ranks_nothing_found_comes_first_then_the_lowest_class(tmp_path):
    """The mean over classes would put d before b and leave c out."""
    found = read_review(write_qc(tmp_path, QC), set("abcd"))
    assert found.order == ("c", "b", "d", "a")
    assert found.dice == pytest.approx({"a": 0.9, "b": 0.6, "c": np.nan, "d": 0.7}, nan_ok=True)


def test_the_ranks_of_apply_are_obeyed(tmp_path):
    ranks = {"a": 11, "b": 9, "c": 10, "d": 2}  # numbers, not text
    found = read_review(write_qc(tmp_path, QC, ranks), set("abc"))
    assert found.order == ("b", "c", "a")  # d is no case of the tables
    assert quality.RANK == selection.RANK


DOCUMENTED = Path(__file__).resolve().parents[2] / "docs" / "report.md"


@pytest.mark.parametrize("text", [report_command.EPILOG, DOCUMENTED.read_text(encoding="utf-8")], ids=["help", "docs"])
def test_the_example_works_as_written_on_what_apply_writes(given, tmp_path, monkeypatch, text):
    """Folders as apply names them, nnU-Net's probabilities beside stage one."""
    names = {"-i": "imagesTs", "-gt": "labelsTs", "-s": "stage_one", "-r": "refined", "-djfile": "dataset.json"}
    names |= dict(zip(("--uncertainty", "--error_maps"), (f"refined/{name}" for name in MAPS), strict=True))
    for option, name in names.items():
        (shutil.copytree if given[option].is_dir() else shutil.copy)(given[option], tmp_path / name)
    write_qc(tmp_path / "refined", {case: (0.9, 0.8) for case in study.CASES}, {case: 1 for case in study.CASES})
    for system, file in zip(("stage_one", "refined"), tables_of(given), strict=True):
        shutil.copytree(file.parent, tmp_path / "evaluation" / system)
    command = re.search(r"nnUNetv2_diffrefine (report (?:.*\\\n)*.*)", text)[1].replace("\\\n", " ")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(shlex.split(command))
    assert ended.value.code == 0
    page = (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
    for shown in ("Is the error map right?", "uncertainty", "first to review"):
        assert shown in page


def test_the_legend_tells_classes_of_one_colour_apart(given, tmp_path):
    """Eight classes, two more than there are colours."""
    regions = {f"class {i}": [1, 2] if i % 2 else [1] for i in range(8)}
    content = json.loads(given["-djfile"].read_text()) | {"labels": {"background": 0, **regions}}
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    options = {key: given[key] for key in ("-i", "-gt", "-s", "-r")} | {"-djfile": tmp_path / "dataset.json"}
    assert report(tmp_path / "out", *tables_of(given), options) == 0
    text = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    styles = dict(re.findall(r'<path d="M2 6H46" ([^>]*) fill="none"/></svg>(class \d)', text))
    assert len(styles) == len(regions)  # keyed by style: no two look alike
    assert sum("stroke-dasharray" in style for style in styles) == 2


def test_a_full_disk_leaves_no_half_figure(given, tmp_path, monkeypatch):
    def full(self, file, **_):
        Path(file).write_bytes(b"half a figure")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(svg.Figure, "savefig", full)
    assert report(tmp_path, *tables_of(given)) == 1
    assert [file for file in tmp_path.rglob("*") if file.is_file()] == []


# what is refused


def refused(out, before, after, capsys, options=(), *more):
    assert report(out, before, after, options, *more) == 1
    assert not out.exists()
    return capsys.readouterr().err


def test_systems_must_be_two_and_paired(given, tmp_path, capsys):
    before, after = tables_of(given)
    out = tmp_path / "out"
    with pytest.raises(SystemExit, match="1"):
        main(["report", f"a={before}", "-o", str(out)])
    assert "wanted two NAME=FILE, the baseline first" in capsys.readouterr().err
    short = tmp_path / "short.csv"
    short.write_text("".join(line for line in after.read_text().splitlines(True) if "case_a" not in line))
    assert "refined lacks 1 case(s): case_a." in refused(out, before, short, capsys)
    assert "--metrics has Jaccard; the tables have Dice" in refused(
        out, before, after, capsys, {}, "--metrics", "Jaccard"
    )
    assert "--cases is 0; wanted 1 or more" in refused(out, before, after, capsys, {}, "--cases", 0)
    dice = study.write_table(tmp_path / "dice.csv", [["x", "l", "Dice", "1", "1"]])
    assert "The tables lack HD95" in refused(out, dice, dice, capsys)


@pytest.mark.parametrize("option", ["-i", "-gt", "-s", "-r", "--error_maps", "--uncertainty", "-djfile"])
def test_a_missing_folder_is_named(given, tmp_path, capsys, option):
    options = {**given, option: tmp_path / "nowhere"}
    message = refused(tmp_path / "out", *tables_of(given), capsys, options)
    assert str(tmp_path / "nowhere") in message


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        (("-i",), "pictures also need -gt, -s, -r, -djfile"),
        (("-gt", "-s", "-djfile"), "pictures also need -i, -r"),
        (("--uncertainty", "-gt", "-s", "-djfile"), "pictures also need -i, -r"),
        (("--error_maps", "-gt"), "the reliability of error maps also needs -s, -djfile"),
    ],
)
def test_folders_that_are_not_enough_are_refused(given, tmp_path, capsys, kept, message):
    options = {key: given[key] for key in kept}
    assert message in refused(tmp_path / "out", *tables_of(given), capsys, options)


@pytest.mark.parametrize("option", ["-i", "-gt", "-s", "-r", "--error_maps", "--uncertainty"])
def test_a_case_without_file_is_listed(given, tmp_path, capsys, option):
    folder = shutil.copytree(given[option], tmp_path / "copy")
    next(folder.glob("case_b*")).unlink()
    message = refused(tmp_path / "out", *tables_of(given), capsys, {**given, option: folder})
    assert f"{option} {folder} lacks CASE" in message
    assert "for 1 of 4 cases of the tables: case_b." in message


def test_a_name_in_the_table_does_not_lead_out_of_the_folder(given, tmp_path, capsys):
    name = f"../{given['-gt'].name}/case_a"
    file = study.write_table(tmp_path / "a.csv", study.table([name]))
    options = {key: given[key] for key in ("-i", "-gt", "-s", "-r", "-djfile")}
    assert "lacks CASE" in refused(tmp_path / "out", file, file, capsys, options)


@pytest.mark.parametrize(
    ("option", "array", "changes", "message"),
    [
        ("--error_maps", np.full(study.SHAPE, 1.5, np.float32), {}, "such as 1.5; wanted 0 to 1"),
        ("--uncertainty", np.full(study.SHAPE, -1, np.float32), {}, "such as -1; wanted 0 or more"),
        ("-r", np.zeros((7, 24, 20), np.uint8), {}, "do not lie on their reference's grid"),
        ("-r", np.full(study.SHAPE, 0.5, np.float32), {}, "wanted whole numbers"),
        ("--error_maps", np.full(study.SHAPE, np.nan, np.float32), {}, "NaN or infinite values"),
        ("-r", np.full(study.SHAPE, np.nan, np.float32), {}, "NaN or infinite values"),
        ("--error_maps", np.zeros(study.SHAPE, np.float32), {"spacing": (1, 1, 3.0)}, "spacing"),
        ("-i", np.zeros(study.SHAPE, np.float32), {"origin": (0, 9.0, 0)}, "origin"),
    ],
)
def test_broken_volumes_are_named(given, tmp_path, capsys, option, array, changes, message):
    folder = shutil.copytree(given[option], tmp_path / "copy")
    name = "case_b_0000.nii.gz" if option == "-i" else "case_b.nii.gz"
    study.write(folder / name, array, **changes)
    assert report(tmp_path / "out", *tables_of(given), {**given, option: folder}) == 1
    error = capsys.readouterr().err
    assert message in error
    assert name in error
    assert not (tmp_path / "out" / "report.html").exists()


@pytest.mark.parametrize("option", ["-i", "-gt", "-s", "-r", "--error_maps", "--uncertainty"])
def test_a_truncated_file_is_named(given, tmp_path, capsys, option):
    """Without a check it would be read as zeros from somewhere on."""
    folder = shutil.copytree(given[option], tmp_path / "copy")
    file = folder / ("case_b_0000.nii.gz" if option == "-i" else "case_b.nii.gz")
    file.write_bytes(file.read_bytes()[:-20])
    assert report(tmp_path / "out", *tables_of(given), {**given, option: folder}) == 1
    assert f"{file} cannot be read, it is truncated" in capsys.readouterr().err
    assert not (tmp_path / "out" / "report.html").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("case,volume\nx,1\n", "lacks the columns case and predicted_Dice"),
        ("case,predicted_Dice\ncase_a,1\n", "lacks 3 of 4 cases"),
        ("case,predicted_Dice\ncase_a,good\n", "line 2: could not convert string"),
        ("case,predicted_Dice\ncase_a,nan\n", "line 2: nan; wanted a number"),
        ("case,need_of_review,predicted_Dice\ncase_a,,1\n", "line 2, need_of_review: could not convert"),
    ],
)
def test_a_qc_table_that_does_not_fit_is_refused(given, tmp_path, capsys, content, message):
    (tmp_path / "qc.csv").write_text(content)
    assert message in refused(tmp_path / "out", *tables_of(given), capsys, {}, "--qc", tmp_path / "qc.csv")


def test_a_dataset_without_channels_is_refused(given, tmp_path, capsys):
    content = json.loads(given["-djfile"].read_text())
    del content["channel_names"]
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    options = {**given, "-djfile": tmp_path / "dataset.json"}
    assert "lacks channel_names" in refused(tmp_path / "out", *tables_of(given), capsys, options)


def test_a_file_as_output_folder_is_refused(given, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert report(tmp_path / "file", *tables_of(given)) == 1
    assert "Cannot write to the output folder" in capsys.readouterr().err
