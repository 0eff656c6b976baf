"""Comparisons as Markdown and LaTeX."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nnunet_diffrefine.reports.compare import Row
    from nnunet_diffrefine.reports.statistics import PairedComparison

SIGN = {"higher": "↑", "lower": "↓", "nearer zero": "→0"}
LATEX_SIGN = {"higher": r"$\uparrow$", "lower": r"$\downarrow$", "nearer zero": r"$\to 0$"}
LATEX_SPECIAL = {
    **{character: "\\" + character for character in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
}
LATEX_DIFFERENCE = r"Difference [95\,\%]"
MARKUP = re.compile(r"[\\`*~$|]|<(?=[A-Za-z/!?])|(?<=\])\(|&(?=#?\w+;)|(?<![^\W_])_|_(?![^\W_])")
"""What Markdown would take for code, emphasis, mathematics, a cell's end, a tag, a link, an entity; a_b is none."""


def markdown(rows: Sequence[Row], baseline: str, n_cases: int) -> str:
    """The whole comparison: a table a system, p values per fold if there are any, the worst losses, and a legend."""
    parts = []
    for system in dict.fromkeys(row.system for row in rows):
        own = [row for row in rows if row.system == system]
        pooled = [row for row in own if row.fold is None]
        parts.append(f"# {_cell(system)} against {_cell(baseline)}, {n_cases} cases\n\n{_pooled(pooled, baseline)}")
        if per_fold := [row for row in own if row.fold is not None]:
            parts.append(f"## Per fold\n\n{_per_fold(per_fold)}")
        parts.append(f"## Worst losses\n\n{_losses(pooled, baseline)}")
    return "\n\n".join([*parts, _legend(rows)]) + "\n"


def latex(rows: Sequence[Row], baseline: str) -> str:
    """For the package booktabs: the pooled ``tabular`` of each system and, if there are any, that of its folds."""
    parts = ["% needs \\usepackage{booktabs}"]
    p_headers = ["better/equal/worse", "$p$ Wilcoxon (Holm)", "$p$ $t$ (Holm)"]
    for system in dict.fromkeys(row.system for row in rows):
        title = f"% {_one_line(system)} against {_one_line(baseline)}"
        own = [row for row in rows if row.system == system]
        pooled = [_latex_cells(row) for row in own if row.fold is None]
        headers = ["Label", "Metric", "$n$", escape_latex(baseline), escape_latex(system), LATEX_DIFFERENCE, *p_headers]
        parts.append(_tabular(title, "llrrrlrll", headers, pooled))
        if per_fold := _by_fold(row for row in own if row.fold is not None):
            cells = [_with_fold(row, _latex_cells(row)) for row in per_fold]
            headers = ["Label", "Metric", "Fold", "$n$", LATEX_DIFFERENCE, *p_headers]
            parts.append(_tabular(f"{title}, per fold", "llrrlrll", headers, cells))
    return "\n\n".join(parts) + "\n"


def _latex_cells(row: Row) -> list[str]:
    """:func:`row_cells` for LaTeX."""
    label, _, *numbers = row_cells(row)
    metric = f"{escape_latex(metric_name(row))} {LATEX_SIGN[row.better]}"
    return [escape_latex(label), metric, *(escape_latex(number).replace("−", "$-$") for number in numbers)]


