"""The tables of compare_methods.py, as Markdown."""

from __future__ import annotations

import numpy as np
from scipy.stats import wilcoxon

from nnunet_diffrefine.reports.statistics import holm


def comparison_table(rows: dict, classes: list[str], baseline: str, bar: str) -> str:
    """A row a system, best mean Dice first; systems named ``+NAME`` fill the last columns of ``NAME``.

    Mean and standard deviation over cases; two-sided Wilcoxon tests of the class mean, paired by case, against
    ``baseline`` and ``bar``, each column with Holm's correction. Empty masks: see :func:`metrics.dice` and
    :func:`metrics.hd95`.
    """
    head = ["system", *(f"Dice {c}" for c in classes), "Dice mean", *(f"HD95 {c}" for c in classes), "HD95 mean"]
    head += [f"better / worse than {baseline}", "p", f"than {bar}", "p", "flip precision", "error Dice"]
    head += [f"averaged with {baseline}: Dice", "HD95"]
    names = sorted((n for n in rows if not n.startswith("+")), key=lambda n: -_mean(rows[n]["dice"]))
    against = [_paired(rows, names, of) for of in (baseline, bar)]
    lines = ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1)]
    for name in names:
        averaged = rows.get(f"+{name}")
        cells = [name, *_scores(rows[name])]
        cells += [cell for one in against for cell in one[name]]
        cells += [
            f"{_change(rows[name], key):.3f}" if name != baseline else "-" for key in ("flip_precision", "error_dice")
        ]
        cells += [f"{100 * _mean(averaged['dice']):.2f}", f"{_mean(averaged['hd95']):.3f}"] if averaged else ["-", "-"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _mean(values: list) -> float:
    return float(np.nanmean(np.array(values)))


def _change(row: dict, key: str) -> float:
    values = [case[key] for case in row["change"]]
    return float(np.nanmean(values)) if np.isfinite(values).any() else float("nan")


def _scores(row: dict) -> list[str]:
    cells = []
    for values, digits in ((100 * np.array(row["dice"]), 2), (np.array(row["hd95"]), 3)):
        each = zip(np.nanmean(values, 0), np.nanstd(values, 0), strict=True)
        cells += [f"{m:.{digits}f} ± {s:.{digits}f}" for m, s in each]
        cells.append(f"**{np.nanmean(values):.{digits}f}**")
    return cells


def _paired(rows: dict, names: list[str], of: str) -> dict[str, tuple[str, str]]:
    """Name -> cases better / worse, and p."""
    base = np.nanmean(rows[of]["dice"], 1)
    gains = {name: np.nanmean(rows[name]["dice"], 1) - base for name in names}
    tested = [name for name in names if np.any(gains[name])]
    p = dict(zip(tested, holm([float(wilcoxon(gains[name]).pvalue) for name in tested]), strict=True))
    counts = {name: f"{(gain > 0).sum()} / {(gain < 0).sum()}" for name, gain in gains.items()}
    return {name: (counts[name], f"{p[name]:.2g}") if name in p else ("-", "-") for name in names}


def cost_table(costs: dict[str, dict]) -> str:
    """Passes, parameters, seconds a case, memory, and the one-step version."""
    lines = [
        "| method | passes | parameters | s / case | x stage one | peak MiB | one step: Dice | HD95 |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, cost in costs.items():
        one = cost.get("one_step")
        short = f"{one['dice']:.2f} | {one['hd95']:.3f}" if one else "as trained | as trained"
        ratio = cost["seconds"] / cost["stage_one_seconds"]
        lines.append(
            f"| {name} | {cost['passes']} | {cost['parameters'] / 1e6:.2f} M | {cost['seconds']:.2f} | {ratio:.2f} | "
            f"{cost['peak_mib']:.0f} | {short} |"
        )
    return "\n".join(lines)
