"""Paired statistics: closed forms, worked examples, invariances."""

import math

import numpy as np
import pytest
from scipy import stats

from nnunet_diffrefine.reports.statistics import bootstrap_interval, compare, holm, t_p, wilcoxon_p


def named(values):
    return {f"case_{i:03d}": float(v) for i, v in enumerate(values)}


def test_holm_worked_example():
    """Sorted p of 0.01, 0.02, 0.03, 0.04 times 4, 3, 2, 1, never falling."""
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])


def test_holm_lies_between_none_and_bonferroni_and_keeps_the_order():
    p = np.random.default_rng(0).uniform(0, 0.4, 20).tolist()
    adjusted = holm(p)
    assert all(a <= b <= min(1, 20 * a) + 1e-12 for a, b in zip(p, adjusted, strict=True))
    order = np.argsort(p)
    assert np.all(np.diff(np.array(adjusted)[order]) >= 0)
    assert holm([0.03]) == [0.03]
    assert max(holm([0.9, 0.8, 0.7])) == 1.0


def test_undefined_p_values_do_not_count_in_holm():
    assert holm([None, 0.02, 0.03, None]) == [None, pytest.approx(0.04), pytest.approx(0.04), None]
    assert holm([]) == []


def test_wilcoxon_by_hand():
    """All five of five differences positive: one of 2^5 sign patterns is as extreme."""
    gains = np.array([0.1, 0.2, 0.3, 0.4, 0.5])
    assert wilcoxon_p(gains) == pytest.approx(1 / 32)
    assert wilcoxon_p(-gains) == pytest.approx(1.0)


def test_t_by_formula():
    gains = np.random.default_rng(1).normal(0.2, 1, 12)
    t = gains.mean() / (gains.std(ddof=1) / math.sqrt(12))
    assert t_p(gains) == pytest.approx(stats.t.sf(t, 11))
    assert t_p(gains) + t_p(-gains) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("gains", "wilcoxon", "t"),
    [([0.0] * 4, 1.0, 1.0), ([0.3], None, None), ([], None, None), ([0.2] * 5, 1 / 32, None)],
)
def test_where_tests_are_not_defined(gains, wilcoxon, t):
    assert wilcoxon_p(np.array(gains)) == (None if wilcoxon is None else pytest.approx(wilcoxon))
    assert t_p(np.array(gains)) == t


def test_false_positive_rate_of_both_tests_under_no_difference():
    rng = np.random.default_rng(2)
    draws = rng.normal(0, 1, (400, 20))
    for test in (wilcoxon_p, t_p):
        rate = np.mean([test(d) < 0.05 for d in draws])
        assert 0.02 <= rate <= 0.085  # 0.05 +- 3 standard errors


def test_bootstrap_interval_covers_the_mean_as_often_as_it_says():
    rng = np.random.default_rng(3)
    intervals = [bootstrap_interval(rng.normal(1.0, 2.0, 40), seed) for seed in range(60)]
    covered = np.mean([low <= 1.0 <= high for low, high in intervals])
    assert covered >= 0.83  # 95 % - 4 standard errors


def test_bootstrap_interval_is_close_to_the_normal_one_for_many_cases():
    values = np.random.default_rng(4).normal(0.5, 1.0, 500)
    half = 1.96 * values.std(ddof=1) / math.sqrt(500)
    assert bootstrap_interval(values) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.1 * half)


def test_bootstrap_interval_is_seeded_and_defined_for_equal_values():
    values = np.random.default_rng(5).normal(0, 1, 10)
    assert bootstrap_interval(values, 1) == bootstrap_interval(values, 1) != bootstrap_interval(values, 2)
    assert bootstrap_interval(np.full(5, 0.25)) == (0.25, 0.25)
    assert bootstrap_interval(np.array([1.0])) is None


def test_better_equal_and_worse_follow_the_direction():
    old, new = named([0.5, 0.6, 0.7, 0.8]), named([0.6, 0.6, 0.65, 0.9])
    higher, lower = compare(old, new, "higher"), compare(old, new, "lower")
    assert (higher.better, higher.equal, higher.worse) == (2, 1, 1)
    assert (lower.better, lower.equal, lower.worse) == (1, 1, 2)
    assert higher.difference == lower.difference == pytest.approx(0.0375)
    assert higher.p_t + lower.p_t == pytest.approx(1.0)
    assert [loss.case for loss in higher.losses] == ["case_002"]
    assert [loss.case for loss in lower.losses] == ["case_000", "case_003"]


def test_volume_errors_are_compared_by_size():
    found = compare(named([-4.0, 3.0, -1.0]), named([1.0, -2.0, 2.0]), "nearer zero")
    assert (found.baseline, found.system) == (pytest.approx(8 / 3), pytest.approx(5 / 3))
    assert (found.better, found.worse) == (2, 1)
    assert found.losses[0].difference == 1.0


def test_one_sided_p_is_that_of_re_diffinet():
    """Left-tailed for HD95: X the system, Y the baseline, alternative mean of X - Y below 0."""
    rng = np.random.default_rng(6)
    baseline = rng.gamma(2, 2, 30)
    system = baseline - rng.normal(0.3, 1, 30)
    found = compare(named(baseline), named(system), "lower")
    assert found.p_t == pytest.approx(stats.ttest_rel(system, baseline, alternative="less").pvalue)
    assert found.p_wilcoxon == pytest.approx(stats.wilcoxon(system, baseline, alternative="less").pvalue)


def test_exchanging_the_systems_mirrors_everything():
    rng = np.random.default_rng(7)
    first, second = named(rng.uniform(0, 1, 25)), named(rng.uniform(0, 1, 25))
    one, other = compare(first, second, "higher"), compare(second, first, "higher")
    assert one.difference == pytest.approx(-other.difference)
    assert (one.better, one.equal, one.worse) == (other.worse, other.equal, other.better)
    assert one.interval == pytest.approx((-other.interval[1], -other.interval[0]), abs=0.02)


def test_rounding_is_no_difference():
    found = compare(named([0.1 + 0.2]), named([0.3]), "higher")
    assert (found.better, found.equal, found.worse) == (0, 1, 0)


def test_values_that_one_system_lacks_are_counted_but_not_averaged():
    """No value is a structure that is absent and rightly not predicted, so who has a value invented one."""
    nan = math.nan
    old, new = named([0.5, nan, 0.0, nan]), named([0.7, 0.0, nan, nan])
    found = compare(old, new, "higher")
    assert (found.n, found.n_one_sided) == (1, 2)
    assert (found.better, found.equal, found.worse) == (2, 1, 1)
    assert found.difference == pytest.approx(0.2)
    nothing = compare(named([nan, nan]), named([nan, nan]), "higher")
    assert (nothing.n, nothing.equal, nothing.difference, nothing.interval) == (0, 2, None, None)


def test_unpaired_cases_are_refused():
    with pytest.raises(ValueError, match=r"Unpaired cases: \['case_001'\]"):
        compare(named([1.0, 2.0]), named([1.0]), "higher")
