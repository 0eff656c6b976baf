"""From evidence of errors to a mask: thresholds, nested regions, classes that flip at once."""

from typing import Any

import pytest
import torch
from torch import Tensor

from nnunet_diffrefine.batch import Foreground
from nnunet_diffrefine.config import RefineConfig
from nnunet_diffrefine.methods.composition import ComposedMethod
from tests.builders import LABELS, REGIONS, batch_of, generator

BOTH = pytest.mark.parametrize("foreground", [LABELS, REGIONS], ids=["labels", "regions"])
NESTED = Foreground(("core", "whole", "enhancing"), exclusive=False, parents=(1, None, 0))


def composed(foreground: Foreground, **error: Any) -> ComposedMethod:
    return ComposedMethod(RefineConfig.from_dict({"error": error}), foreground)


@BOTH
@pytest.mark.parametrize("target", ["absolute", "three_way"])
def test_thresholds_of_infinity_never_flip(foreground: Foreground, target: str) -> None:
    method, batch = composed(foreground, target=target), batch_of(foreground)
    hard = foreground.decide(foreground.logits(batch.prior))
    sure = method.target.evidence(torch.ones_like(batch.prior), batch.prior)
    for evidence in (sure, 30 * torch.randn(batch.prior.shape, generator=generator())):
        never = method.decide(evidence, batch.prior, torch.full((2,), torch.inf))
        assert torch.equal(foreground.decide(never), hard)
        assert never.isfinite().all()


@BOTH
def test_a_channel_at_infinity_stays_while_the_other_is_mended(foreground: Foreground) -> None:
    method, batch = composed(foreground, target="absolute"), batch_of(foreground)
    hard = foreground.decide(foreground.logits(batch.prior))
    evidence = torch.where(hard != batch.reference, 9.0, -9.0)
    decided = foreground.decide(method.decide(evidence, batch.prior, torch.tensor([torch.inf, 0.0])))
    assert torch.equal(decided[:, 0], hard[:, 0])
    free = decided[:, 0] == 0 if foreground.exclusive else torch.ones_like(decided[:, 0], dtype=torch.bool)
    assert torch.equal(decided[:, 1][free], batch.reference[:, 1][free])


@BOTH
def test_nnunets_half_precision_sum_of_windows_takes_the_surest_logits(foreground: Foreground) -> None:
    """nnU-Net weighs logits by up to 10 and adds those of overlapping windows as float16."""
    method, batch = composed(foreground, target="absolute"), batch_of(foreground)
    never = method.decide(torch.full_like(batch.prior, -14.0), batch.prior, torch.full((2,), torch.inf))
    assert (30 * 10 * never).half().isfinite().all()


def test_initial_thresholds_are_the_settings() -> None:
    method = composed(LABELS, target="absolute", threshold=0.8)
    torch.testing.assert_close(method.initial_thresholds().sigmoid(), torch.tensor([0.8, 0.8]))


@pytest.mark.parametrize("target", ["absolute", "three_way"])
def test_nested_regions_stay_nested(target: str) -> None:
    """Whatever the channels say: enhancing in core in whole, here in the order core, whole, enhancing."""
    prior = torch.rand(2, 3, 8, 8, 8, generator=generator())
    prior = prior.sort(1).values[:, [1, 2, 0]]
    evidence = 3 * torch.randn(prior.shape, generator=generator(1))

    def decided(nesting: bool) -> Tensor:
        method = composed(NESTED, target=target, nesting=nesting)
        return NESTED.decide(method.decide(evidence, prior, torch.tensor([0.3, -0.2, 0.0])))

    core, whole, enhancing = decided(nesting=True).unbind(1)
    assert (enhancing <= core).all()
    assert (core <= whole).all()
    free = decided(nesting=False)
    assert (free[:, 2] > free[:, 0]).any()
    assert (free[:, 0] > free[:, 1]).any()
    assert torch.equal(free[:, 1], whole)  # the outermost region is bound by nothing


@pytest.mark.parametrize(
    ("prior", "evidence", "thresholds", "expected"),
    [
        pytest.param(1, (-2.0, -3.0), (0, 0), 1, id="nothing wrong"),
        pytest.param(1, (2.0, -3.0), (0, 0), 0, id="class wrong, no other: background"),
        pytest.param(1, (2.0, 1.0), (0, 0), 2, id="class wrong, other missing: other"),
        pytest.param(1, (-2.0, 1.0), (0, 0), 1, id="class surer to be right than other to be missing"),
        pytest.param(1, (-1.0, 3.0), (0, 0), 2, id="other surer to be missing than class to be right"),
        pytest.param(0, (1.0, 2.0), (0, 0), 2, id="both missing: the likelier"),
        pytest.param(0, (2.0, 1.0), (0, 0), 1, id="both missing: the likelier, first"),
        pytest.param(0, (-0.4, -0.4), (0, 0), 0, id="two at 40 % each do not outvote the background"),
        pytest.param(0, (-1.0, 0.1), (0, 0), 2, id="one missing"),
        pytest.param(1, (2.0, -3.0), (3, 0), 1, id="wrong, but below its class' threshold"),
        pytest.param(0, (2.0, 1.0), (3, 0), 2, id="likelier class below its threshold"),
        pytest.param(0, (2.0, 1.0), (1.5, 0), 2, id="margins above the thresholds decide: 0.5 against 1"),
        pytest.param(2, (4.0, 1.0), (0, 3), 1, id="2 unsure at a high threshold, 1 surer"),
        pytest.param(2, (1.0, 1.0), (0, 3), 2, id="2 keeps its margin of 2 against 1"),
    ],
)
def test_exclusive_classes_that_flip_at_once_follow_one_rule(prior, evidence, thresholds, expected) -> None:
    method = composed(LABELS, target="absolute")
    probabilities = torch.tensor([[0.0, 0.0], [0.9, 0.1], [0.1, 0.9]])[prior].view(1, 2, 1, 1, 1)
    logits = method.decide(
        torch.tensor(evidence).view(1, 2, 1, 1, 1), probabilities, torch.tensor(thresholds, dtype=torch.float32)
    )
    assert logits.shape == (1, 3, 1, 1, 1)
    assert int(logits.argmax(1)) == expected
