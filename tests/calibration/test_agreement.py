"""Scores of error maps and of predicted Dice against their definitions."""

import numpy as np
import pytest

from nnunet_diffrefine.batch import Foreground
from nnunet_diffrefine.calibration.agreement import (
    Line,
    dice_scores,
    error_scores,
    fit_line,
    predicted_dice,
)
from nnunet_diffrefine.calibration.measure import measure
from nnunet_diffrefine.calibration.voxels import CaseVoxels

RNG = np.random.default_rng(0)
P = RNG.uniform(0, 1, 400).round(2)
WRONG = RNG.uniform(0, 1, 400) < P
DOUBT = RNG.uniform(0, 0.2, 400)


class TestErrors:
    def test_definitions(self):
        found = error_scores(P, WRONG, DOUBT)
        p = P.clip(1e-6, 1 - 1e-6)
        assert found.log_loss == pytest.approx(-np.where(WRONG, np.log(p), np.log(1 - p)).mean())
        assert found.brier == pytest.approx(((P - WRONG) ** 2).mean())
        for auroc, which in ((found.auroc, P >= 0), (found.auroc_doubt, DOUBT >= 0.05)):
            pairs = np.sign(P[which & WRONG][:, None] - P[which & ~WRONG][None])
            assert auroc == pytest.approx((pairs / 2 + 0.5).mean())
        bins = np.minimum((P * 10).astype(int), 9)
        shares = [abs(P[bins == b].mean() - WRONG[bins == b].mean()) * (bins == b).mean() for b in range(10)]
        assert found.ece == pytest.approx(sum(shares))

    def test_a_perfect_map(self):
        found = error_scores(WRONG.astype(float), WRONG, DOUBT)
        assert (found.brier, found.auroc, found.ece) == (0, 1, 0)
        assert found.log_loss < 1e-5

    def test_without_errors_there_is_nothing_to_rank(self):
        found = error_scores(P, np.zeros_like(WRONG), DOUBT)
        assert found.auroc is None
        assert found.auroc_doubt is None


def test_nothing_in_doubt_is_refused_not_written_as_nan():
    foreground = Foreground(("a",), exclusive=True)
    outside = np.array([[50.0], [60], [70], [60], [50]])
    none = np.zeros((1, 0))
    cases = [CaseVoxels(name, k, none, none, none > 0, outside, 30) for k, name in enumerate("ab")]
    with pytest.raises(RuntimeError, match=r"No annotated voxel of the 2 case\(s\) is in doubt.*--everywhere"):
        measure(lambda: iter(cases), [0, 1], foreground, flips=False)


class TestDice:
    def test_probabilities_of_the_truth_predict_its_dice(self):
        """With q the reference itself, predicted Dice is Dice."""
        q, m = (RNG.uniform(size=(2, 3, 500)) < 0.4).astype(float)
        found = predicted_dice(q.sum(1), m.sum(1), (q * m).sum(1))
        for c in range(3):
            both = (q[c] * m[c]).sum()
            assert found[c] == pytest.approx(2 * both / (q[c].sum() + m[c].sum()))

    def test_nothing_found_has_no_predicted_dice(self):
        assert np.isnan(predicted_dice(np.array([3.0]), np.array([0.0]), np.array([0.0]))).all()

    def test_a_line_is_found_again(self):
        x = RNG.uniform(0.5, 1, 50)
        line = fit_line(x, 0.2 + 0.7 * x)
        assert (line.intercept, line.slope) == pytest.approx((0.2, 0.7))

    @pytest.mark.parametrize(("true", "slope"), [(-2.0, 0.0), (3.0, 1.0)])
    def test_the_slope_neither_turns_the_order_nor_stretches_it(self, true, slope):
        x = RNG.uniform(0.5, 0.6, 50)
        y = 0.5 + true * (x - 0.55)
        line = fit_line(x, y)
        assert line.slope == slope
        assert line(x).mean() == pytest.approx(y.mean())

    def test_a_line_stays_in_range(self):
        assert Line(0.5, 1.0)(0.9) == 1
        assert Line(-0.5, 1.0)(0.2) == 0

    def test_equal_predictions_give_the_mean(self):
        line = fit_line(np.full(5, 0.8), np.arange(5) / 10)
        assert line(0.3) == pytest.approx(0.2)

    def test_a_group_is_judged_by_the_others(self):
        """Each group's own values, however wrong, leave its own predictions alone."""
        group = np.repeat([0, 1], 30)
        x = RNG.uniform(0.5, 1, 60)
        y = np.where(group == 0, x, 0.5 * x)
        found = dice_scores({0: x, 1: x}, y, group)
        mapped = np.where(group == 0, 0.5 * x, x)
        assert found.mae == pytest.approx(np.abs(mapped - y).mean())
        assert found.mae_before == pytest.approx(np.abs(x - y).mean())
        assert found.spearman == pytest.approx(1)

    def test_cases_without_prediction_are_left_out(self):
        x = np.array([0.5, np.nan, 0.7, 0.9, np.nan, 0.8])
        y = np.array([0.5, 0.0, 0.7, 0.9, 1.0, 0.8])
        found = dice_scores({0: x, 1: x}, y, np.array([0, 0, 0, 1, 1, 1]))
        assert (found.n, found.mae_before) == (4, 0)
        nothing = np.full(6, np.nan)
        assert dice_scores({0: nothing, 1: nothing}, y, np.array([0, 0, 0, 1, 1, 1])).n == 0
