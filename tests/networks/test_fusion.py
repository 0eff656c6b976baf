"""Condition and denoiser features are summed; taught, the dynamic fusion weighs the condition by the state."""

import pytest
import torch
from torch import Tensor

from nnunet_diffrefine.networks.fusion import AddFusion, DynamicFusion
from tests.networks.feature_modules import SPACES, features, taught, under_autocast, without_gradient


def pair(channels: int = 4, space: tuple[int, ...] = (4, 5, 6)) -> tuple[Tensor, Tensor]:
    return features(channels, space, seed=1), features(channels, space, seed=2)


@SPACES
def test_untaught_both_are_the_sum_bit_for_bit(space: tuple[int, ...]) -> None:
    h, f = pair(space=space)
    assert torch.equal(AddFusion()(h, f), h + f)
    assert torch.equal(DynamicFusion(4)(h, f), h + f)


def test_addition_has_no_state() -> None:
    assert AddFusion().state_dict() == {}
    assert DynamicFusion(4).state_dict().keys() == {"gamma", "parser.offset"}
    assert list(DynamicFusion(4).buffers()) == []


@SPACES
def test_dynamic_fusion_in_closed_form(space: tuple[int, ...]) -> None:
    fusion, (h, f) = taught(DynamicFusion(4)), pair(space=space)
    axes = tuple(range(1, h.ndim))

    def normalised(x: Tensor) -> Tensor:
        variance = x.var(axes, correction=0, keepdim=True)
        return (x - x.mean(axes, keepdim=True)) / (variance + 1e-5).sqrt()

    attentive = normalised(f) * normalised(fusion.parser(h)) * f
    gamma = fusion.gamma.view(-1, *([1] * len(space)))
    torch.testing.assert_close(fusion(h, f), h + f + gamma * attentive)


def test_frequencies_of_the_state_that_are_switched_off_do_not_reach_the_condition() -> None:
    fusion, (h, f) = taught(DynamicFusion(4, bands=3)), pair(space=(8, 8))
    ripple = h + torch.tensor([1.0, -1.0]).repeat(4)  # Nyquist frequency of the last axis

    def added(state: Tensor) -> Tensor:
        return fusion(state, f) - state

    assert not torch.allclose(added(ripple), added(h), atol=1e-2)
    with torch.no_grad():
        fusion.parser.offset[:, -1] = -1
    torch.testing.assert_close(added(ripple), added(h), atol=1e-4, rtol=1e-4)


def test_without_a_condition_the_state_passes() -> None:
    fusion, (h, _) = taught(DynamicFusion(4)), pair()
    assert torch.equal(fusion(h, torch.zeros_like(h)), h)


def test_what_the_fusion_adds_ignores_offset_and_scale_of_the_state() -> None:
    fusion, (h, f) = taught(DynamicFusion(4, bands=2)), pair()
    with torch.no_grad():
        fusion.parser.offset.fill_(0.5)  # no filter, only a scale
    torch.testing.assert_close(fusion(7 * h + 3, f) - (7 * h + 3), fusion(h, f) - h, atol=1e-3, rtol=1e-3)


def test_it_is_equivariant_to_mirroring_and_keeps_samples_apart() -> None:
    fusion, (h, f) = taught(DynamicFusion(4)), pair(space=(5, 6, 7))
    for axis in (2, 3, 4):
        torch.testing.assert_close(fusion(h.flip(axis), f.flip(axis)), fusion(h, f).flip(axis))
    torch.testing.assert_close(fusion(h, f)[1:], fusion(h[1:], f[1:]))


def test_every_parameter_learns() -> None:
    assert without_gradient(lambda: DynamicFusion(4), *pair()) == (set(), set())


def test_gradients_reach_both_encoders() -> None:
    h, f = (x.requires_grad_() for x in pair())
    taught(DynamicFusion(4))(h, f).square().sum().backward()
    assert h.grad.all()
    assert f.grad.all()


@pytest.mark.parametrize("fusion", [AddFusion(), taught(DynamicFusion(4))], ids=["add", "dynamic"])
def test_bfloat16_stays_finite_and_close(fusion: AddFusion | DynamicFusion) -> None:
    h, f = (x.requires_grad_() for x in pair())
    output, gradients = under_autocast(fusion, h, f)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), fusion(h, f), atol=0.1, rtol=0.05)
    assert all(gradient.isfinite().all() for gradient in (*gradients, h.grad, f.grad))


@pytest.mark.parametrize("fusion", [AddFusion(), DynamicFusion(4)], ids=["add", "dynamic"])
def test_the_result_has_the_type_of_the_denoisers_features(fusion: AddFusion | DynamicFusion) -> None:
    h, f = pair()
    assert fusion(h.bfloat16(), f).dtype == torch.bfloat16
    assert fusion(h, f.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("fusion", [AddFusion(), DynamicFusion(4)], ids=["add", "dynamic"])
@pytest.mark.parametrize("shape", [(2, 1, 4, 5, 6), (1, 4, 4, 5, 6), (2, 4, 4, 5, 1)], ids=str)
def test_shapes_that_would_broadcast_are_refused(fusion: AddFusion | DynamicFusion, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"h has shape \(2, 4, 4, 5, 6\)"):
        fusion(features(4), torch.zeros(shape))


@pytest.mark.parametrize(("channels", "bands"), [(0, 8), (4, 1)])
def test_bad_arguments_are_refused(channels: int, bands: int) -> None:
    with pytest.raises(ValueError, match=f"channels={channels}, bands={bands}"):
        DynamicFusion(channels, bands)
