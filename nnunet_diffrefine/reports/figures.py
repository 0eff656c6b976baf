"""The charts of a report: case by case, by size, and reliability of the error map."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection

from nnunet_diffrefine.evaluation.definitions import find_metric
from nnunet_diffrefine.reports.metrics_table import MetricsTable
from nnunet_diffrefine.reports.reliability import MAP, OWN, Histogram, Reliability
from nnunet_diffrefine.reports.sizes import VOLUME, SizeGroup
from nnunet_diffrefine.reports.statistics import EQUAL
from nnunet_diffrefine.reports.svg import BETTER, INK, QUIET, WORSE, Drawing
from nnunet_diffrefine.reports.tables import number, signed

CHART = (3.3, 3.0)
KINDS = ((1, BETTER, "^"), (0, QUIET, "o"), (-1, WORSE, "v"))
CURVES = ((MAP, BETTER, "o"), (OWN, QUIET, "s"))
SKEWED = 10.0
"""A distance axis becomes logarithmic where the largest value is this many medians."""
RESAMPLES = 1000
Rows = Mapping[tuple[str, str], str]


def case_scatter(baseline: MetricsTable, system: MetricsTable, label: str, metric: str, rows: Rows) -> Drawing:
    """Every case's value, baseline across and system up; above the diagonal is more.

    Args:
        baseline: table.
        system: table, of the same cases.
        label: class.
        metric: one with a better direction.
        rows: ``rows[case, label]`` is the link target of a point.
    """
    kind = find_metric(metric)
    cases, old, new, sign = _pairs(baseline, system, label, metric)

    def draw(axis: Axes) -> None:
        _points(axis, old, new, sign, [rows[case, label] for case in cases])
        unit = "" if kind.unit == "1" else f" [{kind.unit}]"
        axis.set(xlabel=f"{baseline.name}: {metric}{unit}", ylabel=f"{system.name}: {metric}{unit}")
        _square(axis, np.concatenate([old, new]), logarithmic=kind.unit == "mm")

    sentences = {
        rows[case, label]: f"{case}: {number(a)} to {number(b)}" for case, a, b in zip(cases, old, new, strict=True)
    }
    return Drawing(f"{label}, {metric}", draw, CHART, links=sentences)


def _pairs(
    baseline: MetricsTable, system: MetricsTable, label: str, metric: str
) -> tuple[list[str], np.ndarray, np.ndarray, np.ndarray]:
    """Cases with a value in both, both values, and 1 (better), 0 or -1."""
    old, new = (table.values[label, metric] for table in (baseline, system))
    cases = [case for case in sorted(old) if not (math.isnan(old[case]) or math.isnan(new[case]))]
    a, b = (np.array([values[case] for case in cases], dtype=float) for values in (old, new))
    gain = (b - a) * (1 if find_metric(metric).better == "higher" else -1)
    return cases, a, b, np.where(np.abs(gain) <= EQUAL, 0, np.sign(gain))


def _points(axis: Axes, x: np.ndarray, y: np.ndarray, sign: np.ndarray, targets: Sequence[str]) -> None:
    """Better points up and blue, worse down and orange, equal round and grey, each a link."""
    for value, colour, marker in KINDS:
        here = np.flatnonzero(sign == value)
        if here.size:
            found: PathCollection = axis.scatter(
                x[here], y[here], s=20, c=colour, marker=marker, alpha=0.75, linewidths=0, zorder=3
            )
            found.set_urls([f"#{targets[int(i)]}" for i in here])


def _square(axis: Axes, values: np.ndarray, logarithmic: bool) -> None:
    """The same scale on both axes, and the line of no change."""
    low, high = (float(values.min()), float(values.max())) if values.size else (0.0, 1.0)
    positive = values[values > 0]
    if logarithmic and positive.size and high > SKEWED * np.median(positive):
        step = float(positive.min())
        axis.set_xscale("symlog", linthresh=step)
        axis.set_yscale("symlog", linthresh=step)
        limits = (-0.2 * step if low == 0 else low / 1.3, high * 1.3)
        for side in (axis.xaxis, axis.yaxis):
            side.set_major_formatter("{x:g}")
    else:
        margin = 0.05 * (high - low) or 0.05 * abs(high) or 0.05
        limits = (low - margin, high + margin)
    axis.plot(limits, limits, color=INK, linewidth=0.8, linestyle=(0, (4, 3)), zorder=2)
    axis.set(xlim=limits, ylim=limits)
    axis.set_box_aspect(1)
    axis.grid(True)


def size_chart(
    baseline: MetricsTable, system: MetricsTable, groups: Sequence[SizeGroup], metric: str, rows: Rows
) -> Drawing:
    """Change of a metric against the volume of the reference, with the mean and interval of each third.

    Args:
        baseline: table.
        system: table, of the same cases.
        groups: of one class.
        metric: one with a better direction.
        rows: ``rows[case, label]`` is the link target of a point.
    """
    label = groups[0].label
    volumes = baseline.values[label, VOLUME]
    cases, old, new, sign = _pairs(baseline, system, label, metric)
    here = [i for i, case in enumerate(cases) if volumes[case] > 0]
    kind = find_metric(metric)
    thirds = [group for group in groups if group.name.endswith("third")] or [g for g in groups if g.volumes]

    def draw(axis: Axes) -> None:
        axis.axhline(0, color=INK, linewidth=0.8, linestyle=(0, (4, 3)), zorder=2)
        x = np.array([volumes[cases[i]] for i in here])
        _points(axis, x, (new - old)[here], sign[here], [rows[cases[i], label] for i in here])
        for group in thirds:
            _mean_line(axis, group, metric)
        if x.size and x.max() > 3 * x.min():
            axis.set_xscale("log")
            axis.xaxis.set_major_formatter("{x:g}")
            axis.xaxis.set_minor_formatter("")
        unit = "" if kind.unit == "1" else f" [{kind.unit}]"
        axis.set(xlabel="reference volume [mL]", ylabel=f"change of {metric}{unit}")
        axis.grid(True)

    sentences = {
        rows[cases[i], label]: f"{cases[i]}: {signed(new[i] - old[i])} at {number(volumes[cases[i]])} mL" for i in here
    }
    return Drawing(f"{label}, change of {metric}", draw, CHART, links=sentences)


def _mean_line(axis: Axes, group: SizeGroup, metric: str) -> None:
    result = group.results[metric]
    if group.volumes is None or result.difference is None:
        return
    axis.plot(group.volumes, [result.difference] * 2, color=INK, linewidth=1.6, zorder=4)
    if result.interval is not None:
        axis.fill_between(group.volumes, *result.interval, color=INK, alpha=0.15, linewidth=0, zorder=1)


def reliability_chart(found: Mapping[str, Reliability], seed: int) -> Drawing:
    """Share of wrong voxels against predicted probability, within the band, with intervals over cases."""
    curves = [curve for curve in CURVES if curve[0] in found]

    def draw(axis: Axes) -> None:
        axis.plot([0, 1], [0, 1], color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
        for name, colour, marker in curves:
            n, probability, share = found[name].band.coarse()
            low, high = _intervals(found[name].by_case, seed)
            full = n > 0
            axis.vlines(probability[full], low[full], high[full], color=colour, linewidth=1.4)
            axis.plot(probability[full], share[full], color=colour, marker=marker, ms=4, linewidth=1.2, label=name)
        if len(curves) > 1:
            axis.legend(frameon=False, fontsize=7, loc="upper left")
        axis.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
        axis.set(xlabel="predicted probability of an error", ylabel="share of voxels that are wrong")
        axis.set_box_aspect(1)
        axis.grid(True)

    return Drawing("Reliability", draw, CHART)


def count_chart(found: Reliability) -> Drawing:
    """How many voxels of the band have which predicted probability."""
    n, *_ = found.band.coarse()
    edges = np.linspace(0, 1, len(n) + 1)

    def draw(axis: Axes) -> None:
        axis.bar(edges[:-1], n, width=np.diff(edges) * 0.92, align="edge", color=QUIET)
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter("{x:,.0f}")
        axis.yaxis.set_minor_formatter("")
        axis.set(xlim=(-0.02, 1.02), xlabel="predicted probability of an error", ylabel="voxels in the band")
        axis.set_box_aspect(1)
        axis.grid(True, axis="y")

    return Drawing("Voxels", draw, CHART)


def _intervals(cases: Sequence[Histogram], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Percentile bootstrap (95 %) over cases of each bin's share of wrong voxels."""
    bins = len(cases[0].coarse()[0])
    n, wrong = (
        np.stack([values.reshape(bins, -1).sum(1) for values in given])
        for given in ([case.n for case in cases], [case.wrong for case in cases])
    )
    draws = np.random.default_rng(seed).integers(len(cases), size=(RESAMPLES, len(cases)))
    with np.errstate(invalid="ignore"):
        shares = wrong[draws].sum(1) / n[draws].sum(1)
    empty = np.isnan(shares).all(0)
    shares[:, empty] = 0
    low, high = np.nanquantile(shares, [0.025, 0.975], axis=0)
    return low, high
