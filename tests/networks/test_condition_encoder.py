"""The second encoder: nnU-Net's own, computed once or inside with one result, and every part of it learns."""

import pytest
import torch
from torch import Tensor, nn

from nnunet_diffrefine.networks.condition_encoder import ConditionEncoder
from nnunet_diffrefine.networks.denoiser import TimeConditionedUNet
from tests.builders import generator, unet
from tests.networks.feature_modules import taught

KINDS = pytest.mark.parametrize("kind", ["plain", "residual"])
FUSIONS = pytest.mark.parametrize("fusion", ["add", "dynamic"])
DEEP = pytest.mark.parametrize("deep", [False, True], ids=["one output", "deep supervision"])
T = torch.tensor([1, 7])
SHOWN = 2  # condition channels of 4


def inputs(seed: int = 0) -> Tensor:
    return torch.randn(2, 4, 8, 8, 16, generator=generator(seed))


def with_encoder(kind: str, fusion: str, deep: bool = False) -> TimeConditionedUNet:
    encoder = ConditionEncoder(unet(kind, inputs=SHOWN, seed=1).encoder, SHOWN, fusion)
    return TimeConditionedUNet(unet(kind, inputs=4, deep_supervision=deep), condition=encoder)


def as_list(output: Tensor | list[Tensor]) -> list[Tensor]:
    return output if isinstance(output, list) else [output]


@KINDS
@FUSIONS
def test_features_are_those_of_nnunets_encoder(kind: str, fusion: str) -> None:
    denoiser, x = with_encoder(kind, fusion), inputs()
    features = denoiser.condition_features(x[:, :SHOWN])
    skips = unet(kind, inputs=SHOWN, seed=1).encoder(x[:, :SHOWN])
    assert len(features) == len(skips) == 3
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(features, skips, strict=True))


@KINDS
@FUSIONS
@DEEP
def test_features_computed_once_give_what_features_computed_inside_give(kind: str, fusion: str, deep: bool) -> None:
    denoiser, x = taught(with_encoder(kind, fusion, deep)), inputs()
    features = denoiser.condition_features(x[:, :SHOWN])
    for t in (T, T + 1):
        known, inside = as_list(denoiser(x, t, features)), as_list(denoiser(x, t))
        assert len(known) == len(inside) == 1 + deep
        assert all(torch.equal(a, b) for a, b in zip(known, inside, strict=True))


@KINDS
@FUSIONS
def test_given_features_replace_the_encoder(kind: str, fusion: str) -> None:
    denoiser, x, calls = taught(with_encoder(kind, fusion)), inputs(), []
    other = denoiser.condition_features(inputs(seed=1)[:, :SHOWN])
    denoiser.condition.register_forward_hook(lambda *_: calls.append(1))
    assert not torch.allclose(denoiser(x, T, other), denoiser(x, T), atol=1e-3)
    assert len(calls) == 1


@KINDS
@FUSIONS
def test_the_state_does_not_reach_the_condition_encoder(kind: str, fusion: str) -> None:
    denoiser, x, seen = with_encoder(kind, fusion), inputs(), []
    denoiser.condition.register_forward_hook(lambda module, arguments, output: seen.append(arguments[0]))
    denoiser(x, T)
    assert torch.equal(seen[0], x[:, :SHOWN])


@KINDS
@FUSIONS
def test_features_of_nothing_leave_the_plain_denoiser(kind: str, fusion: str) -> None:
    """h + 0, and 0 times any affinity: what remains is the network without a second encoder, bit for bit."""
    denoiser, x = with_encoder(kind, fusion), inputs()
    nothing = [torch.zeros_like(f) for f in denoiser.condition_features(x[:, :SHOWN])]
    assert torch.equal(denoiser(x, T, nothing), TimeConditionedUNet(unet(kind, inputs=4))(x, T))


@KINDS
@FUSIONS
def test_features_of_every_stage_count(kind: str, fusion: str) -> None:
    denoiser, x = taught(with_encoder(kind, fusion)), inputs()
    features = denoiser.condition_features(x[:, :SHOWN])
    whole = denoiser(x, T, features)
    for stage in range(3):
        one_changed = [f.flip(4) if i == stage else f for i, f in enumerate(features)]
        assert not torch.allclose(denoiser(x, T, one_changed), whole, atol=1e-3), stage


@KINDS
@FUSIONS
@DEEP
def test_after_one_optimiser_step_every_parameter_learns(kind: str, fusion: str, deep: bool) -> None:
    """In the first step all are in the graph, or distributed training would wait; in the second none is at zero."""
    denoiser, x = with_encoder(kind, fusion, deep), inputs()
    trained = {name: p for name, p in denoiser.named_parameters() if p.requires_grad}
    optimiser = torch.optim.SGD(trained.values(), lr=1e-2)
    for _ in range(2):
        optimiser.zero_grad()
        sum(y.square().mean() for y in as_list(denoiser(x, T))).backward()
        assert [name for name, p in trained.items() if p.grad is None] == []
        optimiser.step()
    still = [name for name, p in trained.items() if not p.grad.any()]
    # a bias right before a normalisation over space has no effect
    assert [name for name in still if not name.endswith("conv.bias")] == []
    assert any(name.startswith("condition.encoder") for name in trained)


@FUSIONS
def test_there_is_one_fusion_a_stage_and_nothing_else_is_kept(fusion: str) -> None:
    planned = unet(inputs=SHOWN)
    encoder = ConditionEncoder(planned.encoder, SHOWN, fusion)
    assert len(encoder.fusions) == 3
    own = {id(p) for p in encoder.parameters()}
    assert not own & {id(p) for p in planned.decoder.seg_layers.parameters()}
    weights = sum(p.numel() for p in encoder.encoder.parameters())
    assert sum(p.numel() for p in encoder.parameters()) == weights + sum(
        p.numel() for p in encoder.fusions.parameters()
    )


@FUSIONS
def test_an_encoder_of_another_plan_is_refused(fusion: str) -> None:
    other = unet(inputs=SHOWN).encoder
    other.stages[2] = nn.Conv3d(6, 5, 3, stride=2, padding=1)
    denoiser = TimeConditionedUNet(unet(inputs=4), condition=ConditionEncoder(other, SHOWN, fusion))
    with pytest.raises(ValueError, match="same plan"):
        denoiser(inputs(), T)


def test_without_an_encoder_there_is_nothing_to_know() -> None:
    denoiser, x = TimeConditionedUNet(unet(inputs=4)), inputs()
    assert denoiser.condition_features(x[:, :SHOWN]) is None
