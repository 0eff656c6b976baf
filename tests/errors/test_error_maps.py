"""A prior and its error map are the reference; nesting holds whatever the channel order."""

import pytest
import torch
from torch import Tensor

from nnunet_diffrefine.batch import Foreground
from nnunet_diffrefine.errors.maps import absolute_error, enforce_nesting, nesting_from_labels, signed_error

SHAPE = (2, 1, 9, 10, 11)
REGIONS = ((1, 2, 3), (2, 3), (3,))
DATASETS = {
    "labels": Foreground(("a", "b", "c"), exclusive=True),
    "labels with ignore": Foreground(("a", "b", "c"), exclusive=True, ignore_label=4),
    "regions": Foreground(("WT", "TC", "ET"), exclusive=False),
    "regions with ignore": Foreground(("WT", "TC", "ET"), exclusive=False, ignore_label=4),
}
each_dataset = pytest.mark.parametrize("foreground", DATASETS.values(), ids=list(DATASETS))


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def nnunet_target(foreground: Foreground, seed: int) -> Tensor:
    """A random target as nnU-Net's loader hands it over: label map, or regions with the ignore mask last."""
    labels = torch.randint(0, 4 + (foreground.ignore_label is not None), SHAPE, generator=generator(seed)).float()
    if foreground.exclusive:
        return labels
    channels = [torch.isin(labels, torch.tensor(r)).float() for r in REGIONS]
    return torch.cat(channels + ([(labels == 4).float()] if foreground.ignore_label is not None else []), 1)


def case(foreground: Foreground) -> tuple[Tensor, Tensor, Tensor]:
    """Reference, hard prior, valid."""
    reference, valid = foreground.from_target(nnunet_target(foreground, 0))
    hard_prior, _ = foreground.from_target(nnunet_target(foreground, 1))
    assert (valid.min() == 0) == (foreground.ignore_label is not None)
    return reference, hard_prior, valid


def wanted(reference: Tensor, prior: Tensor, valid: Tensor) -> Tensor:
    return torch.where(valid > 0, reference, prior)


@each_dataset
def test_signed_error_of_a_quantised_prior_is_conserved_exactly(foreground: Foreground) -> None:
    reference, _, valid = case(foreground)
    prior = torch.randint(0, 256, reference.shape, generator=generator(2)).float() / 255
    error = signed_error(reference, prior, valid)
    assert error.abs().max() <= 1
    assert torch.equal(prior + error, wanted(reference, prior, valid))
    assert (error * (1 - valid)).abs().max() == 0


def test_signed_error_is_conserved_for_every_byte_and_any_float() -> None:
    prior = torch.cat((torch.arange(256).float() / 255, torch.rand(100_000, generator=generator(3))))
    prior = torch.cat((prior, torch.logspace(-44, 0, 500), 1 - torch.logspace(-9, 0, 500))).view(1, 1, -1)
    for value in (0.0, 1.0):
        reference = torch.full_like(prior, value)
        assert torch.equal(prior + signed_error(reference, prior, torch.ones_like(prior)), reference)


def test_signed_error_says_what_is_missing_and_what_is_too_much() -> None:
    reference, prior = torch.tensor([[[1.0, 0.0, 1.0]]]), torch.tensor([[[0.25, 0.25, 1.0]]])
    assert signed_error(reference, prior, torch.ones(1, 1, 3)).tolist() == [[[0.75, -0.25, 0.0]]]


@each_dataset
def test_absolute_error_is_exclusive_or(foreground: Foreground) -> None:
    reference, prior, valid = case(foreground)
    error = absolute_error(reference, prior, valid)
    assert torch.equal(error.bool(), (reference.bool() ^ prior.bool()) & valid.bool())
    flipped = (prior.bool() ^ error.bool()).float()
    assert torch.equal(flipped, wanted(reference, prior, valid))


@each_dataset
def test_errors_of_a_hard_prior_agree(foreground: Foreground) -> None:
    signed, absolute = (error(*case(foreground)) for error in (signed_error, absolute_error))
    assert set(signed.unique().tolist()) == {-1, 0, 1}
    assert torch.equal(signed.abs(), absolute)


@each_dataset
def test_a_perfect_prior_has_no_error(foreground: Foreground) -> None:
    reference, _, valid = case(foreground)
    assert signed_error(reference, reference, valid).abs().max() == 0
    assert absolute_error(reference, reference, valid).max() == 0


def test_soft_priors_are_refused_where_a_mask_is_needed() -> None:
    reference, soft, valid = torch.ones(1, 2, 3), torch.full((1, 2, 3), 0.7), torch.ones(1, 1, 3)
    with pytest.raises(ValueError, match=r"hard_prior has 6 values other than 0 and 1, e.g. 0.7"):
        absolute_error(reference, soft, valid)


# Nesting


def test_nesting_is_derived_from_label_sets_in_any_order() -> None:
    assert nesting_from_labels(REGIONS) == (None, 0, 1)
    assert nesting_from_labels((3, (1, 2, 3), (2, 3))) == (2, None, 1)  # nnU-Net writes single labels as numbers
    assert nesting_from_labels(((1,), (2,), (1, 2), (3,))) == (2, 2, None, None)
    assert nesting_from_labels(((1, 2), (1, 2))) == (None, None)  # equal sets do not contain one another
    assert nesting_from_labels(((1,), (1, 2), (1, 3))) == (1, None, None)  # two of one size: the first


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0), (2, 1, 0)])
def test_enforced_nesting_is_the_and_of_all_ancestors(order: tuple[int, ...]) -> None:
    parents = nesting_from_labels([REGIONS[i] for i in order])
    regions = (torch.rand(2, 3, 6, 6, 6, generator=generator(5)) < 0.6).float()
    whole, core, enhancing = (regions[:, order.index(i)].bool() for i in range(3))
    result = enforce_nesting(regions, parents)
    expected = {0: whole, 1: whole & core, 2: whole & core & enhancing}
    for channel, region in enumerate(order):
        assert torch.equal(result[:, channel].bool(), expected[region])
    assert torch.equal(enforce_nesting(result, parents), result)


def test_a_deep_chain_and_probabilities_are_nested_too() -> None:
    parents = (None, *range(7))
    p = torch.rand(1, 8, 500, generator=generator(6))
    assert torch.equal(enforce_nesting(p, parents), p.cummin(1).values)


def test_nested_and_unrelated_regions_are_left_alone() -> None:
    reference, _ = DATASETS["regions"].from_target(nnunet_target(DATASETS["regions"], 0))
    assert torch.equal(enforce_nesting(reference, (None, 0, 1)), reference)
    free = (torch.rand(1, 3, 50, generator=generator(7)) < 0.5).float()
    assert torch.equal(enforce_nesting(free, (None, None, None)), free)


@pytest.mark.parametrize(
    ("parents", "message"),
    [
        ((None, 0), "parents has 2 entries, regions has 3 channels"),
        ((None, 3, 0), r"parents\[1\] is 3; it must be None or a channel in 0..2"),
        ((None, -1, 0), r"parents\[1\] is -1"),
        ((1, 2, 0), "region 0 is its own ancestor"),
        ((None, 2, 1), "region 1 is its own ancestor"),
        ((0, None, None), "region 0 is its own ancestor"),
    ],
)
def test_impossible_nestings_are_refused(parents: tuple[int | None, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        enforce_nesting(torch.zeros(1, 3, 4), parents)
