"""What is generated: losses against values worked out by hand, nnU-Net's scales, the ignore mask, the decision."""

import math
from dataclasses import replace

import pytest
import torch
from batchgeneratorsv2.transforms.utils.deep_supervision_downsampling import DownsampleSegForDSTransform
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from torch import Tensor

from nnunet_diffrefine.batch import Foreground, RefineBatch
from nnunet_diffrefine.config import ErrorConfig
from nnunet_diffrefine.errors.surface import surface_loss
from nnunet_diffrefine.errors.targets import (
    TARGETS,
    AbsoluteError,
    ErrorTarget,
    Mask,
    ThreeWayError,
    dice_loss,
    masked_mean,
    over_scales,
)
from tests.builders import LABELS, REGIONS, SPACE, batch_of, generator, nnunet_loss, with_ignore

BOTH = pytest.mark.parametrize("foreground", [LABELS, REGIONS], ids=["labels", "regions"])
EACH = pytest.mark.parametrize("target", list(TARGETS))
ERRORS = pytest.mark.parametrize("target", ["absolute", "three_way"])
ONE = Foreground(("lesion",), exclusive=False)
NESTED = replace(REGIONS, parents=(None, 0))
ALL_TERMS = {"dice": 1.0, "entropy": 1.0, "squared": 1.0}


def never(output: object, target: object) -> Tensor:
    raise AssertionError("nnU-Net's loss has no say in an error target")


def target_of(target: str, foreground: Foreground, **settings: float) -> ErrorTarget:
    return TARGETS[target](ErrorConfig(target=target, **settings), foreground)


def row(*values: float) -> Tensor:
    """One channel of voxels along one axis."""
    return torch.tensor(values, dtype=torch.float32).view(1, 1, len(values), 1, 1)


def two_voxels(valid: Tensor | None = None) -> RefineBatch:
    """Stage one says lesion, background; there is no lesion: the first is to be removed, the second kept."""
    reference = row(0, 0)
    return RefineBatch(
        row(0, 0), row(0.9, 0.2), reference, torch.ones(1, 1, 2, 1, 1) if valid is None else valid, reference
    )


class TestHandComputedLosses:
    # absolute error (1, 0), logits 0: probabilities 1/2
    @pytest.mark.parametrize(
        ("weights", "expected"),
        [
            ({"dice": 0.0, "entropy": 1.0}, math.log(2)),
            ({"entropy": 0.0, "squared": 1.0}, 1 / 4),
            ({"entropy": 0.0, "dice": 1.0}, 1 - (2 * 0.5 + 1) / (1 + 1 + 1)),
            ({"dice": 2.0, "entropy": 3.0, "squared": 4.0}, 2 / 3 + 3 * math.log(2) + 1),
        ],
    )
    def test_absolute(self, weights: dict[str, float], expected: float) -> None:
        loss = target_of("absolute", ONE, **weights).loss(torch.zeros(1, 1, 2, 1, 1), two_voxels(), never)
        assert loss.item() == pytest.approx(expected, abs=1e-6)

    # remove, keep, add at 1/3 each; wanted: remove, keep
    @pytest.mark.parametrize(
        ("weights", "expected"),
        [
            ({"entropy": 1.0}, math.log(3)),
            ({"entropy": 0.0, "dice": 1.0}, 1 - ((2 / 3 + 1) / (2 / 3 + 1 + 1) + 1 / (2 / 3 + 1)) / 2),
        ],
    )
    def test_three_way(self, weights: dict[str, float], expected: float) -> None:
        loss = target_of("three_way", ONE, **weights).loss(torch.zeros(1, 3, 2, 1, 1), two_voxels(), never)
        assert loss.item() == pytest.approx(expected, abs=1e-6)

    def test_three_way_order_is_remove_keep_add_each_for_all_channels(self) -> None:
        target = target_of("three_way", REGIONS)
        output = torch.zeros(1, 6, 1, 1, 1)
        output[0, 0], output[0, 5] = 50.0, 50.0  # remove the first channel, add the second
        assert target.estimate(output).flatten().tolist() == pytest.approx([-1, 1])

    def test_mask_is_nnunets_loss_and_the_weighted_surface(self) -> None:
        batch, loss = batch_of(LABELS), nnunet_loss(LABELS)
        output = torch.randn(2, 3, *SPACE, generator=generator())
        assert torch.equal(target_of("mask", LABELS).loss(output, batch, loss), loss(output, batch.target))
        both = target_of("mask", LABELS, surface=0.5).loss(output, batch, loss)
        extra = 0.5 * surface_loss(output, batch.reference, batch.valid, LABELS)
        assert extra > 0.01
        torch.testing.assert_close(both, loss(output, batch.target) + extra)

    def test_dice_is_one_for_the_opposite_and_zero_for_the_same(self) -> None:
        target, valid = (torch.rand(2, 3, 8, 8, 8, generator=generator()) > 0.5).float(), torch.ones(2, 1, 8, 8, 8)
        assert dice_loss(target, target, valid) == 0
        assert 0.99 < dice_loss(1 - target, target, valid) < 1
        assert dice_loss(0 * target, 0 * target, valid) == 0  # nothing wrong and nothing said to be: no loss

    def test_masked_mean(self) -> None:
        values = torch.tensor([[1.0, 2.0, 3.0], [5.0, 7.0, 9.0]]).view(1, 2, 3, 1, 1)
        assert masked_mean(values, row(1, 0, 1)) == (1 + 3 + 5 + 9) / 4
        assert masked_mean(values, row(0, 0, 0)) == 0


