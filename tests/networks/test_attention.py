"""Attention gives back its input until taught; then it agrees with closed forms and torch's own attention."""

import pytest
import torch
from torch import nn

from nnunet_diffrefine.networks.attention import ChannelAttention, SelfAttention, largest_divisor
from tests.builders import generator
from tests.networks.feature_modules import SPACES, features, taught, under_autocast, without_gradient

BOTH = pytest.mark.parametrize("module", [ChannelAttention, SelfAttention])


@BOTH
@SPACES
def test_untaught_it_is_the_identity_bit_for_bit(module: type[nn.Module], space: tuple[int, ...]) -> None:
    h = features(6, space)
    assert torch.equal(module(6)(h), h)
    assert not torch.allclose(taught(module(6))(h), h, atol=1e-2)


@BOTH
def test_it_is_equivariant_to_mirroring(module: type[nn.Module]) -> None:
    attention, h = taught(module(6)), features(6, (5, 6, 7))  # sides that the grids do not divide
    for axis in (2, 3, 4):
        torch.testing.assert_close(attention(h.flip(axis)), attention(h).flip(axis))


@BOTH
def test_samples_do_not_touch_each_other(module: type[nn.Module]) -> None:
    attention, h = taught(module(6)), features(6)
    torch.testing.assert_close(attention(h)[:1], attention(h[:1]))


@BOTH
def test_every_parameter_learns(module: type[nn.Module]) -> None:
    assert without_gradient(lambda: module(6), features(6)) == (set(), set())


@BOTH
def test_bfloat16_stays_finite_and_close(module: type[nn.Module]) -> None:
    attention, h = taught(module(6)), features(6)
    output, gradients = under_autocast(attention, h)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), attention(h), atol=0.1, rtol=0.05)
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert list(attention.buffers()) == []


@BOTH
def test_large_features_stay_finite_in_half_precision(module: type[nn.Module]) -> None:
    output, gradients = under_autocast(taught(module(6)), 1e6 * features(6))
    assert output.isfinite().all()
    assert all(gradient.isfinite().all() for gradient in gradients)


@BOTH
@pytest.mark.parametrize("channels", [0, -2])
def test_no_channels_are_refused(module: type[nn.Module], channels: int) -> None:
    with pytest.raises(ValueError, match=f"channels={channels}"):
        module(channels)


class TestChannelAttention:
    def test_one_scale_is_squeeze_and_excitation(self) -> None:
        attention, h = taught(ChannelAttention(6, reduction=2, scales=(1,))), features(6)
        first, _, last = attention.layers
        hidden = h.mean((2, 3, 4)) @ first.weight.T + first.bias
        logits = hidden * torch.sigmoid(hidden) @ last.weight.T + last.bias
        gate = 2 / (1 + torch.exp(-logits))
        assert first.out_features == 3
        torch.testing.assert_close(attention(h), h * gate[:, :, None, None, None])

    def test_the_gate_is_one_number_a_channel_between_0_and_2(self) -> None:
        attention, h = taught(ChannelAttention(6)), features(6)
        ratio = (attention(h) / h).flatten(2)
        torch.testing.assert_close(ratio, attention.gate(h)[:, :, None].expand_as(ratio))
        assert attention.gate(100 * h).min() >= 0
        assert attention.gate(100 * h).max() <= 2

    def test_finer_scales_see_the_cell_that_stands_out(self) -> None:
        """Descriptors by hand: one bright block of 2x2x2 voxels, the rest empty."""
        attention, h = ChannelAttention(2, scales=(1, 2, 4)), torch.zeros(1, 2, 8, 8, 8)
        h[0, 1, 2:4, 4:6, 6:8] = 3
        seen = []
        attention.layers[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        attention(h)
        torch.testing.assert_close(seen[0], torch.tensor([[0, 3 / 64, 0, 3 / 8, 0, 3]]))

    def test_on_an_axis_shorter_than_the_grid_each_voxel_is_a_cell(self) -> None:
        h = features(3, (1, 2, 3))
        attention, exact = taught(ChannelAttention(3, scales=(4,))), taught(ChannelAttention(3, scales=(9,)))
        torch.testing.assert_close(attention(h), exact(h))
        seen = []
        attention.layers[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        attention(h)
        assert torch.equal(seen[0], h.amax((2, 3, 4)))

    @pytest.mark.parametrize("scales", [(), (0,), (1, -2)])
    def test_bad_scales_are_refused(self, scales: tuple[int, ...]) -> None:
        with pytest.raises(ValueError, match="scales="):
            ChannelAttention(4, scales=scales)

    def test_bad_reduction_is_refused_and_a_large_one_leaves_one_unit(self) -> None:
        with pytest.raises(ValueError, match="reduction=0"):
            ChannelAttention(4, reduction=0)
        assert ChannelAttention(4, reduction=99).layers[0].out_features == 1

    @pytest.mark.parametrize("shape", [(2, 4), (1, 4, 2, 2, 2, 2)])
    def test_ranks_it_cannot_pool_are_refused(self, shape: tuple[int, ...]) -> None:
        with pytest.raises(ValueError, match="1 to 3 axes"):
            ChannelAttention(4)(torch.zeros(shape))


class TestSelfAttention:
    @pytest.mark.parametrize(("channels", "heads"), [(8, 1), (8, 2), (8, 4)])
    def test_it_agrees_with_torchs_module(self, channels: int, heads: int) -> None:
        attention, h = taught(SelfAttention(channels, heads)), features(channels)
        reference = nn.MultiheadAttention(channels, heads, batch_first=True)
        with torch.no_grad():
            reference.in_proj_weight.copy_(attention.query_key_value.weight)
            reference.in_proj_bias.zero_()
            reference.out_proj.weight.copy_(attention.out.weight)
            reference.out_proj.bias.copy_(attention.out.bias)
        tokens = attention.norm(h.flatten(2).transpose(1, 2))
        expected = h + reference(tokens, tokens, tokens)[0].transpose(1, 2).view_as(h)
        torch.testing.assert_close(attention(h), expected)

    def test_a_permutation_of_voxels_permutes_the_result(self) -> None:
        attention, h = taught(SelfAttention(6)), features(6)
        order = torch.randperm(h[0, 0].numel(), generator=generator())
        shuffled = h.flatten(2)[..., order].view_as(h)
        torch.testing.assert_close(attention(shuffled).flatten(2), attention(h).flatten(2)[..., order])

    def test_a_voxel_hears_the_most_distant_one(self) -> None:
        attention, h = taught(SelfAttention(6)), features(6)
        changed = h.clone()
        changed[:, :3, -1, -1, -1] += 5
        assert not torch.allclose(attention(changed)[:, :, 0, 0, 0], attention(h)[:, :, 0, 0, 0], atol=1e-3)

    @pytest.mark.parametrize(
        ("channels", "heads", "used"), [(6, 4, 3), (32, 4, 4), (7, 4, 1), (320, 6, 5), (3, 8, 3), (1, 4, 1)]
    )
    def test_heads_divide_the_channels(self, channels: int, heads: int, used: int) -> None:
        assert SelfAttention(channels, heads).heads == largest_divisor(channels, heads) == used

    def test_no_heads_are_refused(self) -> None:
        with pytest.raises(ValueError, match="heads=0"):
            SelfAttention(4, heads=0)
