"""Augmented priors stay probabilities, change by what was asked and nothing else, and replay."""

import pytest
import torch
from scipy import ndimage
from torch import Tensor

from nnunet_diffrefine.batch import Foreground
from nnunet_diffrefine.errors.augmentation import augment_prior, remove_component, resize
from tests.builders import LABELS, REGIONS, generator

ONE = Foreground(("organ",), exclusive=False)
each_dataset = pytest.mark.parametrize("foreground", [LABELS, REGIONS], ids=["labels", "regions"])
each_kind = pytest.mark.parametrize(
    "settings",
    [
        {"morphology": 1.0, "radius": 1},
        {"morphology": 1.0, "radius": 3.0},
        {"removal": 1.0},
        {"dropping": 1.0},
        {"morphology": 0.5, "radius": 2, "removal": 0.5, "dropping": 0.2},
    ],
    ids=["morphology", "wide", "removal", "dropping", "all"],
)
EVERYTHING = {"morphology": 0.5, "radius": 3, "removal": 0.5, "dropping": 0.3}


def prior_of(foreground: Foreground, size: int = 6, seed: int = 0) -> Tensor:
    """Smooth probabilities (size, 2, 12, 14, 16) with exact 0 and 1, in 255ths; regions nested by construction."""
    noise = torch.randn(size, 2, 12, 14, 16, generator=generator(seed))
    smooth = 12 * torch.nn.functional.avg_pool3d(noise, 5, 1, 2)
    if foreground.exclusive:
        p = torch.softmax(torch.cat((torch.full_like(smooth[:, :1], 1.0), 2 * smooth), 1), 1)[:, 1:]
    else:
        p = torch.sigmoid(2 * smooth - 1).cumprod(1)
    return (255 * p).floor() / 255


def balls(*centres: tuple[int, int, int], radius: float = 2.5) -> Tensor:
    """Soft balls (1, 1, 16, 16, 24): 1 inside, falling to 0 over two voxels."""
    grid = torch.stack(torch.meshgrid(*(torch.arange(n) for n in (16, 16, 24)), indexing="ij")).float()
    distances = [(grid - torch.tensor(c).view(3, 1, 1, 1)).norm(dim=0) for c in centres]
    return torch.stack([(0.5 + (radius - d) / 2).clamp(0, 1) for d in distances]).amax(0)[None, None]


@each_dataset
def test_without_errors_it_is_the_same_tensor_and_nothing_is_drawn(foreground: Foreground) -> None:
    prior, source = prior_of(foreground), generator()
    state = source.get_state()
    assert augment_prior(prior, foreground, source, radius=3) is prior
    assert torch.equal(source.get_state(), state)


@each_dataset
@each_kind
def test_probabilities_stay_probabilities_and_the_input_untouched(
    foreground: Foreground, settings: dict[str, float]
) -> None:
    prior = prior_of(foreground)
    before = prior.clone()
    result = augment_prior(prior, foreground, generator(), **settings)
    assert torch.equal(prior, before)
    assert result.shape == prior.shape
    assert result.dtype == prior.dtype
    assert not torch.equal(result, prior)
    assert result.min() >= 0
    assert result.max() <= 1
    if foreground.exclusive:
        assert result.sum(1).max() <= 1 + 1e-6
    else:
        assert (result[:, 1] <= result[:, 0]).all()


@each_dataset
def test_a_generator_replays_and_another_does_not(foreground: Foreground) -> None:
    prior = prior_of(foreground)
    first, second, other = (augment_prior(prior, foreground, generator(s), **EVERYTHING) for s in (1, 1, 2))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


@each_dataset
def test_what_is_drawn_later_depends_on_the_number_of_elements_only(foreground: Foreground) -> None:
    source, again = generator(), generator()
    augment_prior(prior_of(foreground), foreground, source, **EVERYTHING)
    augment_prior(torch.zeros(6, 2, 3, 4, 5), foreground, again, removal=0.1)
    assert torch.equal(source.get_state(), again.get_state())


@pytest.mark.parametrize("kind", ["morphology", "removal", "dropping"])
def test_each_kind_comes_as_often_as_asked(kind: str) -> None:
    prior = balls((4, 4, 6))[..., 2:7, 2:7, 3:10].expand(400, -1, -1, -1, -1)
    changed = (augment_prior(prior, ONE, generator(), **{kind: 0.3}) != prior).flatten(1).any(1)
    assert 0.23 < changed.float().mean() < 0.37  # three standard deviations