class TestScales:
    shapes = (SPACE, (2, 4, 6), (1, 2, 3))

    @staticmethod
    def nnunet(loss, scales: int) -> DeepSupervisionWrapper:
        """nnU-Net's wrapper, with the weights of its trainer (nnUNetTrainer._build_loss)."""
        weights = [1 / 2**i for i in range(scales)]
        if scales > 1:
            weights[-1] = 0
        return DeepSupervisionWrapper(loss, [w / sum(weights) for w in weights])

    @pytest.mark.parametrize("scales", [1, 2, 3])
    def test_weights_and_sampling_are_nnunets(self, scales: int) -> None:
        """Its own wrapper on its own downsampled target gives the same loss."""
        outputs = [torch.randn(2, 2, *shape, generator=generator(i)) for i, shape in enumerate(self.shapes[:scales])]
        clean = (torch.rand(2, 2, *SPACE, generator=generator(9)) > 0.5).float()

        def loss(output: Tensor, wanted: Tensor) -> Tensor:
            return ((output - wanted) ** 2).mean()

        factors = [[a / b for a, b in zip(shape, SPACE, strict=True)] for shape in self.shapes[:scales]]
        downsample = DownsampleSegForDSTransform(factors)
        samples = [downsample(image=None, segmentation=one)["segmentation"] for one in clean]
        targets = [torch.stack([sample[i] for sample in samples]) for i in range(scales)]
        given = over_scales(lambda o, c, v: loss(o, c), outputs, clean, torch.ones(2, 1, *SPACE))
        torch.testing.assert_close(given, self.nnunet(loss, scales)(outputs, targets))

    def test_valid_is_sampled_with_the_error(self) -> None:
        valid = (torch.rand(2, 1, *SPACE, generator=generator()) > 0.5).float()
        seen: list[tuple[Tensor, Tensor]] = []
        outputs = [torch.zeros(2, 1, *shape) for shape in self.shapes]
        over_scales(lambda o, c, v: seen.append((c, v)) or o.sum(), outputs, valid.clone(), valid)
        assert [tuple(c.shape[2:]) for c, _ in seen] == list(self.shapes)
        assert all(torch.equal(c, v) for c, v in seen)

    @BOTH
    @ERRORS
    def test_all_but_the_coarsest_output_learn(self, foreground: Foreground, target: str) -> None:
        error, batch = target_of(target, foreground, **ALL_TERMS), batch_of(foreground)
        outputs = [torch.randn(2, error.outputs, *s, generator=generator()).requires_grad_() for s in self.shapes]
        error.loss(outputs, batch, never).backward()
        sizes = [o.grad.abs().sum().item() for o in outputs]  # there, or distributed training would wait for it
        assert sizes[0] > 0
        assert sizes[1] > 0
        assert sizes[2] == 0

    @BOTH
    @ERRORS
    def test_a_list_of_one_is_the_output_alone(self, foreground: Foreground, target: str) -> None:
        error, batch = target_of(target, foreground), batch_of(foreground)
        output = torch.randn(2, error.outputs, *SPACE, generator=generator())
        assert torch.equal(error.loss([output], batch, never), error.loss(output, batch, never))


