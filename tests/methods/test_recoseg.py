"""ReCoSeg: the synthesis, its residual, the inputs of the segmentation and the choice of its thresholds."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nnunet_diffrefine.batch import Foreground
from nnunet_diffrefine.config import ConfigError
from nnunet_diffrefine.diffusion import gaussian
from nnunet_diffrefine.methods import recoseg_settings as settings
from nnunet_diffrefine.methods.recoseg import (
    ReCoSeg,
    Synthesis,
    calibrated,
    extra_channel,
    from_parts,
    to_parts,
)
from nnunet_diffrefine.methods.recoseg_settings import ReCoSegConfig, ResidualConfig, SynthesisConfig
from nnunet_diffrefine.networks.recoseg import ReCoSegNetwork, StoredChannelNetwork, SynthesisNetwork
from nnunet_diffrefine.plans import merge, preset, shipped_settings
from nnunet_diffrefine.settings_block import read_settings
from nnunet_diffrefine.stage_one.store import dequantise, quantise
from nnunet_diffrefine.training.thresholds import ThresholdChoice
from nnunet_diffrefine.training.trainer_recoseg import threshold_choice
from tests.builders import LABELS, REGIONS, SPACE, TinyDenoiser, generator
from tests.methods.rediffinet_family import NESTED

T, TARGET, CHANNELS, MAXIMUM = 50, 1, 3, 8.0
ONE_CLASS = Foreground(("tumour",), exclusive=True)


def image(size: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(size, CHANNELS, *SPACE, generator=generator(seed))


def synthesis(prediction: str = "x0", schedule: str = "linear", **groups: Any) -> Synthesis:
    process = {"timesteps": T, "schedule": schedule, "prediction": prediction, **groups.pop("process", {})}
    return Synthesis(read_settings(SynthesisConfig, {"process": process, **groups}), TARGET, CHANNELS)


def oracle(method: Synthesis, x0: Tensor):
    """The denoiser that knows the channel."""

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        if method.config.process.prediction == "x0":
            return x0
        a = method.process.alpha_bar(t).view(-1, 1, 1, 1, 1)
        scale = method.config.process.input_scale
        return ((x[:, -1:].double() - a.sqrt() * scale * x0) / (1 - a).sqrt()).float()

    return denoise


# Synthesis


@pytest.mark.parametrize("prediction", ["x0", "epsilon"])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("steps", [1, 2, T])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_a_denoiser_that_knows_the_channel_gives_it_back(prediction: str, schedule: str, steps: int, eta: float):
    """From epsilon at t = T, rounding grows by 1 / sqrt(alpha_bar_T): 2e4 for the cosine schedule."""
    method = synthesis(prediction, schedule, sampling={"steps": steps, "eta": eta}, process={"input_scale": 0.7})
    x = image()
    x0, _ = method.split(x)
    drawn = method.synthesise(oracle(method, x0), x, generator(1))
    tolerance = 1e-5 if prediction == "x0" else 2e-2
    torch.testing.assert_close(drawn, x0, atol=tolerance, rtol=0)


def test_a_perfect_synthesis_leaves_no_residual_and_no_stored_part():
    method, x = synthesis(sampling={"steps": 3}), image(1)
    x0, _ = method.split(x)
    drawn = method.synthesise(oracle(method, x0), x, generator())
    assert torch.equal(extra_channel(drawn, x0, "residual", MAXIMUM), torch.zeros_like(x0))
    assert not to_parts(drawn[0], x0[0], MAXIMUM).any()


@pytest.mark.parametrize("steps", [1, 4])
def test_the_real_channel_is_not_read(steps: int):
    method, network = synthesis(sampling={"steps": steps}), TinyDenoiser(CHANNELS, 1)
    x = image()
    other = x.clone()
    other[:, TARGET] = torch.randn_like(other[:, TARGET])
    first, second = (method.synthesise(network, i, generator(3)) for i in (x, other))
    assert torch.equal(first, second)
    other[:, 0] += 1
    assert not torch.equal(first, method.synthesise(network, other, generator(3)))


def test_one_step_is_regression_up_to_the_input_noise():
    """One pass at t = T; a denoiser that ignores its state gives the same from every seed."""
    calls: list[int] = []

    def regression(x: Tensor, t: Tensor) -> Tensor:
        calls.append(int(t[0]))
        return x[:, :1] - x[:, 1:2]

    method, x = synthesis(sampling={"steps": 1}), image()
    drawn = [method.synthesise(regression, x, generator(seed)) for seed in (0, 1)]
    assert calls == [T, T]
    assert torch.equal(drawn[0], drawn[1])
    torch.testing.assert_close(drawn[0], x[:, :1] - x[:, 2:])


@pytest.mark.parametrize("prediction", ["x0", "epsilon"])
@pytest.mark.parametrize("loss", ["l1", "l2"])
def test_the_oracle_has_no_loss_and_others_have(prediction: str, loss: str):
    method, x = synthesis(prediction, training={"loss": loss}), image(4)
    x0, _ = method.split(x)
    assert float(method.loss(oracle(method, x0), x, generator())) < 1e-4
    network = TinyDenoiser(CHANNELS, 1)
    value = method.loss(network, x, generator())
    assert float(value.detach()) > 0.1
    value.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in network.parameters())


def test_a_constant_offset_costs_its_size_or_its_square():
    for loss, wanted in (("l1", 0.5), ("l2", 0.25)):
        method, x = synthesis(training={"loss": loss}), image()
        x0, _ = method.split(x)
        torch.testing.assert_close(method.loss(lambda _, t, x0=x0: x0 + 0.5, x, generator()), torch.tensor(wanted))


def test_seeds_are_averaged():
    one, many = (synthesis(sampling={"steps": 2, "samples": k}) for k in (1, 3))
    network, x = TinyDenoiser(CHANNELS, 1), image()
    g = generator(5)
    singles = torch.stack([one.synthesise(network, x, g) for _ in range(3)])
    torch.testing.assert_close(many.synthesise(network, x, generator(5)), singles.mean(0))


def test_mirrored_image_and_noise_give_the_mirrored_channel(monkeypatch: pytest.MonkeyPatch):
    method, network = synthesis(sampling={"steps": 3}), TinyDenoiser(CHANNELS, 1, kernel=1)
    noise, x = torch.randn(2, 1, *SPACE, generator=generator(7)), image()
    drawn = []
    for axes in ([], [2, 4]):
        monkeypatch.setattr(gaussian, "_normal_like", lambda like, g, axes=axes: noise.flip(axes))
        drawn.append(method.synthesise(network, x.flip(axes), generator()).flip(axes))
    torch.testing.assert_close(*drawn)


def planted(size: int, seed: int, lesion: float) -> Tensor:
    """The target channel is 0.8 a - 0.5 b, and brighter by ``lesion`` in a corner that others do not show."""
    x = image(size, seed)
    x[:, TARGET] = 0.8 * x[:, 0] - 0.5 * x[:, 2]
    x[:, TARGET, :2, :4, :4] += lesion
    return x


@pytest.mark.parametrize("loss", ["l1", "l2"])
def test_what_the_other_channels_do_not_show_stands_out_in_the_residual(loss: str):
    """Learned on images without lesions; on an unseen one the residual is the lesion, and little else."""
    method = synthesis(sampling={"steps": 1}, training={"loss": loss, "noise_end": 0.5})
    network = TinyDenoiser(CHANNELS, 1)
    optimizer, g = torch.optim.Adam(network.parameters(), 1e-2), generator(3)
    for step in range(150):
        optimizer.zero_grad()
        method.loss(network, planted(4, step, 0.0), g).backward()
        optimizer.step()
    x = planted(1, 10_000, lesion=2.0)
    with torch.no_grad():
        drawn = method.synthesise(network, x, g)
    residual = extra_channel(drawn, x[:, TARGET : TARGET + 1], "residual", MAXIMUM)[0, 0]
    lesion = torch.zeros(SPACE, dtype=torch.bool)
    lesion[:2, :4, :4] = True
    assert residual[lesion].median() > 1.5
    assert residual[~lesion].median() < 0.5


# Residual


def test_the_residual_is_the_absolute_difference_up_to_its_bound():
    synthetic = torch.tensor([-20.0, -1.0, 0.0, 2.5, 9.0]).view(1, 1, 5)
    real = torch.tensor([0.0, 1.0, 0.0, 1.0, 0.5]).view(1, 1, 5)
    assert extra_channel(synthetic, real, "residual", MAXIMUM).flatten().tolist() == [8.0, 2.0, 0.0, 1.5, 8.0]
    assert torch.equal(extra_channel(synthetic, real, "synthesis", MAXIMUM), synthetic)


def test_stored_parts_give_back_residual_and_synthesis_within_half_a_level():
    real, synthetic = (torch.randn(1, *SPACE, generator=generator(seed)) for seed in (0, 1))
    parts = to_parts(synthetic, real, MAXIMUM)
    assert parts.shape == (2, *SPACE)
    assert not (parts[0] * parts[1]).any()
    stored = torch.from_numpy(dequantise(quantise(parts.numpy())))
    again = from_parts(stored, real, MAXIMUM)
    half = 0.5 * MAXIMUM / 255
    assert (again - synthetic).abs().max() <= half + 1e-5
    for one, two in ((again, synthetic), (from_parts(parts, real, MAXIMUM), synthetic)):
        both = [extra_channel(x, real, "residual", MAXIMUM) for x in (one, two)]
        assert (both[0] - both[1]).abs().max() <= half + 1e-5


def test_calibration_by_the_models_scale():
    residual = torch.tensor([0.0, 0.2, 0.4, 1.1, 2.0, 5.0]).view(1, 1, 6)
    out = calibrated(residual, ResidualConfig(threshold=0.1), torch.tensor(2.0)).flatten()
    torch.testing.assert_close(out, torch.tensor([0.0, 0.0, 0.1 / 0.9, 0.5, 1.0, 1.0]))
    plain = calibrated(residual, ResidualConfig(threshold=0.0), torch.tensor(2.0)).flatten()
    torch.testing.assert_close(plain, (residual.flatten() / 2).clamp(max=1))


def test_calibration_by_the_window_does_not_see_the_scale_or_other_windows():
    residual = torch.rand(3, 1, *SPACE, generator=generator())
    config = ResidualConfig(normalisation="window", threshold=0.0)
    out = calibrated(residual, config, torch.tensor(7.0))
    assert (out.amin((1, 2, 3, 4)) == 0).all()
    assert (out.amax((1, 2, 3, 4)) == 1).all()
    torch.testing.assert_close(calibrated(3 * residual + 2, config, torch.tensor(1.0)), out)
    torch.testing.assert_close(calibrated(residual[:1], config, torch.tensor(7.0)), out[:1])
    flat = torch.full((1, 1, *SPACE), 0.3)
    assert not calibrated(flat, config, torch.tensor(1.0)).any()


# Segmentation


def method_of(foreground: Foreground = REGIONS, **values: Any) -> ReCoSeg:
    return ReCoSeg(read_settings(ReCoSegConfig, values), foreground, TARGET, CHANNELS, MAXIMUM)


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("channel", ["residual", "synthesis"])
def test_inputs_are_the_channels_and_the_additional_one(keep: bool, channel: str):
    method, x, scale = method_of(keep_target=keep, channel=channel), image(), torch.tensor(2.0)
    extra = image(seed=9)[:, :1].abs()
    inputs = method.inputs(x, extra, scale)
    assert inputs.shape[1] == method.input_channels == CHANNELS + keep
    kept = [0, 1, 2] if keep else [0, 2]
    assert torch.equal(inputs[:, :-1], x[:, kept])
    wanted = extra if channel == "synthesis" else calibrated(extra, method.config.residual, scale)
    assert torch.equal(inputs[:, -1:], wanted)


def test_thresholds_move_the_decision_of_regions_and_of_one_class():
    thresholds = torch.tensor([0.3, 0.8])
    logits = torch.randn(2, 2, *SPACE, generator=generator())
    decided = REGIONS.decide(method_of().shifted(logits, thresholds))
    assert torch.equal(decided, (torch.sigmoid(logits) > thresholds.view(-1, 1, 1, 1)).float())
    logits = torch.randn(2, 2, *SPACE, generator=generator())
    decided = ONE_CLASS.decide(method_of(ONE_CLASS).shifted(logits, torch.tensor([0.3])))
    assert torch.equal(decided, (torch.softmax(logits, 1)[:, 1:] > 0.3).float())


def test_several_classes_still_exclude_each_other_and_a_half_changes_nothing():
    logits = torch.randn(2, 3, *SPACE, generator=generator())
    method = method_of(LABELS)
    torch.testing.assert_close(method.shifted(logits, torch.tensor([0.5, 0.5])), logits)
    low, high = (LABELS.decide(method.shifted(logits, torch.full((2,), tau))) for tau in (0.2, 0.9))
    assert low.sum(1).max() <= 1
    assert (high <= low).all()
    assert high.sum() < low.sum()


def choice_on(
    foreground: Foreground, candidates: list[float], logits: Tensor, reference: Tensor, valid: Tensor
) -> ThresholdChoice:
    choice = threshold_choice(method_of(foreground), candidates)
    choice.add(logits[0], reference[0].bool(), valid[0].bool())
    return choice


def test_the_sweep_finds_each_regions_threshold():
    """The first region is right where p >= 0.3 (0.29 is a false alarm), the second where p >= 0.7."""
    p = torch.tensor([[0.29, 0.31, 0.45, 0.9], [0.2, 0.6, 0.69, 0.71]]).view(1, 2, 4)
    reference = torch.tensor([[0.0, 1, 1, 1], [0, 0, 0, 1]]).view(1, 2, 4)
    sweep = choice_on(REGIONS, [0.1, 0.3, 0.5, 0.7], REGIONS.logits(p), reference, torch.ones(1, 1, 4))
    assert sweep.best() == pytest.approx([0.3, 0.7])


def test_the_sweep_punishes_false_alarms_ignores_what_is_ignored_and_prefers_a_half():
    p = torch.full((1, 1, 4), 0.45)
    one, everywhere, nowhere = Foreground(("a",), exclusive=False), torch.ones(1, 1, 4), torch.zeros(1, 1, 4)
    for reference, valid, tau in (
        (everywhere, everywhere, 0.4),
        (nowhere, everywhere, 0.5),
        (everywhere, nowhere, 0.5),
    ):
        sweep = choice_on(one, [0.3, 0.4, 0.5, 0.6], one.logits(p), reference, valid)
        assert sweep.best() == pytest.approx([tau])


def test_the_dice_of_a_sweep_leaves_out_ignored_voxels_and_counts_an_empty_case_1_unless_there_is_a_false_alarm():
    one, nothing = Foreground(("a",), exclusive=False), [0.0, 0.0, 0.0, 0.0]
    cases = [([0.9, 0.9, 0.2, 0.9], [1.0, 0.0, 1.0, 1.0], 0.5), ([0.2] * 4, nothing, 1.0), ([0.9] * 4, nothing, 0.0)]
    for p, reference, dice in cases:
        p, reference, valid = (torch.tensor(x).view(1, 1, 4) for x in (p, reference, [1.0, 1.0, 1.0, 0.0]))
        sweep = choice_on(one, [0.5], one.logits(p), reference, valid)
        assert sweep.dice([0.5]).tolist() == [dice]


def test_a_region_stays_in_the_one_that_contains_it_whatever_the_thresholds():
    logits = torch.randn(2, 2, *SPACE, generator=generator())
    whole, core = torch.sigmoid(logits).unbind(1)
    decided = NESTED.decide(method_of(NESTED).shifted(logits, torch.tensor([0.8, 0.2])))
    wanted = torch.stack((whole > 0.8, (core > 0.2) & (whole > 0.8)), 1).float()
    assert torch.equal(decided, wanted)
    assert ((core > 0.2) & (whole < 0.8)).any()


@pytest.mark.parametrize("foreground", [REGIONS, NESTED], ids=["free", "nested"])
def test_the_sweep_judges_regions_as_they_are_decided(foreground: Foreground):
    """By itself the whole tumour is best at 0.7 (Dice 8/9, 10/13 at 0.5), which would cut all of the core away."""
    p = torch.tensor([[0.9] * 4 + [0.6] * 4, [0.1] * 4 + [0.9] + [0.1] * 3]).view(1, 2, 8)
    reference = torch.tensor([[1.0] * 5 + [0.0] * 3, [0.0] * 4 + [1.0] + [0.0] * 3]).view(1, 2, 8)
    sweep = choice_on(foreground, [0.5, 0.7], foreground.logits(p), reference, torch.ones(1, 1, 8))
    free = foreground is REGIONS
    assert sweep.dice([0.7, 0.5]).tolist() == pytest.approx([8 / 9, float(free)])
    assert sweep.best() == pytest.approx([0.7 if free else 0.5, 0.5])


def test_exclusive_classes_share_one_threshold():
    logits = torch.randn(1, 3, 40, generator=generator())
    labels = torch.randint(0, 3, (1, 1, 40), generator=generator())
    sweep = choice_on(LABELS, [0.2, 0.4, 0.6], logits, *LABELS.from_target(labels.float()))
    assert len(set(sweep.best())) == 1


# Network


def network_of(**values: Any) -> ReCoSegNetwork:
    method = method_of(**values)
    drawn = SynthesisNetwork(TinyDenoiser(CHANNELS, 1, seed=1), synthesis(sampling={"steps": 2}))
    with torch.random.fork_rng():
        torch.manual_seed(2)
        segmenter = nn.Conv3d(method.input_channels, REGIONS.heads, 3, padding=1)
    network = ReCoSegNetwork(drawn, segmenter, method, torch.tensor([0.3, 0.6]), axes=(0, 2)).eval()
    network.scale.fill_(1.5)
    return network


@pytest.mark.parametrize("values", [{}, {"channel": "synthesis"}, {"residual": {"normalisation": "window"}}])
def test_prediction_forms_the_same_input_as_training_does_from_what_is_stored(values: dict[str, Any]):
    """Image -> logits equals image and stored synthesis -> logits, mirrored and at the model's thresholds."""
    network, x = network_of(**values), image(1)
    drawn, real = network.synthesis.synthesise(x), network.synthesis.real(x)
    stored = dequantise(quantise(to_parts(drawn[0], real[0], MAXIMUM).detach().numpy()))
    again = from_parts(torch.from_numpy(stored), real[0], MAXIMUM)[None]
    stacked = torch.cat((x, network.method.extra(again, real)), 1)
    with torch.no_grad():
        trained = network.method.shifted(StoredChannelNetwork(network)(stacked), network.thresholds)
        torch.testing.assert_close(network(x), trained, atol=0.05, rtol=0)
        assert not torch.allclose(network(stacked), trained, atol=0.05)


