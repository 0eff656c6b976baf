"""Distances are exact up to the cap; the surface loss measures displacement and pushes the surface the right way."""

from itertools import pairwise, product

import pytest
import torch
from torch import Tensor

from nnunet_diffrefine.batch import Foreground
from nnunet_diffrefine.errors.surface import surface_distance, surface_loss
from tests.builders import LABELS, REGIONS, generator, label_maps, target_of, with_ignore

ONE = Foreground(("organ",), exclusive=False)
FOREGROUNDS = {
    "labels": LABELS,
    "labels with ignore": with_ignore(LABELS),
    "regions": REGIONS,
    "regions with ignore": with_ignore(REGIONS),
}
each_dataset = pytest.mark.parametrize("foreground", FOREGROUNDS.values(), ids=list(FOREGROUNDS))


def case(foreground: Foreground) -> tuple[Tensor, Tensor]:
    """Reference and valid."""
    return foreground.from_target(target_of(foreground, label_maps(foreground)))


def cube(shift: int = 0, side: int = 8) -> Tensor:
    mask = torch.zeros(1, 1, 20, 20, 20)
    mask[..., 6 : 6 + side, 6 : 6 + side, 6 + shift : 6 + shift + side] = 1
    return mask


def sure(mask: Tensor, certainty: float = 200.0) -> Tensor:
    """Logits of one region."""
    return certainty * (2 * mask - 1)


def random_logits(foreground: Foreground, reference: Tensor) -> Tensor:
    return torch.randn(len(reference), foreground.heads, *reference.shape[2:], generator=generator())


def whole(mask: Tensor) -> Tensor:
    return torch.ones_like(mask[:, :1])


# Distance


def brute_force(reference: Tensor, valid: Tensor, cap: float, spacing: tuple[float, ...]) -> Tensor:
    """Distance from each voxel's centre to the nearest box of the other kind, over all pairs of voxels."""
    result = torch.full(reference.shape, cap)
    places = torch.tensor(list(product(*(range(n) for n in reference.shape[2:]))))
    gaps = ((places[:, None] - places[None]).abs() - 0.5).clamp(min=0) * torch.tensor(spacing)
    distances = gaps.norm(dim=2)
    for b, r in product(range(reference.shape[0]), range(reference.shape[1])):
        values, counts = reference[b, r].flatten(), valid[b, 0].flatten() > 0
        other = (values[:, None] != values[None]) & counts[None]
        nearest = distances.masked_fill(~other, cap).amin(1).clamp(max=cap)
        result[b, r] = nearest.view(reference.shape[2:])
    return result


@pytest.mark.parametrize("cap", [0.4, 1.0, 3.3, 20.0])
@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (3.0, 0.8, 1.1)])
def test_distances_equal_those_over_all_pairs_of_voxels(cap: float, spacing: tuple[float, ...]) -> None:
    foreground = with_ignore(LABELS)
    reference, valid = case(foreground)
    found = surface_distance(reference, valid, cap=cap, spacing=spacing)
    expected = brute_force(reference, valid, cap, spacing)
    seen = valid.expand_as(found) > 0
    torch.testing.assert_close(found[seen], expected[seen])


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_without_a_surface_all_distances_are_the_cap(value: float) -> None:
    reference = torch.full((1, 1, 4, 5, 6), value)
    assert (surface_distance(reference, whole(reference), cap=3.0) == 3).all()


def test_two_dimensions_work_as_well() -> None:
    reference = torch.tensor([[[[0.0, 0.0, 1.0, 1.0, 0.0]]]])
    assert surface_distance(reference, whole(reference), cap=5).flatten().tolist() == [1.5, 0.5, 0.5, 0.5, 0.5]


# Loss


@each_dataset
def test_a_perfect_prediction_costs_nothing_and_the_opposite_at_most_one(foreground: Foreground) -> None:
    reference, valid = case(foreground)
    logits = foreground.logits(reference, eps=1e-30)
    assert surface_loss(logits, reference, valid, foreground) < 1e-6
    worst = surface_loss(-logits, reference, valid, foreground)
    assert 0.05 < worst <= 1


@pytest.mark.parametrize("edge", [1.0, 2.5])
@pytest.mark.parametrize("shift", [-3, 1, 2])
def test_a_surface_displaced_by_d_costs_d_squared_over_d_squared_plus_cap_squared(shift: int, edge: float) -> None:
    reference, moved = torch.zeros(1, 1, 6, 7, 20), torch.zeros(1, 1, 6, 7, 20)
    reference[..., :10], moved[..., : 10 + shift] = 1, 1
    loss = surface_loss(sure(moved), reference, whole(reference), ONE, cap=9.0, spacing=(1.0, 1.0, edge))
    assert loss.item() == pytest.approx((shift * edge) ** 2 / ((shift * edge) ** 2 + 9**2), rel=1e-5)


@each_dataset
def test_a_batch_twice_costs_the_same(foreground: Foreground) -> None:
    reference, valid = case(foreground)
    logits = random_logits(foreground, reference)
    twice = (torch.cat((x, x)) for x in (logits, reference, valid))
    torch.testing.assert_close(surface_loss(*twice, foreground), surface_loss(logits, reference, valid, foreground))


def test_the_share_of_foreground_in_a_patch_does_not_matter() -> None:
    losses = []
    for margin in (0, 5):
        reference, moved = (torch.nn.functional.pad(cube(s), (margin,) * 6) for s in (0, 2))
        losses.append(surface_loss(sure(moved), reference, whole(reference), ONE))
    torch.testing.assert_close(*losses)


