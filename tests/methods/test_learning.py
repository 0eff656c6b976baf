"""Every method learns: trained for seconds on planted cases, it at least halves stage one's wrong voxels on others."""

import pytest
import torch

from nnunet_diffrefine.batch import Foreground
from nnunet_diffrefine.methods import METHODS
from tests.builders import LABELS, REGIONS
from tests.planted import calibrate, decided, network_with, planted_cases, shipped_method, train, wrong_voxels

STEPS = 200
DRAWN, KNOWN = (-1, 1), (1,)
NAMES = sorted(METHODS)


@pytest.mark.parametrize("foreground", [LABELS, REGIONS], ids=["labels", "regions"])
def test_the_prior_alone_does_not_say_what_is_wrong(foreground: Foreground) -> None:
    """Of two references that share a prior, a mask made from it has at least the voxels wrong in which they differ."""
    left, right = (planted_cases(foreground, 8, 0, (side,)) for side in DRAWN)
    assert torch.equal(left.prior, right.prior)
    wrong = sum(int((decided(foreground, cases) != cases.reference).any(1).sum()) for cases in (left, right))
    differ = int((left.reference != right.reference).any(1).sum())
    assert differ > 0.75 * wrong > 0


@pytest.mark.parametrize("name", NAMES)
def test_half_of_the_errors_go(name: str) -> None:
    """Labels and regions in turn. Without the image no side can be told: stage one errs to the same one always."""
    foreground = (LABELS, REGIONS)[NAMES.index(name) % 2]
    method = shipped_method(name, foreground)
    sides = KNOWN if method.config.condition.image == "none" else DRAWN
    network = network_with(method)
    train(network, planted_cases(foreground, 64, 0, sides), STEPS)
    if method.config.error.calibration:
        calibrate(network, planted_cases(foreground, 4, 1, sides))
    before, after = wrong_voxels(network, planted_cases(foreground, 8, 2, sides))
    assert after <= before / 2, f"{name}: {before} wrong voxels became {after}"


def test_dmcie_as_printed_does_not_get_there() -> None:
    """It predicts the noise of the error from the image alone: nothing shows it what stage one said."""
    steps = {"process": {"timesteps": 50}, "sampling": {"steps": 50}}
    network = network_with(shipped_method("dmcie", LABELS, literal=True, **steps))
    train(network, planted_cases(LABELS, 64, 0), STEPS)
    before, after = wrong_voxels(network, planted_cases(LABELS, 4, 2))
    assert after > before / 2
