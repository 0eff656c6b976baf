"""From settings to a denoiser: nnU-Net's planned network, with what the settings add and nothing more."""

import pytest
import torch
from torch import nn

from nnunet_diffrefine.batch import Foreground
from nnunet_diffrefine.config import ConditionConfig
from nnunet_diffrefine.networks.attention import ChannelAttention, SelfAttention
from nnunet_diffrefine.networks.build import build_denoiser
from nnunet_diffrefine.networks.class_tokens import ClassTokens
from nnunet_diffrefine.networks.denoiser import TimeConditionedUNet
from nnunet_diffrefine.networks.fusion import AddFusion, DynamicFusion
from nnunet_diffrefine.networks.planned import planned_unet
from nnunet_diffrefine.plans import preset
from tests.builders import LABELS, REGIONS, generator, method_of
from tests.networks.planned_networks import WIDTHS, configuration, denoiser_of

KINDS = pytest.mark.parametrize("kind", ["plain", "residual"])
BOTTLENECKS = {
    "none": type(None),
    "channel_attention": ChannelAttention,
    "self_attention": SelfAttention,
    "class_tokens": ClassTokens,
}


def build(kind: str = "plain", deep: bool = False, **condition: object) -> TimeConditionedUNet:
    """4 image channels and 2 of the prior, 2 of the state, 3 heads, 2 classes."""
    return build_denoiser(ConditionConfig(**condition), configuration(kind), 6, (8, 3), LABELS, deep)


def first_convolution(module: nn.Module) -> nn.Conv3d:
    return next(m for m in module.modules() if isinstance(m, nn.Conv3d))


@KINDS
@pytest.mark.parametrize("deep", [False, True])
def test_without_additions_it_holds_the_planned_network_alone(kind: str, deep: bool) -> None:
    denoiser, planned = build(kind, deep), planned_unet(configuration(kind), 8, 3, deep)
    assert type(denoiser.unet) is type(planned)
    own = {name: value.shape for name, value in denoiser.unet.state_dict().items()}
    assert own == {name: value.shape for name, value in planned.state_dict().items()}
    assert denoiser.condition is None
    assert denoiser.bottleneck is None
    assert denoiser.deep_supervision == deep
    assert {name.split(".")[0] for name in denoiser.state_dict()} == {"unet", "time", "encoder_film", "decoder_film"}


@KINDS
@pytest.mark.parametrize("bottleneck", list(BOTTLENECKS))
@pytest.mark.parametrize("encoder", [False, True])
def test_it_maps_condition_and_state_to_heads(kind: str, bottleneck: str, encoder: bool) -> None:
    denoiser = build(kind, deep=True, bottleneck=bottleneck, encoder=encoder)
    assert type(denoiser.bottleneck) is BOTTLENECKS[bottleneck]
    assert first_convolution(denoiser.unet).in_channels == 8
    outputs = denoiser(torch.randn(2, 8, 4, 8, 8, generator=generator()), torch.tensor([1, 5]))
    assert [tuple(y.shape) for y in outputs] == [(2, 3, 4, 8, 8), (2, 3, 2, 4, 4)]


@pytest.mark.parametrize("bottleneck", [name for name in BOTTLENECKS if name != "none"])
def test_the_bottleneck_follows_the_deepest_stage(bottleneck: str) -> None:
    denoiser, seen = build(bottleneck=bottleneck), []
    denoiser.bottleneck.register_forward_hook(lambda module, arguments, output: seen.append(arguments[0].shape))
    denoiser(torch.randn(1, 8, 4, 8, 8, generator=generator()), torch.tensor([1]))
    assert [tuple(shape) for shape in seen] == [(1, WIDTHS[-1], 1, 2, 2)]


def test_the_bottleneck_reaches_the_output() -> None:
    denoiser, x = build(bottleneck="channel_attention"), torch.randn(1, 8, 4, 8, 8, generator=generator())
    before = denoiser(x, torch.tensor([1]))
    nn.init.constant_(denoiser.bottleneck.layers[-1].bias, -20.0)  # shuts every gate
    assert not torch.allclose(denoiser(x, torch.tensor([1])), before, atol=1e-3)


@pytest.mark.parametrize("classes", [1, 4])
def test_one_token_a_class_and_one_for_none(classes: int) -> None:
    condition = ConditionConfig(bottleneck="class_tokens")
    foreground = Foreground(tuple("abcd"[:classes]), exclusive=True)
    denoiser = build_denoiser(condition, configuration(), 6, (8, 3), foreground, False)
    assert denoiser.bottleneck.tokens.shape == (classes + 1, WIDTHS[-1])


@KINDS
@pytest.mark.parametrize(("fusion", "kind_of_fusion"), [("add", AddFusion), ("dynamic", DynamicFusion)])
def test_the_condition_encoder_takes_the_condition_alone(kind: str, fusion: str, kind_of_fusion: type) -> None:
    denoiser = build(kind, encoder=True, fusion=fusion)
    assert denoiser.condition.channels == 6
    assert first_convolution(denoiser.condition).in_channels == 6
    assert [type(f) for f in denoiser.condition.fusions] == [kind_of_fusion] * 3
    assert denoiser.condition.encoder.output_channels == WIDTHS
    assert not any("decoder" in name or "seg_layers" in name for name in denoiser.condition.state_dict())


def test_fusion_is_of_no_account_without_an_encoder() -> None:
    assert build(fusion="dynamic").condition is None


@pytest.mark.parametrize("foreground", [LABELS, REGIONS], ids=["labels", "regions"])
@pytest.mark.parametrize("name", ["bridge", "cmdiff", "medsegdiff", "corrdiff"])
def test_a_methods_preset_builds_a_network_that_it_can_use(name: str, foreground: Foreground) -> None:
    method = method_of(foreground, name, **{k: v for k, v in preset(name).items() if k != "method"})
    denoiser = denoiser_of(method, image_channels=3)
    image = torch.randn(1, 3, 4, 8, 8, generator=generator())
    prior = torch.rand(1, 2, 4, 8, 8, generator=generator(1)) / 2
    with torch.no_grad():
        refined = method.refine(denoiser, image, prior, generator())
    assert refined.shape == (1, foreground.heads, 4, 8, 8)
    assert refined.isfinite().all()