def test_the_loss_falls_as_a_shifted_cube_moves_back() -> None:
    losses = [surface_loss(sure(cube(s), 4), cube(), whole(cube()), ONE).item() for s in range(6, -1, -1)]
    assert all(nearer < 0.97 * further for further, nearer in pairwise(losses))


@pytest.mark.parametrize("growth", [-2, 2])
def test_wrong_size_costs_and_the_gradient_corrects_it(growth: int) -> None:
    logits = sure(cube(0, 8 + growth), 2).requires_grad_()
    surface_loss(logits, cube(), whole(cube()), ONE).backward()
    wrong = cube(0, 8 + growth) != cube()
    assert (logits.grad[wrong] * growth > 0).all()  # descent lowers what is too much and raises what is missing
    assert ((logits.grad < 0) == (cube() > 0)).all()  # and makes what is right surer


@pytest.mark.reference
@pytest.mark.parametrize("shift", [-3, 2])
def test_a_gradient_step_improves_the_surface_dice(shift: int) -> None:
    metrics = pytest.importorskip("monai.metrics")
    logits = sure(cube(shift), 1).requires_grad_()
    surface_loss(logits, cube(), whole(cube()), ONE).backward()
    # The furthest wrong voxels move by 2 and turn; those next to where the surface should be move by a third at most.
    wrong = cube(shift) != cube()
    stepped = logits - 2 * logits.grad / logits.grad[wrong].abs().max()
    before, after = (
        metrics.compute_surface_dice((x > 0).float(), cube(), class_thresholds=[1.0], include_background=True).item()
        for x in (logits.detach(), stepped.detach())
    )
    assert before < 0.95
    assert after > before + 0.03


@each_dataset
def test_descent_on_the_loss_alone_reaches_the_reference(foreground: Foreground) -> None:
    reference, valid = case(foreground)
    logits = random_logits(foreground, reference).requires_grad_()
    optimiser = torch.optim.Adam([logits], lr=0.5)
    for _ in range(30):
        optimiser.zero_grad()
        surface_loss(logits, reference, valid, foreground).backward()
        optimiser.step()
    assert torch.equal(foreground.decide(logits) * valid, reference * valid)


@pytest.mark.parametrize("foreground", [with_ignore(LABELS), with_ignore(REGIONS)], ids=["labels", "regions"])
def test_ignored_voxels_have_no_effect_and_no_gradient(foreground: Foreground) -> None:
    reference, valid = case(foreground)
    logits = random_logits(foreground, reference).requires_grad_()
    loss = surface_loss(logits, reference, valid, foreground)
    loss.backward()
    ignored = valid == 0
    assert ignored.any()
    assert (logits.grad.masked_select(ignored) == 0).all()
    others = torch.where(ignored, 7.0, logits), torch.where(ignored, 1 - reference, reference)
    assert torch.equal(surface_loss(*others, valid, foreground), loss)


@each_dataset
def test_empty_classes_and_patches_without_a_valid_voxel_are_finite(foreground: Foreground) -> None:
    reference, valid = (torch.zeros_like(x) for x in case(foreground))
    logits = random_logits(foreground, reference).requires_grad_()
    assert surface_loss(logits, reference, valid, foreground) == 0
    loss = surface_loss(logits, reference, valid + 1, foreground)
    integral = 5 * foreground.probabilities(logits).sum()  # every false alarm is at the cap
    torch.testing.assert_close(loss, integral / (integral + 6 * 5**2 / 2))
    loss.backward()
    assert logits.grad.isfinite().all()
    foreground_heads = logits.grad if not foreground.exclusive else -logits.grad[:, :1]
    assert (foreground_heads > 0).all()


@each_dataset
def test_it_is_float32_under_autocast(foreground: Foreground) -> None:
    reference, valid = case(foreground)
    logits = random_logits(foreground, reference).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        loss = surface_loss(logits, reference, valid, foreground)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, surface_loss(logits.float(), reference, valid, foreground))


@pytest.mark.parametrize("axis", [2, 3, 4])
def test_mirrored_input_has_the_same_loss(axis: int) -> None:
    reference, valid = case(LABELS)
    logits = random_logits(LABELS, reference)
    loss = surface_loss(logits, reference, valid, LABELS)
    torch.testing.assert_close(surface_loss(logits.flip(axis), reference.flip(axis), valid.flip(axis), LABELS), loss)


def test_the_unit_of_length_does_not_matter() -> None:
    reference, valid = case(LABELS)
    logits = random_logits(LABELS, reference)
    small, large = (
        surface_loss(logits, reference, valid, LABELS, cap=3 * unit, spacing=(2 * unit, unit, unit)) for unit in (1, 10)
    )
    torch.testing.assert_close(small, large)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cap": 0.0}, "cap is 0.0; it must be a positive, finite distance"),
        ({"cap": float("inf")}, "cap is inf"),
        ({"spacing": (1.0, 1.0)}, "wanted 3 positive numbers, one per axis"),
        ({"spacing": (1.0, 0.0, 1.0)}, "wanted 3 positive numbers"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        surface_loss(sure(cube()), cube(), whole(cube()), ONE, **settings)


def test_a_coarser_output_is_refused() -> None:
    with pytest.raises(ValueError, match="give the finest output of deep supervision"):
        surface_loss(sure(cube())[..., ::2, ::2, ::2], cube(), whole(cube()), ONE)
