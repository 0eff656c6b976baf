"""Names in Markdown and LaTeX tables are shown as they are, whatever they hold; both have all rows."""

import dataclasses
import re

import pytest

from nnunet_diffrefine.reports.compare import Row
from nnunet_diffrefine.reports.statistics import compare
from nnunet_diffrefine.reports.tables import latex, markdown

OLD = {f"case_{i}": 0.5 + 0.01 * i for i in range(5)}
NEW = {case: value + 0.1 - 0.001 * i for i, (case, value) in enumerate(OLD.items())}


def row(label, **changes):
    given = Row("refined", None, label, "Dice", "1", "higher", compare(OLD, NEW, "higher"), 0.03, 0.04)
    return dataclasses.replace(given, **changes)


def unescaped(text):
    """Markdown without its backslash escapes, as a renderer shows it."""
    return re.sub(r"\\([\\`*~$|<(&_])", r"\1", text)


HOSTILE = {
    "<core>": r"\<core>",
    "</td>": r"\</td>",
    "<!-- a": r"\<!-- a",
    "a*b*": r"a\*b\*",
    "`x`": r"\`x\`",
    "_x_": r"\_x\_",
    "[a](b)": r"[a]\(b)",
    "a|b": r"a\|b",
    r"a\|b": r"a\\\|b",
    "~~a~~": r"\~\~a\~\~",
    "$x$": r"\$x\$",
    "&lt;": r"\&lt;",
    "two\nlines": "two lines",
    # what is no markup stays readable
    "tail_1": "tail_1",
    "size < 3 mm & more": "size < 3 mm & more",
    "HD95 [mm] (all)": "HD95 [mm] (all)",
}


@pytest.mark.parametrize(("name", "written"), HOSTILE.items(), ids=[*HOSTILE])
def test_markdown_shows_names_as_they_are(name, written):
    lines = markdown([row(name, system=name)], name, 5).splitlines()
    assert lines[0] == f"# {written} against {written}, 5 cases"
    assert lines[4].startswith(f"| {written} | Dice")
    assert unescaped(written) == name.replace("\n", " ")


def test_markdown_leaves_numbers_and_intervals_alone():
    line = markdown([row("head")], "nnU-Net", 5).splitlines()[4]
    assert "\\" not in line
    assert re.search(r"\[\+0\.\d+, \+0\.\d+\]", line)


@pytest.mark.parametrize("name", ["[core]", "*", "*[2mm]", "head"])
def test_no_latex_row_begins_with_what_the_line_before_would_take_for_its_argument(name):
    r"""``\\\\[core]``, ``\\midrule [core]`` and ``\\\\*`` are commands with arguments."""
    text = latex([row(name), row(name, metric="IoU"), row(name, fold=0), row(name, fold=1)], "nnU-Net")
    rows = [line for line in text.splitlines() if "&" in line and "Label" not in line]
    assert len(rows) == 4
    assert all(line.startswith("{}" + name) for line in rows)
    assert not re.search(r"(\\\\|rule)\s*[\[*]", text)


def test_latex_holds_the_folds_too():
    rows = [row(label, fold=fold) for fold in (None, 1, 0) for label in ("head", "tail")]
    text = latex(rows, "nnU-Net")
    assert text.count(r"\begin{tabular}") == text.count(r"\end{tabular}") == 2
    per_fold = text.split("per fold")[1]
    found = re.findall(r"^\{\}(\w+) & .*? & (\d) & (\d) &", per_fold, re.MULTILINE)
    assert found == [("head", "0", "5"), ("head", "1", "5"), ("tail", "0", "5"), ("tail", "1", "5")]
    for table in text.split(r"\begin{tabular}")[1:]:
        columns = re.match(r"\{(\w+)\}", table)[1]
        widths = {line.count("&") for line in table.splitlines() if line.endswith(r"\\")}
        assert widths == {len(columns) - 1}
    assert "per fold" not in latex(rows[:2], "nnU-Net")
