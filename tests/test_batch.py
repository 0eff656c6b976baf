"""The meaning of channels: probabilities and logits, decisions, and nnU-Net's training targets."""

import pytest
import torch
from nnunetv2.utilities.label_handling.label_handling import LabelManager

from nnunet_diffrefine.batch import Foreground, RefineBatch
from nnunet_diffrefine.errors.maps import nesting_from_labels
from tests.builders import IGNORE, LABELS, REGIONS, batch_of, generator, label_maps, target_of, with_ignore

EPS = 1e-4
BOTH = pytest.mark.parametrize("foreground", [LABELS, REGIONS], ids=["labels", "regions"])
MANAGERS = {
    True: LabelManager({"background": 0, "edema": 1, "core": 2}, None),
    False: LabelManager({"background": 0, "whole": [1, 2], "core": 2}, [1, 2]),
}


def random_logits(foreground: Foreground, spread: float = 5.0) -> torch.Tensor:
    return spread * torch.randn(2, foreground.heads, 4, 5, 6, generator=generator())


@BOTH
def test_heads_are_those_of_nnunet(foreground: Foreground) -> None:
    assert foreground.channels == 2
    assert foreground.heads == MANAGERS[foreground.exclusive].num_segmentation_heads


@BOTH
def test_probabilities_are_nnunets_without_background(foreground: Foreground) -> None:
    logits, manager = random_logits(foreground), MANAGERS[foreground.exclusive]
    expected = torch.stack([manager.apply_inference_nonlin(one) for one in logits])[:, -foreground.channels :]
    torch.testing.assert_close(foreground.probabilities(logits), expected)


@BOTH
def test_logits_invert_probabilities(foreground: Foreground) -> None:
    soft = foreground.probabilities(random_logits(foreground, spread=1.0))
    torch.testing.assert_close(foreground.probabilities(foreground.logits(soft)), soft, atol=1e-6, rtol=1e-4)


@BOTH
def test_sure_probabilities_come_back_to_within_eps(foreground: Foreground) -> None:
    sure = foreground.from_target(target_of(foreground, label_maps(foreground)))[0]
    logits = foreground.logits(sure)
    assert torch.isfinite(logits).all()
    torch.testing.assert_close(foreground.probabilities(logits), sure, atol=foreground.heads * EPS, rtol=0)
    assert torch.equal(foreground.decide(logits), sure)


def test_probabilities_that_sum_to_more_than_one_still_have_logits() -> None:
    quantised = torch.tensor([0.502, 0.502]).view(1, 2, 1, 1, 1)
    logits = LABELS.logits(quantised)
    assert torch.isfinite(logits).all()
    torch.testing.assert_close(LABELS.probabilities(logits), quantised, atol=0.005, rtol=0)


@BOTH
def test_half_precision_logits_give_float_probabilities(foreground: Foreground) -> None:
    logits = random_logits(foreground).half()
    assert foreground.probabilities(logits).dtype == torch.float32
    torch.testing.assert_close(foreground.probabilities(logits), foreground.probabilities(logits.float()))


@BOTH
def test_decisions_are_nnunets(foreground: Foreground) -> None:
    logits, manager = random_logits(foreground, spread=1.0), MANAGERS[foreground.exclusive]
    decided = foreground.decide(logits)
    segmentations = torch.stack([manager.convert_logits_to_segmentation(one) for one in logits])
    if foreground.exclusive:
        expected = torch.stack([segmentations == 1, segmentations == 2], 1)
        assert torch.equal(decided, expected.float())
        assert decided.sum(1).max() == 1
    else:
        assert torch.equal(decided, (torch.sigmoid(logits) > 0.5).float())
        written = torch.where(decided[:, 1] > 0, 2, torch.where(decided[:, 0] > 0, 1, 0))
        assert torch.equal(written, segmentations.to(written))


@pytest.mark.parametrize(
    ("regions", "order"),
    [
        pytest.param([[1, 2, 3], [2, 3], 3], [1, 2, 3], id="chain"),
        pytest.param([3, [1, 2, 3], [2, 3]], [3, 1, 2], id="chain, innermost written first"),
        pytest.param([[1, 2, 3], 2, 3], [1, 2, 3], id="siblings"),
        pytest.param([[1, 2], 2, [3, 4], 4], [1, 2, 3, 4], id="apart"),
        pytest.param([[1, 2], [2, 3]], [1, 3], id="overlapping"),
    ],
)
def test_exported_channels_are_those_of_nnunets_label_map(regions: list, order: list[int]) -> None:
    names = tuple(f"region {i}" for i in range(len(regions)))
    manager = LabelManager({"background": 0, **dict(zip(names, regions, strict=True))}, order)
    foreground = Foreground(names, exclusive=False, parents=nesting_from_labels(regions))
    logits = random_logits(foreground)
    exported = foreground.exported(foreground.decide(logits))
    for found, one in zip(exported, logits, strict=True):
        labels = manager.convert_logits_to_segmentation(one)
        expected = torch.stack([torch.isin(labels, torch.tensor(region)) for region in regions])
        assert torch.equal(found, expected.float())


@BOTH
def test_channels_without_a_known_nesting_are_exported_as_they_are(foreground: Foreground) -> None:
    decided = foreground.decide(random_logits(foreground))
    assert torch.equal(foreground.exported(decided), decided)


@pytest.mark.parametrize("ignore", [False, True], ids=["complete", "ignore"])
@BOTH
def test_targets_are_split_into_reference_and_valid_mask(foreground: Foreground, ignore: bool) -> None:
    foreground = with_ignore(foreground) if ignore else foreground
    labels = label_maps(foreground)
    reference, valid = foreground.from_target(target_of(foreground, labels))
    first = labels == 1 if foreground.exclusive else (labels == 1) | (labels == 2)
    assert torch.equal(reference, torch.cat((first, labels == 2), 1).float())
    assert torch.equal(valid, (labels != IGNORE).float())
    assert (valid.min() == 0) == ignore
    assert valid.shape == labels.shape


@BOTH
def test_targets_may_have_any_type(foreground: Foreground) -> None:
    foreground = with_ignore(foreground)
    target = target_of(foreground, label_maps(foreground))
    expected = foreground.from_target(target.float())
    for dtype in (torch.int16, torch.uint8) if foreground.exclusive else (torch.bool, torch.uint8):
        for given, wanted in zip(foreground.from_target(target.to(dtype)), expected, strict=True):
            assert given.dtype == torch.float32
            assert torch.equal(given, wanted)


@BOTH
@pytest.mark.parametrize("deep", [False, True])
def test_a_loaders_batch_is_split_into_image_and_prior(foreground: Foreground, deep: bool) -> None:
    foreground = with_ignore(foreground)
    image, prior = torch.randn(2, 3, 6, 6, 6), torch.rand(2, 2, 6, 6, 6)
    finest = target_of(foreground, label_maps(foreground))
    target = [finest, finest[..., ::2, ::2, ::2]] if deep else finest
    batch = RefineBatch.from_nnunet(torch.cat((image, prior), 1), target, foreground)
    assert torch.equal(batch.image, image)
    assert torch.equal(batch.prior, prior)
    assert batch.target is target
    expected = foreground.from_target(finest)
    assert torch.equal(batch.reference, expected[0])
    assert torch.equal(batch.valid, expected[1])


def test_the_batches_of_these_tests_are_worth_refining() -> None:
    for foreground in (LABELS, REGIONS, with_ignore(LABELS)):
        batch = batch_of(foreground)
        wrong = (foreground.decide(foreground.logits(batch.prior)) != batch.reference).float().mean()
        assert 0.02 < wrong < 0.5
