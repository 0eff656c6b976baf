"""Offsets and gate: what is chosen, that no case has a say in its own judgement, and Dice from stored voxels."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from nnunet_diffrefine.batch import Foreground
from nnunet_diffrefine.calibration.decisions import (
    choose_offsets,
    decision_dice,
    gated_classes,
    groups,
    offset_table,
    paired,
    stage_one_dice,
)
from nnunet_diffrefine.calibration.measure import SCALED, measure
from nnunet_diffrefine.calibration.voxels import CaseVoxels, dice, gather, load, save
from nnunet_diffrefine.networks.gate import Gate
from tests.builders import LABELS, REGIONS, batch_of, generator, with_ignore

BOTH = pytest.mark.parametrize("foreground", [LABELS, REGIONS], ids=["labels", "regions"])
NESTED = replace(REGIONS, parents=(None, 0))
N = 400


def case_of(foreground: Foreground, seed: int, shift: float = 0.0, fold: int = 0) -> CaseVoxels:
    """A case whose refined logits are right but for noise and a common shift; stage one has more noise."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, N)
    reference = np.stack([labels == 1, labels == 2] if foreground.exclusive else [labels > 0, labels == 2])
    refined = 4 * reference - 2 + 1.5 * rng.normal(size=(2, N)) + shift
    prior = 1 / (1 + np.exp(-(2 * reference - 1 + 2 * rng.normal(size=(2, N))))) / (2 if foreground.exclusive else 1)
    outside = np.zeros((5, 2))
    outside[2] = 10  # reference that lies outside
    return CaseVoxels(
        f"case_{seed}", fold, refined.astype(np.float16), np.rint(255 * prior).astype(np.uint8), reference, outside, 20
    )


class TestVoxels:
    @BOTH
    @pytest.mark.parametrize("ignore", [False, True])
    def test_stored_voxels_give_the_dice_of_the_whole_volume(self, tmp_path, foreground, ignore):
        foreground = with_ignore(foreground) if ignore else foreground
        batch = batch_of(foreground, 1)
        prior = torch.round(255 * batch.prior[0]) / 255
        region = torch.rand(prior.shape[1:], generator=generator(5)) < 0.6
        before = foreground.logits(prior[None])[0]
        other = torch.randn(before.shape, generator=generator(6))
        logits = torch.where(region, other, before)
        volumes = {
            "logits": logits, "prior": prior, "region": region, "reference": batch.reference[0] > 0,
            "valid": batch.valid[0, 0] > 0,
        }  # fmt: skip
        kept = gather("case", 0, foreground, volumes)
        save(kept, {"x": 1}, tmp_path / "case.npz")
        kept = load(tmp_path / "case.npz", {"x": 1})
        valid = batch.valid[0] > 0
        for found, of in ((decision_dice(kept, Gate(foreground)), logits), (stage_one_dice(kept, foreground), before)):
            m, x0 = (foreground.decide(of[None])[0] > 0) & valid, (batch.reference[0] > 0) & valid
            wanted = 2 * (m & x0).flatten(1).sum(1) / (m.flatten(1).sum(1) + x0.flatten(1).sum(1))
            assert found == pytest.approx(wanted.numpy(), abs=1e-6)
        wrong = ((foreground.decide(before[None]) != batch.reference).any(1) & valid[None, 0]).sum()
        assert int(kept.errors(foreground).sum()) + kept.outside_errors == wrong

    def test_regions_are_judged_by_the_label_map_that_is_exported(self):
        """Three of the four voxels of the whole are decided as core only; the label map puts them into the whole."""
        case = CaseVoxels(
            "case", 0, np.array([[2, -2, -2, -2, -2], [-2, 2, 2, 2, -2]], np.float16),
            np.array([[200, 200, 200, 9, 9], [9, 200, 9, 200, 9]], np.uint8),
            np.array([[1, 1, 1, 1, 0], [0, 1, 1, 0, 0]], bool), np.zeros((5, 2)), 0,
        )  # fmt: skip
        assert decision_dice(case, Gate(NESTED)).tolist() == [1, 0.8]
        assert stage_one_dice(case, NESTED).tolist() == [1, 0.5]
        assert decision_dice(case, Gate(NESTED, offsets=(-0.25, 0.0))).tolist() == [0.4, 0]  # the cores are cut off
        assert decision_dice(case, Gate(REGIONS)).tolist() == [0.4, 0.8]  # nothing is known of a nesting

    def test_other_makings_and_damaged_files_are_not_read(self, tmp_path):
        file = tmp_path / "case.npz"
        assert load(file, {}) is None
        save(case_of(LABELS, 0), {"checkpoint": "a"}, file)
        assert load(file, {"checkpoint": "b"}) is None
        assert load(file, {"checkpoint": "a"}).name == "case_0"
        file.write_bytes(file.read_bytes()[:-30])
        assert load(file, {"checkpoint": "a"}) is None

    def test_both_empty_counts_as_right_and_a_false_alarm_as_wrong(self):
        assert dice(np.array([[0.0, 0.0], [0.0, 5.0], [0.0, 0.0]])).tolist() == [1, 0]