# Morphology


def test_growing_by_one_is_dilation_with_a_cross_and_by_two_with_a_cross_and_a_cube() -> None:
    prior = prior_of(ONE)[:1, :1]
    cross, cube = ndimage.generate_binary_structure(3, 1), ndimage.generate_binary_structure(3, 3)
    by_one = ndimage.grey_dilation(prior[0, 0].numpy(), footprint=cross, mode="nearest")
    by_two = ndimage.grey_dilation(by_one, footprint=cube, mode="nearest")
    assert torch.equal(resize(prior, ONE, 1)[0, 0], torch.from_numpy(by_one))
    assert torch.equal(resize(prior, ONE, 2)[0, 0], torch.from_numpy(by_two))


@pytest.mark.parametrize("voxels", [1, 2, 3])
def test_shrinking_is_growing_the_background(voxels: int) -> None:
    prior = prior_of(ONE)
    torch.testing.assert_close(resize(prior, ONE, -voxels), 1 - resize(1 - prior, ONE, voxels))


@pytest.mark.parametrize("voxels", [-2, -1, 1, 2])
def test_exclusive_classes_grow_as_one_body_and_keep_their_border(voxels: int) -> None:
    prior = torch.zeros(1, 2, 12, 12, 16)
    prior[:, 0, 4:8, 4:8, 4:8] = prior[:, 1, 4:8, 4:8, 8:12] = 1
    result = resize(prior, LABELS, voxels)
    body = resize(prior.sum(1, keepdim=True), ONE, voxels)
    torch.testing.assert_close(result.sum(1, keepdim=True), body)
    both = body[:, 0] * prior.sum(1)
    torch.testing.assert_close(result * both[:, None], prior * both[:, None])
    new = result * (1 - prior.sum(1, keepdim=True))
    # What is new belongs to a class within reach; the common border is at 8.
    assert new[:, 0, ..., 8 + abs(voxels) :].sum() == new[:, 1, ..., : 8 - abs(voxels)].sum() == 0


@each_dataset
@pytest.mark.parametrize("voxels", [1, 2])
def test_growing_adds_everywhere_and_shrinking_takes_everywhere(foreground: Foreground, voxels: int) -> None:
    prior = prior_of(foreground)
    total = prior.sum(1)
    assert (resize(prior, foreground, voxels).sum(1) >= total - 1e-6).all()
    assert (resize(prior, foreground, -voxels) <= prior).all()
    torch.testing.assert_close(resize(prior, foreground, 0), prior, rtol=1e-6, atol=0)


@pytest.mark.parametrize("voxels", [-1, 2])
def test_classes_that_rounding_made_too_many_sum_to_one(voxels: int) -> None:
    prior = torch.full((1, 2, 4, 5, 6), 128 / 255)
    assert prior.sum(1).min() > 1.003
    torch.testing.assert_close(resize(prior, LABELS, voxels).sum(1), torch.ones(1, 4, 5, 6))


@each_dataset
def test_an_empty_and_a_full_prior_do_not_change_in_size(foreground: Foreground) -> None:
    """The border of the patch is no surface: an organ that is cut by it does not shrink from there."""
    for prior in (torch.zeros(1, 2, 6, 6, 6), torch.cat((torch.ones(1, 1, 6, 6, 6), torch.zeros(1, 1, 6, 6, 6)), 1)):
        for voxels in (-2, 2):
            assert torch.equal(resize(prior, foreground, voxels), prior)


def test_the_radius_bounds_the_change_and_both_directions_come() -> None:
    prior = (balls((4, 4, 6))[..., :9, :9, :13] > 0.5).float().expand(60, -1, -1, -1, -1)
    result = augment_prior(prior, ONE, generator(), morphology=1.0, radius=2)
    expected = [resize(prior[:1], ONE, voxels)[0] for voxels in (-2, -1, 1, 2)]
    found = [[torch.equal(element, e) for e in expected].index(True) for element in result]
    assert min(found.count(i) for i in range(4)) >= 6


# Removed components


def test_one_whole_component_goes_with_its_skirt_and_the_rest_stays() -> None:
    left, right = balls((8, 8, 5)), balls((8, 8, 17))
    prior = torch.maximum(left, right)
    assert torch.equal(remove_component(prior, ONE, 0.0), right)
    assert torch.equal(remove_component(prior, ONE, 0.99), left)
    results = [augment_prior(prior, ONE, generator(seed), removal=1.0) for seed in range(12)]
    assert all(torch.equal(r, left) or torch.equal(r, right) for r in results)
    assert any(torch.equal(r, left) for r in results)
    assert any(torch.equal(r, right) for r in results)


