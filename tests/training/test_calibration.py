"""Thresholds for flips: which cases choose them, and that they are the best for the final Dice."""

import math

import numpy as np
import pytest
import torch

from nnunet_diffrefine.batch import Foreground
from nnunet_diffrefine.inference.volume import NO_ERROR, GivenPrior
from nnunet_diffrefine.training.thresholds import ThresholdChoice
from nnunet_diffrefine.training.trainer_calibration import CANDIDATES, flip_choice, held_out, references
from tests.builders import LABELS, REGIONS, batch_of, generator, method_of, network_of
from tests.methods.rediffinet_family import NESTED

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


def choice_of(foreground: Foreground, *cases: tuple[torch.Tensor, ...]) -> ThresholdChoice:
    method = method_of(foreground, "discrepancy_unet", error=ERROR, process={"kind": "none"})
    choice = flip_choice(method, foreground)
    for evidence, prior, reference, valid in cases:
        choice.add(torch.cat((evidence, prior)), reference, valid)
    return choice


def planted(foreground: Foreground, seed: int = 5) -> tuple[torch.Tensor, ...]:
    """Evidence that is right above 0.8, wrong between 0.5 and 0.8: evidence, prior, reference, valid mask."""
    g, shape = generator(seed), (2, 6, 8, 8)
    reference = torch.rand(shape, generator=g) < 0.3
    if foreground.exclusive:
        reference[1] &= ~reference[0]
    else:
        reference[1] &= reference[0]
    wrong = torch.rand(shape, generator=g) < 0.1
    prior = reference ^ wrong
    if foreground.exclusive:
        prior[1] &= ~prior[0]
    else:
        prior[1] &= prior[0]
    wrong = prior ^ reference
    tempting = (torch.rand(shape, generator=g) < 0.2) & ~wrong
    p = torch.full(shape, 0.02).masked_fill(wrong, 0.9).masked_fill(tempting, 0.7)
    return p.logit(), prior.float(), reference, torch.ones(1, *shape[1:], dtype=torch.bool)


@pytest.mark.parametrize("foreground", [LABELS, NESTED], ids=["labels", "regions"])
class TestThresholds:
    def test_the_best_are_found_and_mend_everything(self, foreground: Foreground) -> None:
        choice = choice_of(foreground, planted(foreground), planted(foreground, 6))
        chosen = choice.best()
        assert choice.dice(chosen).tolist() == [1.0, 1.0]
        assert all(0.7 <= threshold < 0.9 for threshold in chosen)
        assert (choice.dice([0.5, 0.5]) < choice.dice([1.0, 1.0])).all(), "flipping at one half is worse than never"

    def test_dice_is_that_of_the_masks_the_method_decides_on(self, foreground: Foreground) -> None:
        evidence, prior, reference, valid = planted(foreground)
        evidence = evidence + torch.randn(evidence.shape, generator=generator(8))
        choice = choice_of(foreground, (evidence, prior, reference, valid))
        drawn = np.random.default_rng(3).choice(CANDIDATES, (30, 2)).tolist()
        for thresholds in ([0.05, 0.05], [0.9, 0.1], [1.0, 0.05], [1.0, 1.0], *drawn):
            mask = choice.decide(torch.cat((evidence, prior))[None], torch.tensor(thresholds))[0] > 0
            sizes = mask.flatten(1).sum(1) + reference.flatten(1).sum(1)
            wanted = 2 * (mask & reference).flatten(1).sum(1) / sizes
            assert choice.dice(thresholds) == pytest.approx(wanted.numpy())

    def test_nothing_to_gain_leaves_stage_one_alone(self, foreground: Foreground) -> None:
        evidence, prior, _, valid = planted(foreground)
        choice = choice_of(foreground, (evidence + 3, prior, prior > 0, valid))
        assert choice.best() == [1.0, 1.0]
        assert math.isinf(torch.tensor(1.0).logit())

    def test_what_is_ignored_does_not_count(self, foreground: Foreground) -> None:
        evidence, prior, reference, valid = planted(foreground)
        valid[:, :3] = False
        dice = choice_of(foreground, (evidence, prior, reference, valid)).dice([0.8, 0.8])
        for part, same in ((slice(0, 3), True), (slice(3, 6), False)):
            other = reference.clone()
            other[:, part] ^= True
            changed = choice_of(foreground, (evidence, prior, other, valid)).dice([0.8, 0.8])
            assert np.array_equal(dice, changed) == same

    def test_a_false_alarm_in_an_empty_case_costs_all_of_its_dice(self, foreground: Foreground) -> None:
        nothing, valid = torch.zeros(2, 2, 2, 2), torch.ones(1, 2, 2, 2, dtype=torch.bool)
        evidence = torch.full((2, 2, 2, 2), 0.7).logit()
        choice = choice_of(foreground, (evidence, nothing, nothing > 0, valid))
        assert choice.dice([0.65, 0.65]).min() == 0
        assert choice.dice([0.75, 0.75]).tolist() == [1.0, 1.0]


def test_a_class_that_may_not_lose_voxels_takes_none_from_another() -> None:
    """Chosen class by class, b would be credited for voxels that the decision never gives it, because a keeps them."""
    prior = torch.tensor([[1.0, 1.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0]]).view(2, 1, 1, 4)
    reference = torch.tensor([[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0]]).view(2, 1, 1, 4) > 0
    p = torch.tensor([[0.02, 0.02, 0.9, 0.02], [0.02, 0.02, 0.6, 0.02]]).view(2, 1, 1, 4)
    choice = choice_of(LABELS, (p.logit(), prior, reference, torch.ones(1, 1, 1, 4, dtype=torch.bool)))
    assert choice.dice([1.0, 0.55]).tolist() == pytest.approx([0.8, 0.0])
    assert choice.dice(choice.best()).tolist() == [1.0, 1.0]


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
