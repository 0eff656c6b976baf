"""The gate and the calibration in whole volumes, as ``apply`` runs them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from nnunet_diffrefine.calibration.scaling import Scaling, identity
from nnunet_diffrefine.errors.probability import error_of
from nnunet_diffrefine.inference.refine import refine_volume
from nnunet_diffrefine.networks.gate import Gate
from tests.builders import generator
from tests.inference.test_refine import BOTH, METHODS, OPTIONS, PATCH, network, volume

SCALING = Scaling([0.4, 0.6], [0.5, 0.1], [-0.2, 0.3])


@pytest.fixture
def refined():
    """Refine a volume of several windows, with a gate and options."""

    def run(foreground, gate=None, **options):
        net = network(foreground, METHODS["bridge"])
        net.gate = gate or Gate(foreground)
        image, prior = volume(foreground)
        region = torch.rand(prior.shape[1:], generator=generator(7)) < 0.7
        return refine_volume([net], image, prior, region, PATCH, replace(OPTIONS, **options)), prior, region

    return run


@BOTH
def test_gated_classes_have_stage_ones_voxels_across_windows(refined, foreground):
    free, prior, _ = refined(foreground)
    before = foreground.decide(foreground.logits(prior[None]))[0]
    assert not torch.equal(foreground.decide(free.logits[None])[0], before)
    for channel in (0, 1):
        found = foreground.decide(refined(foreground, Gate(foreground, frozenset({channel})))[0].logits[None])[0]
        assert torch.equal(found[channel], before[channel])
        assert not torch.equal(found[1 - channel], before[1 - channel])


@BOTH
def test_a_closed_gate_changes_nothing(refined, foreground):
    found, prior, _ = refined(foreground, Gate(foreground, frozenset({0, 1})))
    assert torch.equal(found.logits, foreground.logits(prior[None])[0])
    assert not found.changed.any()


@BOTH
def test_probabilities_and_error_do_not_depend_on_the_gate(refined, foreground):
    options = {"error_map": True, "probabilities": True}
    free, closed = (refined(foreground, gate, **options)[0] for gate in (None, Gate(foreground, frozenset({0, 1}))))
    assert torch.equal(free.error, closed.error)
    assert torch.equal(free.probabilities, closed.probabilities)


@BOTH
def test_without_calibration_probabilities_are_the_refiners(refined, foreground):
    found, prior, region = refined(foreground, error_map=True, probabilities=True)
    wanted = torch.where(region, foreground.probabilities(found.logits[None])[0], prior)
    torch.testing.assert_close(found.probabilities, wanted, atol=3e-4, rtol=0)
    assert torch.equal(found.probabilities[:, ~region], prior[:, ~region])


@BOTH
def test_calibrated_maps_are_the_scaling_of_both_logits(refined, foreground):
    options = {"error_map": True, "probabilities": True}
    found, prior, region = refined(
        foreground, scaling=SCALING, dice_scaling=identity(foreground, "stage_one"), **options
    )
    free, _, _ = refined(foreground, **options)
    before = foreground.logits(prior[None])
    q = SCALING(free.logits[None], before, foreground)
    wanted = error_of(q, foreground.probabilities(before), foreground)[0]
    torch.testing.assert_close(found.error[region], wanted[region], atol=2e-3, rtol=0)
    assert torch.equal(found.error[~region], free.error[~region])
    torch.testing.assert_close(found.probabilities, prior, atol=3e-4, rtol=0)
    assert torch.equal(found.logits, free.logits)
