"""The denoiser is nnU-Net's own network until its conditioning learns something, and then it is told the time."""

import pytest
import torch
from dynamic_network_architectures.architectures.unet import ResidualUNet
from torch import Tensor, nn

from nnunet_diffrefine.networks.condition_encoder import ConditionEncoder
from nnunet_diffrefine.networks.denoiser import TimeConditionedUNet
from nnunet_diffrefine.networks.planned import planned_unet
from nnunet_diffrefine.networks.time_embedding import FiLM, TimeEmbedding, sinusoid
from nnunet_diffrefine.settings_block import ConfigError
from tests.builders import generator, unet
from tests.networks.planned_networks import configuration

KINDS = pytest.mark.parametrize("kind", ["plain", "residual"])
DEEP = pytest.mark.parametrize("deep", [False, True], ids=["one output", "deep supervision"])
T = torch.tensor([1, 7])


def images(channels: int = 2) -> Tensor:
    return torch.randn(2, channels, 8, 8, 16, generator=generator())


def planned(**changes: list[int]) -> nn.Module:
    """The plain network of two inputs, with other numbers in its plan."""
    plan = configuration()
    plan.configuration["architecture"]["arch_kwargs"] |= changes
    return planned_unet(plan, 2, 3, deep_supervision=False)


def taught(denoiser: TimeConditionedUNet) -> TimeConditionedUNet:
    """Give the conditioning weights, as training would."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        for film in (*denoiser.encoder_film, *denoiser.decoder_film):
            nn.init.normal_(film.affine.weight, std=0.3)
            nn.init.normal_(film.affine.bias, std=0.3)
    return denoiser


@KINDS
@DEEP
def test_untaught_it_is_nnunets_network_bit_for_bit(kind: str, deep: bool) -> None:
    network, x = unet(kind, deep_supervision=deep), images()
    expected, given = network(x), TimeConditionedUNet(network)(x, T)
    if not deep:
        expected, given = [expected], [given]
    assert [y.shape[2:] for y in given] == [(8, 8, 16), (4, 4, 8)][: len(given)]
    assert len(given) == len(expected) == 1 + deep
    for mine, theirs in zip(given, expected, strict=True):
        assert torch.equal(mine, theirs)


@KINDS
def test_deep_supervision_can_be_switched(kind: str) -> None:
    denoiser, x = taught(TimeConditionedUNet(unet(kind, deep_supervision=True))), images()
    both = denoiser(x, T)
    assert denoiser.deep_supervision
    denoiser.deep_supervision = False
    assert not denoiser.deep_supervision
    assert torch.equal(denoiser(x, T), both[0])
    denoiser.deep_supervision = True
    assert torch.equal(denoiser(x, T)[1], both[1])


@KINDS
@DEEP
def test_taught_it_knows_the_time_of_each_batch_element(kind: str, deep: bool) -> None:
    denoiser, x = taught(TimeConditionedUNet(unet(kind, deep_supervision=deep))), images()
    outputs = {t: denoiser(x, torch.tensor(t)) for t in ((1, 7), (1, 8), (7, 7))}
    for level in range(1 + deep):
        early, later, same = (y[level] if deep else y for y in outputs.values())
        assert torch.equal(early[0], later[0])
        assert not torch.allclose(early[1], later[1], atol=1e-3)
        assert torch.equal(early[1], same[1])
        assert not torch.allclose(early[0], same[0], atol=1e-3)


@KINDS
def test_every_stage_is_told_the_time(kind: str) -> None:
    """Teach one stage at a time: each alone changes the result."""
    x = images()
    plain = TimeConditionedUNet(unet(kind))(x, T)
    for part in ("encoder_film", "decoder_film"):
        denoiser = TimeConditionedUNet(unet(kind))
        for i, film in enumerate(getattr(denoiser, part)):
            nn.init.constant_(film.affine.bias, 0.5)
            assert not torch.allclose(denoiser(x, T), plain, atol=1e-4), f"{part}[{i}]"
            nn.init.zeros_(film.affine.bias)
        assert torch.equal(denoiser(x, T), plain)


@KINDS
@DEEP
def test_gradient_reaches_every_trained_parameter(kind: str, deep: bool) -> None:
    """Without deep supervision too: a parameter that waits for a gradient in vain stops distributed training."""
    denoiser = taught(TimeConditionedUNet(unet(kind, deep_supervision=deep)))
    outputs = denoiser(images(), T)
    sum((y**2).sum() for y in (outputs if deep else [outputs])).backward()
    without = [n for n, p in denoiser.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    # a bias right before a normalisation over space has no effect
    assert [n for n in without if not n.endswith("bias")] == []
    assert all(p.grad is not None for p in denoiser.parameters() if p.requires_grad)


@KINDS
def test_at_initialisation_the_conditioning_already_learns(kind: str) -> None:
    denoiser = TimeConditionedUNet(unet(kind))
    (denoiser(images(), T) ** 2).sum().backward()
    for film in (*denoiser.encoder_film, *denoiser.decoder_film):
        assert film.affine.weight.grad.any()


class TestStartFrom:
    @KINDS
    def test_new_inputs_at_zero_give_the_other_network(self, kind: str) -> None:
        stage_one = unet(kind, inputs=2, seed=1)
        denoiser = TimeConditionedUNet(unet(kind, inputs=5, seed=2))
        copied = denoiser.start_from(stage_one.state_dict())
        assert copied == len(stage_one.state_dict())
        x = images()
        new = torch.zeros(2, 3, *x.shape[2:])
        torch.testing.assert_close(denoiser(torch.cat((x, new), 1), T), stage_one(x), atol=1e-6, rtol=1e-5)

    @KINDS
    def test_what_new_inputs_hold_does_not_matter_at_first_but_can_be_learned(self, kind: str) -> None:
        stage_one = unet(kind, inputs=2, seed=1)
        denoiser = TimeConditionedUNet(unet(kind, inputs=5, seed=2))
        denoiser.start_from(stage_one.state_dict())
        x = torch.cat((images(), 10 * images(3)), 1)
        y = denoiser(x, T)
        torch.testing.assert_close(y, stage_one(images()), atol=1e-5, rtol=1e-5)
        (y**2).sum().backward()
        first = next(p for p in denoiser.parameters() if p.ndim == 5 and p.shape[1] == 5)
        assert first.grad[:, 2:].any()

    @KINDS
    def test_other_outputs_keep_their_own_weights(self, kind: str) -> None:
        stage_one = unet(kind, inputs=2, outputs=3, seed=1).state_dict()
        denoiser = TimeConditionedUNet(unet(kind, inputs=2, outputs=2, seed=2))
        before = {n: v.clone() for n, v in denoiser.unet.state_dict().items()}
        assert denoiser.start_from(stage_one) == sum("seg_layers" not in name for name in stage_one)
        for name, value in denoiser.unet.state_dict().items():
            assert torch.equal(value, before[name] if "seg_layers" in name else stage_one[name]), name

    @KINDS
    def test_output_layers_of_masks_stay_out_of_other_outputs(self, kind: str) -> None:
        stage_one = unet(kind, inputs=2, seed=1).state_dict()
        denoiser = TimeConditionedUNet(unet(kind, inputs=2, seed=2))
        before = {n: v.clone() for n, v in denoiser.unet.state_dict().items()}
        denoiser.start_from(stage_one, head=False)
        for name, value in denoiser.unet.state_dict().items():
            assert torch.equal(value, before[name] if "seg_layers" in name else stage_one[name]), name

    @KINDS
    def test_the_encoder_of_the_condition_starts_as_a_copy_of_the_encoder(self, kind: str) -> None:
        stage_one = unet(kind, inputs=2, seed=1)
        encoder = ConditionEncoder(unet(kind, inputs=3, seed=3).encoder, 3, "add")
        TimeConditionedUNet(unet(kind, inputs=5, seed=2), condition=encoder).start_from(stage_one.state_dict())
        x = images()
        features = encoder(torch.cat((x, torch.rand(2, 1, *x.shape[2:])), 1))
        for own, wanted in zip(features, stage_one.encoder(x), strict=True):
            torch.testing.assert_close(own, wanted, atol=1e-5, rtol=1e-5)

    def test_the_other_networks_weights_are_copied_not_shared(self) -> None:
        stage_one = unet(seed=1)
        weights = {n: v.clone() for n, v in stage_one.state_dict().items()}
        denoiser = TimeConditionedUNet(unet(seed=2))
        denoiser.start_from(stage_one.state_dict())
        with torch.no_grad():
            for parameter in denoiser.parameters():
                parameter.add_(1)
        assert all(torch.equal(v, weights[n]) for n, v in stage_one.state_dict().items())

    @pytest.mark.parametrize("other", ["residual", "wider", "deeper", "a layer"])
    def test_another_architecture_is_refused_and_nothing_copied(self, other: str) -> None:
        """Copied in part, it would be no network at all, and only a line of the log would say so."""
        strangers = {
            "residual": unet("residual", inputs=2),
            "wider": planned(features_per_stage=[4, 6, 9]),
            "deeper": planned(n_conv_per_stage=[1, 1, 2]),
            "a layer": nn.Linear(3, 3),
        }
        denoiser = TimeConditionedUNet(unet(inputs=5, seed=2))
        before = {n: v.clone() for n, v in denoiser.state_dict().items()}
        words = r"have no place there.*training.initial_weights=random, or train the refiner on stage one's plans"
        with pytest.raises(ConfigError, match=words):
            denoiser.start_from(strangers[other].state_dict())
        assert all(torch.equal(v, before[n]) for n, v in denoiser.state_dict().items())


class NoStages(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(2, 2)


def test_other_architectures_are_refused_by_name() -> None:
    with pytest.raises(NotImplementedError, match=r"NoStages has no encoder.stages.*PlainConvUNet"):
        TimeConditionedUNet(NoStages())
    with pytest.raises(NotImplementedError, match="Conv3d"):
        TimeConditionedUNet(nn.Conv3d(1, 1, 1))


@pytest.mark.parametrize(
    "missing", ["encoder.output_channels", "decoder.stages", "decoder.transpconvs", "decoder.seg_layers"]
)
def test_a_missing_part_is_named(missing: str) -> None:
    network = unet()
    part, attribute = missing.split(".")
    delattr(getattr(network, part), attribute)
    with pytest.raises(NotImplementedError, match=f"PlainConvUNet has no {missing}"):
        TimeConditionedUNet(network)


def test_a_residual_decoder_works_alike() -> None:
    """nnU-Net's ResidualUNet has the same parts, so it is not refused; then it has to be right."""
    network = ResidualUNet(
        2, 3, [4, 6, 8], nn.Conv3d, 3, [1, 2, 2], 1, 3, [1, 1], norm_op=nn.InstanceNorm3d, norm_op_kwargs={},
        nonlin=nn.LeakyReLU, nonlin_kwargs={},
    )  # fmt: skip
    x = images()
    assert torch.equal(TimeConditionedUNet(network)(x, T), network(x))