def _tabular(title: str, columns: str, headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Rows begin with ``{}``: a name that begins with ``[`` or ``*`` would be an argument of what stands before it."""
    lines = ["{}" + " & ".join(cells) + r" \\" for cells in rows]
    head = [title, rf"\begin{{tabular}}{{{columns}}}", r"\toprule", " & ".join(headers) + r" \\", r"\midrule"]
    return "\n".join([*head, *lines, r"\bottomrule", r"\end{tabular}"])


def escape_latex(text: str) -> str:
    """Text that LaTeX prints as it is."""
    return "".join(LATEX_SPECIAL.get(character, character) for character in _one_line(text))


def _pooled(rows: Sequence[Row], baseline: str) -> str:
    headers = ["label", "metric", "n", baseline, rows[0].system, "difference [95 %]", "better / equal / worse"]
    headers += ["p Wilcoxon (Holm)", "p t (Holm)"]
    return _table(headers, [row_cells(row) for row in rows], "llrrrrrrr")


def _per_fold(rows: Sequence[Row]) -> str:
    headers = ["label", "metric", "fold", "n", "difference [95 %]", "better / equal / worse"]
    headers += ["p Wilcoxon (Holm)", "p t (Holm)"]
    return _table(headers, [_with_fold(row, row_cells(row)) for row in _by_fold(rows)], "llrrrrrr")


def _with_fold(row: Row, cells: Sequence[str]) -> list[str]:
    """The cells of a row of one fold: its number in place of both means."""
    label, metric, n, _, _, *rest = cells
    return [label, metric, str(row.fold), n, *rest]


def _by_fold(rows: Iterable[Row]) -> list[Row]:
    """The folds of a label and metric one below the other, labels and metrics in the order they came."""
    by_key: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        by_key.setdefault((row.label, row.metric), []).append(row)
    return [row for found in by_key.values() for row in sorted(found, key=lambda row: row.fold or 0)]


def _losses(rows: Sequence[Row], baseline: str) -> str:
    headers = ["label", "metric", "case", baseline, rows[0].system, "difference"]
    cells = [
        [row.label, metric_name(row), loss.case, *map(number, (loss.baseline, loss.system)), signed(loss.difference)]
        for row in rows
        for loss in row.result.losses
    ]
    return _table(headers, cells, "lllrrr") if cells else "None: no case became worse."


def _legend(rows: Sequence[Row]) -> str:
    lines = [
        "Difference: mean of system minus baseline, with its bootstrap interval (BCa, 95 %). ↑ higher is better, "
        "↓ lower, →0 nearer zero (absolute values are compared).",
        "p: one-sided, paired, the alternative being that the system is better; in brackets Holm-adjusted over all "
        "labels and metrics of the table (of the fold). An interval or p that is not defined is shown as –.",
    ]
    if one_sided := sum(row.result.n_one_sided for row in rows if row.fold is None):
        lines.append(
            f"{one_sided} values exist in one system only: it rightly predicted nothing where the other predicted "
            "something. They count as better or worse but are in no mean, interval or p; evaluate with --empty brats "
            "to have them in."
        )
    return "\n\n".join(lines)


def row_cells(row: Row) -> list[str]:
    """Label, metric, n, both means, difference, counts, p Wilcoxon and p t, as all tables show them."""
    result = row.result
    return [
        row.label,
        f"{metric_name(row)} {SIGN[row.better]}",
        str(result.n),
        number(result.baseline),
        number(result.system),
        difference(result),
        f"{result.better} / {result.equal} / {result.worse}",
        f"{p_value(result.p_wilcoxon)} ({p_value(row.p_wilcoxon_holm)})",
        f"{p_value(result.p_t)} ({p_value(row.p_t_holm)})",
    ]


def difference(result: PairedComparison) -> str:
    """The mean difference and, in brackets, its interval."""
    interval = "–" if result.interval is None else f"{signed(result.interval[0])}, {signed(result.interval[1])}"
    return f"{signed(result.difference)} [{interval}]"


def metric_name(row: Row) -> str:
    """``HD95 [mm]``."""
    return row.metric if row.unit == "1" else f"{row.metric} [{row.unit}]"


def number(value: float | None) -> str:
    """Four digits; – if there is none."""
    return "–" if value is None else f"{value:.4g}".replace("-", "−")


def signed(value: float | None) -> str:
    """Three digits with sign; – if there is none."""
    return "–" if value is None else f"{value:+.3g}".replace("-", "−")


def p_value(value: float | None) -> str:
    """Four decimals; – if there is none."""
    if value is None:
        return "–"
    return "<0.0001" if value < 1e-4 else f"{value:.4f}"


def _table(headers: Sequence[str], rows: Sequence[Sequence[str]], alignment: str) -> str:
    rule = [{"l": "---", "r": "---:"}[side] for side in alignment]
    lines = [[_cell(text) for text in headers], rule, *([_cell(text) for text in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(text: str) -> str:
    """Text that Markdown shows as it is and that cannot break out of its cell."""
    return MARKUP.sub(r"\\\g<0>", _one_line(text))


def _one_line(text: str) -> str:
    return re.sub(r"\s+", " ", text)