@pytest.mark.parametrize(("right", "radius", "border"), [(14, 3.0, 11), (15, 3.5, 11)], ids=["between", "a tie"])
def test_where_skirts_meet_each_component_keeps_its_own(right: int, radius: float, border: int) -> None:
    prior = balls((8, 8, 7), (8, 8, right), radius=radius)
    assert (prior[0, 0, 8, 8, 7 : right + 1] > 0).all()  # one support
    assert ndimage.label(prior[0, 0].numpy() > 0.5)[1] == 2
    result = remove_component(prior, ONE, 0.0)
    assert torch.equal(result[..., border:], prior[..., border:])
    assert result[..., :border].max() == 0


def test_unsure_voxels_elsewhere_stay() -> None:
    prior = balls((8, 8, 5))
    island = torch.zeros_like(prior)
    island[..., 8, 8, 12:14] = 0.3
    assert ((prior > 0) & (island.roll(-2, -1) > 0)).sum() == 0  # at least two voxels between the two
    assert torch.equal(remove_component(prior + island, ONE, 0.0), island)


def test_a_component_of_a_class_is_removed_from_that_class_alone() -> None:
    first, second = balls((8, 8, 5)), balls((8, 8, 12))
    prior = torch.cat((first, second * (1 - first)), 1)
    for choice, gone in ((0.0, 0), (0.99, 1)):
        result = remove_component(prior, LABELS, choice)
        assert result[:, gone].max() == 0
        assert torch.equal(result[:, 1 - gone], prior[:, 1 - gone])


def test_a_component_of_regions_takes_what_is_nested_in_it() -> None:
    whole, core = balls((8, 8, 5), (8, 8, 17)), balls((8, 8, 5), (8, 8, 17), radius=1.5)
    result = remove_component(torch.cat((whole, core), 1), REGIONS, 0.0)
    assert result[..., :11].max() == 0
    assert torch.equal(result[..., 11:], torch.cat((whole, core), 1)[..., 11:])


def test_components_touch_at_corners_and_without_any_nothing_is_removed() -> None:
    prior = torch.zeros(1, 1, 4, 4, 4)
    prior[0, 0, 0, 0, 0] = prior[0, 0, 1, 1, 1] = 1
    assert remove_component(prior, ONE, 0.0).max() == 0
    assert torch.equal(remove_component(0.5 * prior, ONE, 0.0), 0.5 * prior)


# Dropped priors


def test_a_dropped_prior_is_zero_and_a_class_may_go_alone() -> None:
    prior = prior_of(LABELS, 1).expand(200, -1, -1, -1, -1)[..., :5, :5, :5].clamp(min=0.1)
    result = augment_prior(prior, LABELS, generator(), dropping=1.0)
    gone = (result == 0).flatten(2).all(2)
    assert torch.equal(result, prior * ~gone[..., None, None, None])
    both, first, second = gone.all(1).sum(), (gone[:, 0] & ~gone[:, 1]).sum(), (~gone[:, 0] & gone[:, 1]).sum()
    assert both + first + second == 200
    assert 79 < both < 121
    assert 32 < first < 68


def test_regions_are_dropped_together() -> None:
    assert augment_prior(prior_of(REGIONS), REGIONS, generator(), dropping=1.0).max() == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"morphology": 1.5}, "morphology is 1.5; it is a probability"),
        ({"removal": -0.1}, "removal is -0.1"),
        ({"dropping": float("nan")}, "dropping is nan"),
        ({"radius": 0}, "radius is 0; it must be a whole number of voxels, at least 1"),
        ({"radius": 1.5}, "radius is 1.5"),
        ({"radius": float("inf")}, "radius is inf"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        augment_prior(prior_of(ONE), ONE, generator(), **settings)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_it_stays_there_and_agrees() -> None:
    prior = prior_of(LABELS)
    on_gpu = augment_prior(prior.cuda(), LABELS, generator(), **EVERYTHING)
    assert on_gpu.is_cuda
    torch.testing.assert_close(on_gpu.cpu(), augment_prior(prior, LABELS, generator(), **EVERYTHING))