class TestTime:
    def test_sinusoid_in_closed_form(self) -> None:
        t, size = torch.tensor([0, 1, 250]), 8
        frequencies = torch.tensor([10_000.0 ** (-i / 4) for i in range(4)])
        expected = torch.cat(((t[:, None] * frequencies).cos(), (t[:, None] * frequencies).sin()), 1)
        torch.testing.assert_close(sinusoid(t, size), expected, atol=1e-4, rtol=1e-4)

    def test_close_times_have_different_embeddings(self) -> None:
        embeddings = sinusoid(torch.arange(1001), 128)
        distances = (embeddings[1:] - embeddings[:-1]).norm(dim=1)
        assert distances.min() > 0.1

    def test_the_embedding_has_no_buffers(self) -> None:
        assert list(TimeEmbedding(8).buffers()) == list(FiLM(8, 4).buffers()) == []
        assert TimeEmbedding(8)(torch.tensor([1, 2, 3])).shape == (3, 8)

    def test_film_in_closed_form(self) -> None:
        film, h, embedding = FiLM(5, 3), torch.randn(2, 3, 2, 3, 4), torch.randn(2, 5)
        assert torch.equal(film(h, embedding), h)
        nn.init.normal_(film.affine.weight)
        nn.init.normal_(film.affine.bias)
        affine = embedding @ film.affine.weight.T + film.affine.bias
        scale, shift = affine[:, :3, None, None, None], affine[:, 3:, None, None, None]
        torch.testing.assert_close(film(h, embedding), h * (1 + scale) + shift)
        assert film(h.bfloat16(), embedding).dtype == torch.bfloat16
