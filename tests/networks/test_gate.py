"""The gate: gated classes have stage one's voxels, open ones the refiner's, and what was nested stays nested."""

from itertools import product

import pytest
import torch
from torch import Tensor

from nnunet_diffrefine.batch import Foreground
from nnunet_diffrefine.config import ConfigError, GateConfig
from nnunet_diffrefine.networks.gate import Gate
from tests.builders import LABELS, REGIONS, SPACE, generator, network_of

CLASSES = Foreground(("a", "b", "c"), exclusive=True)
NESTED = Foreground(("whole", "core", "enhancing"), exclusive=False, parents=(None, 0, 1))
TURNED = Foreground(("enhancing", "whole", "core"), exclusive=False, parents=(2, None, 1))
FOREGROUNDS = {"labels": CLASSES, "nested": NESTED, "nested, other order": TURNED, "apart": REGIONS}
EACH = pytest.mark.parametrize("foreground", FOREGROUNDS.values(), ids=list(FOREGROUNDS))
PARENTED = pytest.mark.parametrize("foreground", [NESTED, TURNED], ids=["nested", "nested, other order"])


def subsets(foreground: Foreground) -> list[frozenset[int]]:
    choices = product((False, True), repeat=foreground.channels)
    return [frozenset(c for c, yes in enumerate(choice) if yes) for choice in choices]


def logits(foreground: Foreground, seed: int, nested: bool = False) -> Tensor:
    x = 3 * torch.randn(2, foreground.heads, *SPACE, generator=generator(seed))
    for _ in range(3 if nested else 0):
        for region, parent in enumerate(foreground.parents):
            if parent is not None:
                x[:, region] = torch.minimum(x[:, region], x[:, parent])
    return x


