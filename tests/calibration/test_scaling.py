"""Calibrated probabilities: the fit finds what made the data, is the best of its kind, and reads only what it may."""

import numpy as np
import pytest
import torch
from scipy.optimize import check_grad
from torch import Tensor

from nnunet_diffrefine.batch import Foreground
from nnunet_diffrefine.calibration import scaling as module
from nnunet_diffrefine.calibration.scaling import Scaling, features, fit, identity, log_loss, probabilities
from tests.builders import LABELS, REGIONS, generator

BOTH = pytest.mark.parametrize("foreground", [LABELS, REGIONS], ids=["labels", "regions"])
TRUE = Scaling([0.5, 0.8], [0.3, 0.1], [-0.4, 0.2])
N = 60_000


def inputs(foreground: Foreground, n: int = N) -> tuple[Tensor, Tensor]:
    return tuple(1.5 * torch.randn(1, foreground.heads, n, generator=generator(seed)) for seed in (1, 2))


def drawn(q: Tensor, foreground: Foreground) -> Tensor:
    """References (1, R, N) drawn from probabilities (1, R, N)."""
    if not foreground.exclusive:
        return (torch.rand(q.shape, generator=generator(3)) < q).float()
    heads = torch.cat((1 - q.sum(1, keepdim=True), q), 1)[0].T.clamp(min=0)
    chosen = torch.multinomial(heads, 1, generator=generator(3))[:, 0]
    return torch.nn.functional.one_hot(chosen, foreground.heads).T[None, 1:].float()


@BOTH
def test_the_fit_finds_the_scaling_that_made_the_data(foreground):
    refined, stage_one = inputs(foreground)
    reference = drawn(TRUE(refined, stage_one, foreground), foreground)
    found = fit(refined, stage_one, reference, foreground, (True, True))
    for name in ("refiner", "stage_one", "bias"):
        assert getattr(found, name) == pytest.approx(getattr(TRUE, name), abs=0.05)


@BOTH
def test_calibrated_probabilities_are_frequencies(foreground):
    """Where q is near p, a share p of the voxels is of the class."""
    refined, stage_one = inputs(foreground)
    reference = drawn(TRUE(refined, stage_one, foreground), foreground)
    q = fit(refined, stage_one, reference, foreground, (True, True))(refined, stage_one, foreground)
    for low in (0.1, 0.3, 0.5, 0.7):
        near = (q >= low) & (q < low + 0.2)
        assert reference[near].mean() == pytest.approx(q[near].mean().item(), abs=0.02)


@BOTH
@pytest.mark.parametrize("use", [(False, True), (True, False), (True, True)])
def test_no_nearby_scaling_has_less_log_loss(foreground, use):
    refined, stage_one = inputs(foreground, 2000)
    reference = drawn(TRUE(refined, stage_one, foreground), foreground)
    found = fit(refined, stage_one, reference, foreground, use)

    def loss(scaling: Scaling) -> float:
        a, b, d = (torch.tensor(x).view(1, -1, 1) for x in (scaling.refiner, scaling.stage_one, scaling.bias))
        z = a * features(refined, foreground) + b * features(stage_one, foreground) + d
        return log_loss(z, reference, foreground).item()

    assert [any(found.refiner), any(found.stage_one)] == list(use)
    rows = [name for name, used in (("refiner", use[0]), ("stage_one", use[1]), ("bias", True)) if used]
    for name in rows:
        for channel in range(2):
            for step in (-0.1, 0.1):
                values = {key: list(getattr(found, key)) for key in ("refiner", "stage_one", "bias")}
                values[name][channel] += step
                assert loss(Scaling(**values)) > loss(found) - 1e-6


@BOTH
def test_unused_logits_do_not_matter(foreground):
    refined, stage_one = inputs(foreground, 500)
    reference = drawn(TRUE(refined, stage_one, foreground), foreground)
    found = fit(refined, stage_one, reference, foreground, (False, True))
    assert found == fit(-3 * refined, stage_one, reference, foreground, (False, True))
    q = found(refined, stage_one, foreground)
    assert torch.equal(q, found(-3 * refined, stage_one, foreground))


@BOTH
def test_identity_gives_back_the_probabilities(foreground):
    refined, stage_one = inputs(foreground, 500)
    for source, logits in (("refiner", refined), ("stage_one", stage_one)):
        q = identity(foreground, source)(refined, stage_one, foreground)
        torch.testing.assert_close(q, foreground.probabilities(logits))


def test_exclusive_probabilities_sum_to_at_most_one_whatever_the_scaling():
    refined, stage_one = inputs(LABELS, 500)
    q = Scaling([3.0, -1.0], [2.0, 5.0], [4.0, 4.0])(refined, stage_one, LABELS)
    assert (q >= 0).all()
    assert (q.sum(1) <= 1 + 1e-6).all()


@BOTH
def test_a_class_that_never_occurs_stays_finite(foreground):
    refined, stage_one = inputs(foreground, 500)
    reference = drawn(TRUE(refined, stage_one, foreground), foreground)
    reference[:, 1] = 0
    found = fit(refined, stage_one, reference, foreground, (True, True))
    assert np.isfinite([*found.refiner, *found.stage_one, *found.bias]).all()
    assert found(refined, stage_one, foreground)[:, 1].mean() < 0.02


def test_log_loss_is_that_of_its_definition():
    z = torch.randn(1, 2, 40, generator=generator(0))
    for foreground in (LABELS, REGIONS):
        q = probabilities(z, foreground)
        reference = drawn(q, foreground)
        likelihood = torch.where(reference > 0, q, 1 - q)
        if foreground.exclusive:
            heads = torch.cat((1 - q.sum(1, keepdim=True), q), 1)
            likelihood = (heads * torch.cat((1 - reference.sum(1, keepdim=True), reference), 1)).sum(1, keepdim=True)
        assert log_loss(z, reference, foreground).item() == pytest.approx(-likelihood.log().sum(1).mean().item())


def test_the_gradient_given_to_the_optimiser_is_right(monkeypatch):
    """A wrong one would be found by no other test than a slow fit."""
    kept = {}

    def minimise(function, start, **_):
        kept["error"] = check_grad(lambda w: function(w)[0], lambda w: function(w)[1], start + 0.3)
        return type("Found", (), {"x": start})

    monkeypatch.setattr(module, "minimize", minimise)
    refined, stage_one = inputs(LABELS, 300)
    fit(refined, stage_one, drawn(TRUE(refined, stage_one, LABELS), LABELS), LABELS, (True, True))
    assert kept["error"] < 1e-5
