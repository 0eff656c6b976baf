"""Thresholds for flips: which cases choose them, and that they are the best for the final Dice."""

import math

import numpy as np
import pytest
import torch

from nnunet_diffrefine.inference.volume import NO_ERROR, GivenPrior
from nnunet_diffrefine.training.trainer_calibration import (
    CANDIDATES,
    best_candidates,
    dice_of_candidates,
    held_out,
    references,
)
from tests.builders import LABELS, REGIONS, batch_of, generator, network_of

CASES = [f"case_{k:02d}" for k in range(40)]
ERROR = {"target": "absolute"}


class TestHeldOut:
    @pytest.mark.parametrize(("share", "number"), [(0.0, 0), (0.001, 1), (0.1, 4), (0.5, 20)])
    def test_so_many_and_only_of_these(self, share: float, number: int) -> None:
        chosen = held_out(CASES, share, fold=0)
        assert len(chosen) == number
        assert chosen <= set(CASES)

    def test_always_the_same_in_a_fold_whatever_the_order(self) -> None:
        assert held_out(CASES, 0.2, 3) == held_out(CASES[::-1], 0.2, 3)
        assert held_out(CASES, 0.2, 3) != held_out(CASES, 0.2, 4)

    @pytest.mark.parametrize("cases", [[], ["one"]])
    def test_something_is_left_to_train_on(self, cases: list[str]) -> None:
        assert held_out(cases, 0.5, 0) == set()
        assert len(held_out(CASES[:2], 0.5, 0)) == 1


def planted(shape: tuple[int, ...] = (2, 6, 8, 8)) -> tuple[torch.Tensor, ...]:
    """Evidence that is right above 0.8, wrong between 0.5 and 0.8: hard prior, reference, evidence, valid mask."""
    g = generator(5)
    reference = torch.rand(shape, generator=g) < 0.3
    wrong = torch.rand(shape, generator=g) < 0.1
    tempting = (torch.rand(shape, generator=g) < 0.2) & ~wrong
    p = torch.full(shape, 0.1).masked_fill(wrong, 0.9).masked_fill(tempting, 0.7)
    return reference ^ wrong, reference, p.logit(), torch.ones(1, *shape[1:], dtype=torch.bool)


class TestThresholds:
    def test_the_best_is_found_and_mends_everything(self) -> None:
        hard, reference, evidence, valid = planted()
        dice = dice_of_candidates(evidence, hard, reference, valid)
        chosen = best_candidates(dice)
        assert dice.shape == (2, len(CANDIDATES))
        for row, k in zip(dice, chosen, strict=True):
            assert row[k] == 1.0
            assert 0.7 <= CANDIDATES[k] < 0.9
            assert row[CANDIDATES.index(0.5)] < row[-1], "flipping at one half is worse than not flipping here"

    def test_of_equal_ones_the_most_cautious(self) -> None:
        assert best_candidates(np.array([[0.5, 0.9, 0.9, 0.1], [1.0] * 4])) == [2, 3]

    def test_the_last_candidate_leaves_stage_one_alone(self) -> None:
        hard, reference, evidence, valid = planted()
        dice = dice_of_candidates(torch.full_like(evidence, 100.0), hard, reference, valid)
        own = 2 * (hard & reference).flatten(1).sum(1) / (hard.flatten(1).sum(1) + reference.flatten(1).sum(1))
        assert dice[:, -1] == pytest.approx(own.numpy())
        assert math.isinf(torch.tensor(CANDIDATES[-1]).logit())

    def test_what_is_ignored_does_not_count(self) -> None:
        hard, reference, evidence, valid = planted()
        valid[:, :3] = False
        dice = dice_of_candidates(evidence, hard, reference, valid)
        reference[:, :3] ^= True
        assert np.array_equal(dice, dice_of_candidates(evidence, hard, reference, valid))
        reference[:, 3:] ^= True
        assert not np.array_equal(dice, dice_of_candidates(evidence, hard, reference, valid))

    def test_a_false_alarm_in_an_empty_case_costs_all_of_its_dice(self) -> None:
        nothing = torch.zeros(1, 2, 2, 2, dtype=torch.bool)
        evidence = torch.full((1, 2, 2, 2), 0.7).logit()
        (row,) = dice_of_candidates(evidence, nothing, nothing, torch.ones_like(nothing))
        assert row.tolist() == [float(candidate >= 0.7) for candidate in CANDIDATES]


@pytest.mark.parametrize("foreground", [LABELS, REGIONS], ids=["labels", "regions"])
class TestEvidenceOfAVolume:
    def test_fits_nnunets_heads_and_half_precision(self, foreground) -> None:
        network = network_of(foreground, "discrepancy_unet", error=ERROR, process={"kind": "none"})
        batch = batch_of(foreground)
        found = GivenPrior(network, evidence=True)(torch.cat((batch.image, batch.prior), 1))
        assert found.shape[1] == foreground.heads
        own = torch.cat(
            [network.evidence(i, p) for i, p in zip(batch.image.split(1), batch.prior.split(1), strict=True)]
        )
        torch.testing.assert_close(found[:, -2:], own.clamp(NO_ERROR, -NO_ERROR))

    def test_no_evidence_where_stage_one_sees_nothing(self, foreground) -> None:
        network = network_of(foreground, "discrepancy_unet", error=ERROR, process={"kind": "none"})
        batch = batch_of(foreground)
        found = GivenPrior(network, evidence=True)(torch.cat((batch.image, 0 * batch.prior), 1))
        assert (found[:, -2:] == NO_ERROR).all()

    def test_thresholds_decide_and_are_kept(self, foreground) -> None:
        network = network_of(foreground, "discrepancy_unet", error=ERROR, process={"kind": "none"})
        batch = batch_of(foreground, size=1)
        decided = foreground.decide(foreground.logits(batch.prior))
        network.thresholds.fill_(torch.inf)
        logits = network.refine_window(batch.image, batch.prior)
        assert torch.equal(foreground.decide(logits), decided)
        assert logits.abs().max() < 100, "nnU-Net adds up logits times ten in half precision"
        assert "thresholds" in network.state_dict()
        assert "thresholds" not in network_of(foreground).state_dict()


class _Labels:
    has_regions, has_ignore_label, ignore_label = False, True, 3
    foreground_labels, foreground_regions = [1, 2], [(1, 2), (2,)]


def test_references_of_labels_and_regions() -> None:
    maps = np.array([-1, 0, 1, 2, 3]).reshape(1, 1, 1, 5)
    reference, valid = references(maps, _Labels())
    assert reference.flatten(1).long().tolist() == [[0, 0, 1, 0, 0], [0, 0, 0, 1, 0]]
    assert valid.flatten().tolist() == [True, True, True, True, False]

    class Regions(_Labels):
        has_regions = True

    assert references(maps, Regions())[0].flatten(1).long().tolist() == [[0, 0, 1, 1, 0], [0, 0, 0, 1, 0]]