class TestGate:
    @EACH
    def test_none_gated_is_the_refiner(self, foreground):
        refined, stage_one = logits(foreground, 1), logits(foreground, 2)
        assert torch.equal(Gate(foreground)(refined, stage_one), refined)

    @EACH
    def test_all_gated_is_stage_one_bit_for_bit(self, foreground):
        refined, stage_one = logits(foreground, 1), logits(foreground, 2)
        gate = Gate(foreground, frozenset(range(foreground.channels)), (0.5,) * foreground.channels)
        assert torch.equal(gate(refined, stage_one), stage_one)

    @EACH
    def test_gated_classes_have_stage_ones_voxels(self, foreground):
        refined, stage_one = logits(foreground, 1), logits(foreground, 2)
        before = foreground.decide(stage_one)
        for unchanged in subsets(foreground):
            after = foreground.decide(Gate(foreground, unchanged)(refined, stage_one))
            for channel in unchanged:
                assert torch.equal(after[:, channel], before[:, channel])

    def test_other_classes_are_refined_wherever_no_gated_one_is_decided(self):
        refined, stage_one = logits(CLASSES, 1), logits(CLASSES, 2)
        after = CLASSES.decide(Gate(CLASSES, frozenset({1}))(refined, stage_one))
        wanted, before = CLASSES.decide(refined), CLASSES.decide(stage_one)
        free = (wanted[:, 1] + before[:, 1] == 0)[:, None].expand_as(after)
        assert torch.equal(after[free], wanted[free])
        assert not torch.equal(after[:, [0, 2]], before[:, [0, 2]])

    def test_what_stays_keeps_its_logits(self):
        """Averaged over folds, a gated class is then the mean of stage one's logits, not of the refiner's."""
        refined, stage_one = logits(CLASSES, 1), logits(CLASSES, 2)
        for of in (refined, stage_one):
            of[:, 0] = 20  # background everywhere
            of[:, 2] = of[:, 1:].amax(1) + 1  # and the gated class next
        assert torch.equal(Gate(CLASSES, frozenset({1}))(refined, stage_one), stage_one)

    def test_regions_that_do_not_nest_are_gated_one_by_one(self):
        refined, stage_one = logits(REGIONS, 1), logits(REGIONS, 2)
        found = Gate(REGIONS, frozenset({1}))(refined, stage_one)
        assert torch.equal(found, torch.stack((refined[:, 0], stage_one[:, 1]), 1))

    @PARENTED
    @pytest.mark.parametrize("offsets", [(), (0.5, -1.0, 1.5)], ids=["plain", "shifted"])
    def test_nested_stays_nested(self, foreground, offsets):
        refined, stage_one = (logits(foreground, seed, nested=True) for seed in (1, 2))
        for unchanged in subsets(foreground):
            found = Gate(foreground, unchanged, offsets)(refined, stage_one)
            for region, parent in enumerate(foreground.parents):
                if parent is not None:
                    assert (found[:, region] <= found[:, parent]).all()

    def test_a_refined_parent_grows_around_a_gated_child_and_a_refined_child_is_cut(self):
        shape = (1, 3, 1, 1, 4)
        refined, stage_one = -torch.ones(shape), -torch.ones(shape)
        stage_one[0, 1, ..., 0] = 2  # core that the refiner sees no tumour around
        refined[0, 2, ..., 3] = 3  # enhancing tumour that stage one sees no core around
        found = NESTED.decide(Gate(NESTED, frozenset({1}))(refined, stage_one))[0, :, 0, 0]
        assert found.tolist() == [[1, 0, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]


class TestOffsets:
    @EACH
    def test_they_shift_the_decision_of_their_class(self, foreground):
        """Of nested regions too, which are shifted inside of their parents."""
        refined, stage_one = (logits(foreground, seed, nested=True) for seed in (1, 2))
        for channel in range(foreground.channels):
            sizes = []
            for offset in (-2.0, 0.0, 2.0):
                offsets = tuple(offset if c == channel else 0.0 for c in range(foreground.channels))
                decided = foreground.decide(Gate(foreground, offsets=offsets)(refined, stage_one))
                sizes.append(int(decided[:, channel].sum()))
            assert sizes[0] < sizes[1] < sizes[2]

    @PARENTED
    def test_a_shifted_region_stays_inside_its_parent(self, foreground):
        refined = logits(foreground, 1, nested=True)
        found = Gate(foreground, offsets=(3.0, -1.0, 0.5))(refined, refined)
        for region, parent in enumerate(foreground.parents):
            if parent is not None:
                assert (found[:, region] <= found[:, parent]).all()

    @pytest.mark.parametrize(
        ("unchanged", "refined", "stage_one", "wanted"),
        [
            ({0}, (-3.0, 2.0, -4.0), (4.0, -1.0, -2.0), (4.0, 2.5, -3.5)),  # the refined whole is not used
            ({0}, (9.0, 2.0, -4.0), (1.0, -1.0, -2.0), (1.0, 1.0, -3.5)),
            ({1}, (-3.0, -3.0, 2.0), (3.0, 3.0, 1.0), (3.0, 3.0, 2.5)),  # nor where it grew around stage one's core
            ({2}, (-3.0, 2.0, 0.0), (3.0, 3.0, 1.0), (1.0, 1.0, 1.0)),
            (set(), (-3.0, 2.0, 3.0), (4.0, 4.0, 4.0), (-2.5, -2.5, -2.5)),
        ],
    )
    def test_a_shifted_region_is_cut_to_the_parent_that_is_used(self, unchanged, refined, stage_one, wanted):
        refined, stage_one = (torch.tensor(x).view(1, 3, 1, 1, 1) for x in (refined, stage_one))
        found = Gate(NESTED, frozenset(unchanged), (0.5, 0.5, 0.5))(refined, stage_one)
        assert tuple(found.flatten().tolist()) == wanted

    @EACH
    def test_those_of_gated_classes_are_not_used(self, foreground):
        refined, stage_one = logits(foreground, 1), logits(foreground, 2)
        shifted = Gate(foreground, frozenset({0}), (9.0, *[0.0] * (foreground.channels - 1)))
        assert torch.equal(shifted(refined, stage_one), Gate(foreground, frozenset({0}))(refined, stage_one))


class TestSettings:
    def test_names_become_channels(self):
        gate = Gate.from_settings(GateConfig(["core"], {"whole": 0.5}), NESTED)
        assert gate == Gate(NESTED, frozenset({1}), (0.5, 0.0, 0.0))
        assert Gate.from_settings(GateConfig(), NESTED) == Gate(NESTED)

    @pytest.mark.parametrize("settings", [GateConfig(["coer"]), GateConfig([], {"coer": 1.0})])
    def test_unknown_names_are_refused_with_the_nearest_one(self, settings):
        with pytest.raises(ConfigError, match=r"gate\.(unchanged|offsets)' names 'coer'.*Did you mean 'core'"):
            Gate.from_settings(settings, NESTED)


class TestNetwork:
    """The network that nnU-Net runs obeys; what a training looks at does not."""

    @pytest.mark.parametrize("foreground", [LABELS, REGIONS], ids=["labels", "regions"])
    def test_forward_goes_through_the_gate_and_training_does_not(self, foreground):
        network = network_of(foreground, sampling={"min_foreground": 0.0})
        x = torch.randn(2, 1, *SPACE, generator=generator(0))
        with torch.no_grad():
            stage_one, free = network.stage_one_logits(x), network(x)
            assert not torch.equal(free, stage_one)
            for unchanged in (frozenset({0}), frozenset({0, 1})):
                network.gate = Gate(foreground, unchanged)
                assert torch.equal(network(x), network.gate(free, stage_one))
                assert torch.equal(network.refined(x, stage_one), free)
            assert torch.equal(network(x), stage_one)