class TestPaired:
    def test_interval_and_counts(self):
        found = paired(np.array([0.1, 0.2, 0.3, -0.05, 0.0, 1e-12]))
        assert (found.n, found.better, found.worse) == (6, 3, 1)
        assert found.interval[0] < found.difference < found.interval[1]

    def test_what_cannot_be_known_is_not_real(self):
        assert paired(np.array([0.5])).interval is None
        assert not paired(np.array([0.5])).real
        assert not paired(np.zeros(9)).real
        assert paired(np.full(9, 0.1)).real

    def test_the_gate_opens_for_what_is_surely_better(self):
        rng = np.random.default_rng(0)
        stage_one = rng.uniform(0.7, 0.8, (30, 3))
        refined = stage_one + np.array([0.02, 0.0, -0.02]) + 0.005 * rng.normal(size=(30, 3))
        differences, keep = gated_classes(stage_one, refined)
        assert keep == [1, 2]
        assert differences[0].interval[0] > 0


class TestOffsets:
    def test_groups_are_folds_or_halves(self):
        assert groups([0, 0, 1, 1]).tolist() == [0, 0, 1, 1]
        assert groups([3, 3, 3]).tolist() == [0, 1, 0]

    def chosen(self, foreground, shift, n=12):
        cases = [case_of(foreground, seed, shift, fold=seed % 2) for seed in range(n)]
        tables = np.stack([offset_table(case, foreground) for case in cases])
        return cases, choose_offsets(lambda: iter(cases), tables, groups([c.fold for c in cases]), foreground)

    @BOTH
    def test_a_shift_of_the_logits_is_taken_back(self, foreground):
        cases, found = self.chosen(foreground, 1.0)
        assert all(-1.6 < offset < -0.4 for offset in found.offsets)
        assert found.gain.real
        unshifted = np.stack([decision_dice(case_of(foreground, seed), Gate(foreground)) for seed in range(len(cases))])
        assert found.refined.mean() == pytest.approx(unshifted.mean(), abs=0.02)

    @BOTH
    def test_of_equally_good_offsets_none_is_taken(self, foreground):
        cases = [case_of(foreground, seed, fold=seed % 2) for seed in range(6)]
        sure = [replace(c, refined=np.where(c.reference, 8, -8).astype(np.float16)) for c in cases]
        tables = np.stack([offset_table(case, foreground) for case in sure])
        found = choose_offsets(lambda: iter(sure), tables, groups([c.fold for c in sure]), foreground)
        assert not found.gain.real
        assert (found.offsets, found.best) == ((0, 0), (0, 0))

    def test_a_case_has_no_say_in_its_own_judgement(self):
        """Fold 1 is shifted the other way: cross-fitted offsets harm both, and are not used."""
        cases = [case_of(REGIONS, seed, 1.0 if seed % 2 else -1.0, fold=seed % 2) for seed in range(12)]
        tables = np.stack([offset_table(case, REGIONS) for case in cases])
        found = choose_offsets(lambda: iter(cases), tables, groups([c.fold for c in cases]), REGIONS)
        assert found.gain.difference < 0
        assert found.offsets == (0, 0)

    def test_methods_with_thresholds_of_their_own_get_none(self):
        cases = [case_of(LABELS, seed, 1.0, fold=seed % 2) for seed in range(4)]
        found = measure(lambda: iter(cases), [c.fold for c in cases], LABELS, flips=True)
        assert found.offsets.gain is None
        assert found.offsets.offsets == (0, 0)


class TestMeasure:
    @BOTH
    def test_the_better_informed_source_wins_and_nothing_depends_on_the_order_of_reading(self, foreground):
        cases = [case_of(foreground, seed, fold=seed % 2) for seed in range(8)]
        found = measure(lambda: iter(cases), [c.fold for c in cases], foreground, flips=False)
        losses = {name: found.errors[name].log_loss for name in SCALED}
        assert found.error_source == min(losses, key=losses.get)
        assert losses["stage one, scaled"] > losses["both, scaled"]
        assert found.keep == []
        assert (found.found, found.wrong - found.found) == (found.wrong - 160, 160)
        assert found.result == pytest.approx(found.offsets.refined)

    def test_the_result_goes_through_the_gate(self):
        cases = [case_of(REGIONS, seed, fold=seed % 2) for seed in range(8)]
        worse = [replace(c, refined=np.stack((-c.refined[0], c.refined[1]))) for c in cases]
        found = measure(lambda: iter(worse), [c.fold for c in worse], REGIONS, flips=False)
        assert found.keep == [0]
        assert found.result[:, 0].tolist() == found.stage_one[:, 0].tolist()

    def test_the_result_is_the_label_map_that_is_exported(self):
        """The refiner finds every core, and no whole around it."""
        cases = [case_of(NESTED, seed, fold=seed % 2) for seed in range(8)]
        cases = [replace(c, reference=c.reference[[1, 1]]) for c in cases]
        bare = [replace(c, refined=(8.0 * c.reference - [[9], [4]]).astype(np.float16)) for c in cases]
        found = measure(lambda: iter(bare), [c.fold for c in bare], NESTED, flips=True)
        assert found.keep == []
        assert found.result == pytest.approx(found.offsets.refined)

    def test_one_case_alone_is_measured_but_helps_nobody(self):
        case = case_of(LABELS, 0)
        found = measure(lambda: iter([case]), [0], LABELS, flips=False)
        assert found.keep == [0, 1]
        assert found.differences[0].interval is None