def test_the_synthesis_is_frozen_and_deterministic_and_each_window_is_drawn_alike():
    network, x = network_of().train(), image(1)
    assert not network.synthesis.training
    assert not any(p.requires_grad for p in network.synthesis.parameters())
    both = network(torch.cat((x, x)))
    torch.testing.assert_close(both[0], both[1])
    assert torch.equal(both, network(torch.cat((x, x))))


def test_the_real_channel_matters_only_where_it_is_kept_or_compared():
    network, x = network_of(channel="synthesis", keep_target=False), image(1)
    other = x.clone()
    other[:, TARGET] += 1
    assert torch.equal(network(x), network(other))
    network = network_of(keep_target=False)
    assert not torch.equal(network(x), network(other))


def test_a_synthesis_network_does_not_segment_and_refuses_broken_images():
    network = SynthesisNetwork(TinyDenoiser(CHANNELS, 1), synthesis())
    with pytest.raises(NotImplementedError, match="-tr ReCoSegTrainer"):
        network(image())
    broken = image()
    broken[0, 0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        network.synthesise(broken)


# Settings


@pytest.mark.parametrize(("method", "cls"), [("recoseg", ReCoSegConfig), ("recoseg_synthesis", SynthesisConfig)])
def test_presets_are_the_defaults_and_the_literal_form_can_be_read(method: str, cls: type):
    assert read_settings(cls, preset(method)) == cls()
    block = {"paper_literal": True}
    literal = read_settings(cls, merge(shipped_settings(method, block), block))
    assert literal == replace(literal, paper_literal=True) != cls()


@pytest.mark.parametrize(
    ("cls", "values", "match"),
    [
        (SynthesisConfig, {"chanel": "T1"}, "Unknown diffrefine setting 'chanel'. Nearest valid one: 'channel'"),
        (SynthesisConfig, {"sampling": {"steps": 11}, "process": {"timesteps": 10}}, "at most process.timesteps, 10"),
        (SynthesisConfig, {"training": {"minimum_rate": 1.0}}, "training.minimum_rate"),
        (SynthesisConfig, {"maximum": 0}, "'maximum' is 0"),
        (ReCoSegConfig, {"channel": "both"}, "channel"),
        (ReCoSegConfig, {"residual": {"threshold": 1.0}}, "residual.threshold"),
        (ReCoSegConfig, {"decision": {"candidates": []}}, "decision.candidates"),
    ],
)
def test_settings_that_cannot_be_used_are_named(cls: type, values: dict[str, Any], match: str):
    with pytest.raises(ConfigError, match=match):
        read_settings(cls, values)


@pytest.mark.parametrize("spelling", ["T1ce", "T1CE", "t1-Gd", "T1c", "T1_Post"])
def test_the_channel_is_found_by_any_of_its_names(spelling: str):
    assert settings.find_channel("T1ce", {"channel_names": {"0": "FLAIR", "1": "T1", "2": spelling}}) == 2


@pytest.mark.parametrize(
    ("names", "match"),
    [
        ({"0": "MRI"}, "'channel' is 'T1ce'.*others, but dataset.json has MRI"),
        ({"0": "T1", "1": "T2"}, "no channel of that name; dataset.json has T1, T2"),
        ({"0": "T1ce", "1": "t1gd"}, "several"),
    ],
)
def test_a_data_set_without_the_channel_is_refused_by_the_settings_name(names: dict[str, str], match: str):
    with pytest.raises(ConfigError, match=match):
        settings.find_channel("T1ce", {"channel_names": names})