class TestIgnoreMask:
    @BOTH
    @ERRORS
    def test_ignored_voxels_have_no_error_and_no_gradient(self, foreground: Foreground, target: str) -> None:
        foreground = with_ignore(foreground)
        error, batch = target_of(target, foreground, **ALL_TERMS), batch_of(foreground)
        ignored = batch.valid.expand_as(batch.prior) == 0
        assert ignored.any()
        assert not error.clean(batch)[ignored].any()
        output = torch.randn(2, error.outputs, *SPACE, generator=generator()).requires_grad_()
        loss = error.loss(output, batch, never)
        loss.backward()
        outside = (batch.valid == 0).expand_as(output)
        assert not output.grad[outside].any()
        assert output.grad[~outside].any()
        shouted = torch.where(outside, 50.0, output.detach())
        assert torch.equal(error.loss(shouted, batch, never), loss.detach())

    @ERRORS
    def test_the_mean_is_over_what_counts(self, target: str) -> None:
        """One of two voxels counts: its loss, not half of it."""
        error = target_of(target, ONE, entropy=1.0)
        output = torch.zeros(1, error.outputs, 2, 1, 1)
        whole, half = (error.loss(output, two_voxels(v), never) for v in (None, row(1, 0)))
        torch.testing.assert_close(half, whole)

    @ERRORS
    def test_nothing_but_ignored_voxels_is_no_disaster(self, target: str) -> None:
        error = target_of(target, ONE, **ALL_TERMS)
        output = torch.randn(1, error.outputs, 2, 1, 1, generator=generator()).requires_grad_()
        loss = error.loss(output, two_voxels(row(0, 0)), never)
        loss.backward()
        assert loss == 0
        assert not output.grad.any()

    @BOTH
    def test_the_prior_stands_in_for_an_ignored_reference(self, foreground: Foreground) -> None:
        batch = batch_of(with_ignore(foreground))
        clean = target_of("mask", with_ignore(foreground)).clean(batch)
        inside = batch.valid.expand_as(clean) > 0
        assert torch.equal(clean[inside], batch.reference[inside])
        assert torch.equal(clean[~inside], batch.prior[~inside])


