"""Class tokens leave features alone until taught; then voxels exchange a few vectors and nothing else."""

import pytest
import torch
from torch import Tensor, nn

from nnunet_diffrefine.networks.class_tokens import ClassTokens
from tests.builders import generator
from tests.networks.feature_modules import SPACES, features, taught, under_autocast, without_gradient

CLASSES = pytest.mark.parametrize("classes", [1, 3])


@CLASSES
@SPACES
def test_untaught_it_is_the_identity_bit_for_bit(classes: int, space: tuple[int, ...]) -> None:
    h = features(6, space)
    assert torch.equal(ClassTokens(classes, 6)(h), h)
    assert not torch.allclose(taught(ClassTokens(classes, 6))(h), h, atol=1e-2)


@CLASSES
def test_every_parameter_learns(classes: int) -> None:
    """With one class too: the token for no class gives its voxels a choice."""
    assert without_gradient(lambda: ClassTokens(classes, 6), features(6)) == (set(), set())


def test_it_agrees_with_torchs_attention() -> None:
    module, h = taught(ClassTokens(2, 6, heads=3)), features(6)

    def reference(query_weight: Tensor, key_value_weight: Tensor, out: nn.Linear, query: Tensor, source: Tensor):
        attention = nn.MultiheadAttention(6, 3, batch_first=True)
        with torch.no_grad():
            attention.in_proj_weight.copy_(torch.cat((query_weight, key_value_weight)))
            attention.in_proj_bias.zero_()
            attention.out_proj.weight.copy_(out.weight)
            attention.out_proj.bias.copy_(out.bias)
        return attention(query, source, source)[0]

    voxels = module.voxel_norm(h.flatten(2).transpose(1, 2))
    tokens = module.tokens.expand(2, -1, -1)
    read, write = (module.read_query, module.read_key_value), (module.write_query, module.write_key_value)
    tokens = tokens + reference(*(layer.weight for layer in read), module.read_out, tokens, voxels)
    written = reference(*(layer.weight for layer in write), module.write_out, voxels, module.token_norm(tokens))
    torch.testing.assert_close(module(h), h + written.transpose(1, 2).view_as(h))


def test_a_permutation_of_voxels_permutes_the_result() -> None:
    module, h = taught(ClassTokens(2, 6)), features(6, (4, 5, 6))
    order = torch.randperm(4 * 5 * 6, generator=generator())
    shuffled = h.flatten(2)[..., order].view_as(h)
    torch.testing.assert_close(module(shuffled).flatten(2), module(h).flatten(2)[..., order])
    for axis in (2, 3, 4):
        torch.testing.assert_close(module(h.flip(axis)), module(h).flip(axis))


def test_the_order_of_the_tokens_means_nothing() -> None:
    module, h = taught(ClassTokens(3, 6)), features(6)
    before = module(h)
    with torch.no_grad():
        module.tokens.copy_(module.tokens.flip(0))
    torch.testing.assert_close(module(h), before)


@CLASSES
def test_with_one_head_voxels_receive_mixtures_of_one_vector_a_token(classes: int) -> None:
    """The update, less the output bias, has at most as many dimensions as there are tokens, and reaches them."""
    module, h = taught(ClassTokens(classes, 8, heads=1)), features(8, size=1)
    update = (module(h) - h)[0].flatten(1).T - module.write_out.bias
    singular_values = torch.linalg.svdvals(update)
    assert (singular_values > 1e-3).sum() == classes + 1


def test_a_voxel_hears_the_most_distant_one_and_samples_stay_apart() -> None:
    module, h = taught(ClassTokens(2, 6)), features(6)
    changed = h.clone()
    changed[0, :3, -1, -1, -1] += 20
    difference = (module(changed) - module(h)).abs()
    assert difference[0, :, 0, 0, 0].max() > 1e-4
    assert not difference[1].any()


def test_tokens_differ_between_images() -> None:
    module = taught(ClassTokens(2, 6))
    tokens = module.read(module.voxel_norm(features(6).flatten(2).transpose(1, 2)))
    assert tokens.shape == (2, 3, 6)
    assert not torch.allclose(tokens[0], tokens[1], atol=1e-3)


@pytest.mark.parametrize("scale", [1.0, 1e6])
def test_bfloat16_stays_finite(scale: float) -> None:
    module, h = taught(ClassTokens(2, 6)), scale * features(6)
    output, gradients = under_autocast(module, h)
    assert output.dtype == torch.bfloat16
    assert output.isfinite().all()
    assert all(gradient.isfinite().all() for gradient in gradients)
    if scale == 1:
        torch.testing.assert_close(output.float(), module(h), atol=0.2, rtol=0.05)
    assert list(module.buffers()) == []


@pytest.mark.parametrize(("channels", "heads", "used"), [(6, 4, 3), (32, 4, 4), (7, 4, 1)])
def test_heads_divide_the_channels(channels: int, heads: int, used: int) -> None:
    assert ClassTokens(1, channels, heads).heads == used


@pytest.mark.parametrize("argument", ["classes", "channels", "heads"])
def test_sizes_below_one_are_refused(argument: str) -> None:
    with pytest.raises(ValueError, match=f"{argument}=0"):
        ClassTokens(**{"classes": 2, "channels": 4, "heads": 2, argument: 0})