class TestReadings:
    @BOTH
    @EACH
    def test_no_error_is_the_anchor_and_an_estimate_lies_in_its_range(
        self, foreground: Foreground, target: str
    ) -> None:
        error, batch = target_of(target, foreground), batch_of(foreground)
        anchor = error.anchor(batch.prior)
        assert torch.equal(anchor, batch.prior if target == "mask" else torch.zeros_like(batch.prior))
        estimate = error.estimate(100 * torch.randn(2, error.outputs, *SPACE, generator=generator()))
        assert estimate.shape == batch.prior.shape
        assert estimate.min() >= (-1 if error.signed else 0)
        assert estimate.max() <= 1
        assert (estimate.min() < -0.9) == error.signed

    @BOTH
    def test_errors_are_those_of_the_hard_prior(self, foreground: Foreground) -> None:
        batch = batch_of(foreground)
        hard = foreground.decide(foreground.logits(batch.prior))
        assert torch.equal(target_of("absolute", foreground).clean(batch), (batch.reference != hard).float())
        assert torch.equal(target_of("three_way", foreground).clean(batch), batch.reference - hard)

    @BOTH
    @ERRORS
    @pytest.mark.parametrize("ignore", [False, True], ids=["all valid", "with ignore"])
    def test_the_decision_of_the_true_error_is_the_reference(
        self, foreground: Foreground, target: str, ignore: bool
    ) -> None:
        """Stage one's mask and its error map are the reference; under the ignore label the mask stays."""
        foreground = with_ignore(foreground) if ignore else foreground
        error, batch = target_of(target, foreground), batch_of(foreground)
        evidence = error.evidence(error.clean(batch), batch.prior)
        wanted = torch.where(batch.valid > 0, batch.reference, error.hard(batch.prior))
        assert torch.equal(foreground.decide(error.decide(evidence, batch.prior, torch.zeros(2))), wanted)
        nothing = error.evidence(error.anchor(batch.prior), batch.prior)
        assert torch.equal(
            foreground.decide(error.decide(nothing, batch.prior, torch.zeros(2))), error.hard(batch.prior)
        )

    def test_only_the_possible_direction_is_evidence(self) -> None:
        """To add where there is foreground already, or to remove where there is none, is no error."""
        error, prior = target_of("three_way", ONE), row(0.9, 0.9, 0.1, 0.1)
        evidence = error.evidence(row(-0.8, 0.8, -0.8, 0.8), prior).flatten()
        assert evidence[[0, 3]].sigmoid().tolist() == pytest.approx([0.8, 0.8])
        assert (evidence[[1, 2]] < -10).all()

    def test_evidence_is_the_logit_of_the_probability_of_an_error(self) -> None:
        error = target_of("absolute", ONE)
        output = row(-3.0, 0.0, 2.0)
        torch.testing.assert_close(error.evidence_of(output, row(0.9, 0.9, 0.1)), output)


class TestDecision:
    #        prior, evidence, threshold, corrected
    CASES = (
        (0.9, 1.0, 0.0, 0),  # wrong: removed
        (0.9, -1.0, 0.0, 1),  # right: kept
        (0.1, 1.0, 0.0, 1),  # wrong: added
        (0.1, -1.0, 0.0, 0),  # right: left
        (0.9, 1.0, 2.0, 1),  # below the threshold
        (0.1, 1.0, 2.0, 0),
        (0.9, -1.0, -2.0, 0),  # above a low one
        (0.1, -1.0, -2.0, 1),
        (0.6, 30.0, math.inf, 1),
        (0.4, 30.0, math.inf, 0),
    )

    @pytest.mark.parametrize(("prior", "evidence", "threshold", "corrected"), CASES)
    def test_a_region_flips_where_its_evidence_exceeds_its_threshold(
        self, prior, evidence, threshold, corrected
    ) -> None:
        logits = target_of("absolute", ONE).decide(row(evidence), row(prior), torch.tensor([threshold]))
        assert int(ONE.decide(logits)) == corrected

    def test_the_margin_says_how_sure(self) -> None:
        logits = target_of("absolute", ONE).decide(row(1.5, 1.5), row(0.9, 0.1), torch.tensor([0.5]))
        assert logits.flatten().tolist() == pytest.approx([-1.0, 1.0])

    @BOTH
    def test_thresholds_belong_to_their_channels(self, foreground: Foreground) -> None:
        prior, evidence = torch.zeros(1, 2, 1, 1, 1), torch.ones(1, 2, 1, 1, 1)
        error = target_of("absolute", foreground)
        for thresholds, expected in ((torch.tensor([0.0, 2.0]), [1, 0]), (torch.tensor([2.0, 0.0]), [0, 1])):
            decided = foreground.decide(error.decide(evidence, prior, thresholds))
            assert decided.flatten().tolist() == expected

    @pytest.mark.parametrize("foreground", [LABELS, REGIONS, NESTED], ids=["labels", "regions", "nested"])
    def test_a_mask_is_decided_already(self, foreground: Foreground) -> None:
        logits = torch.randn(2, foreground.heads, *SPACE, generator=generator())
        batch, mask = batch_of(foreground), target_of("mask", foreground, nesting=True)
        assert torch.equal(mask.decide(logits, batch.prior, torch.full((2,), torch.inf)), logits)
        assert torch.equal(mask.evidence_of(logits, batch.prior), logits)

    def test_which_targets_flip(self) -> None:
        assert (Mask.flips, AbsoluteError.flips, ThreeWayError.flips) == (False, True, True)
