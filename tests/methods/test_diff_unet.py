"""Diff-UNet: no prior, and the fusion of steps and runs by their uncertainty (Xing et al. 2023)."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from nnunet_diffrefine.batch import Foreground
from nnunet_diffrefine.config import ConfigError
from nnunet_diffrefine.methods.diff_unet import DiffUNet
from nnunet_diffrefine.networks.refinement import RefinementNetwork
from tests.builders import LABELS, TinyDenoiser, batch_of, generator, nnunet_loss
from tests.methods.rediffinet_family import NESTED, Recording, denoiser_of, errors_left, preset_of

BOTH = pytest.mark.parametrize("foreground", [LABELS, NESTED], ids=["labels", "regions"])
FORMS = pytest.mark.parametrize("literal", [False, True], ids=["sound", "literal"])
FLAT = {"deep_supervision": False}


def diff_unet(foreground: Foreground, literal: bool = False, **changes: dict) -> DiffUNet:
    return preset_of(foreground, "diff_unet", literal, **changes)


def estimates_of(foreground: Foreground, runs: int, steps: int, seed: int = 0) -> list[list[Tensor]]:
    logits = 2 * torch.randn(runs, steps, 2, foreground.heads, 3, 3, 3, generator=generator(seed))
    return [[foreground.probabilities(step) for step in run] for run in logits]


def voxel(*probabilities: float) -> Tensor:
    return torch.tensor(probabilities).view(1, -1, 1, 1, 1)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


@BOTH
def test_the_prior_is_not_looked_at(foreground: Foreground) -> None:
    method, batch = diff_unet(foreground, training=FLAT), batch_of(foreground, size=4)
    denoiser = denoiser_of(method)
    other = replace(batch, prior=batch.prior.flip(0, 2))
    assert method.condition_channels(3) == 3
    refined = [method.refine(denoiser, b.image, b.prior, generator()) for b in (batch, other)]
    assert torch.equal(*refined)
    losses = [method.loss(denoiser, b, nnunet_loss(foreground), generator()) for b in (batch, other)]
    assert torch.equal(*losses)


@BOTH
def test_windows_in_which_stage_one_sees_nothing_are_segmented_too(foreground: Foreground) -> None:
    class Blind(nn.Module):
        def forward(self, image: Tensor) -> Tensor:
            logits = torch.full((len(image), foreground.heads, *image.shape[2:]), -30.0)
            logits[:, : int(foreground.exclusive)] = 30.0
            return logits

    method, batch = diff_unet(foreground), batch_of(foreground, size=1)
    denoiser = denoiser_of(method)
    network = RefinementNetwork(Blind(), denoiser, method, foreground, method.config.sampling)
    expected = method.refine(denoiser, batch.image, torch.zeros_like(batch.prior), generator())
    torch.testing.assert_close(network(batch.image), expected)


@BOTH
@FORMS
def test_all_runs_and_steps_are_fused(foreground: Foreground, literal: bool) -> None:
    method = diff_unet(foreground, literal, sampling={"steps": 3, "samples": 2})
    batch = batch_of(foreground)
    denoiser = Recording(TinyDenoiser(*method.channels(1)))
    refined = foreground.probabilities(method.refine(denoiser, batch.image, batch.prior, generator()))
    assert [int(t[0]) for t in denoiser.times] == [1000, 666, 333]
    assert not torch.equal(*denoiser.inputs[0].chunk(2))
    outputs = [foreground.probabilities(output).chunk(2) for output in denoiser.outputs]
    expected = method.fused([list(run) for run in zip(*outputs, strict=True)])
    torch.testing.assert_close(refined, expected, atol=5e-4, rtol=0)


def test_two_steps_by_hand() -> None:
    """Binary entropies in bits: 0.4690 at 0.1, 1 at 0.5; sigmoid(1 / 2) and sigmoid(1) for steps 1 and 2 of 2."""
    region = Foreground(("whole",), exclusive=False)
    entropy = -(0.1 * math.log2(0.1) + 0.9 * math.log2(0.9))
    w = [math.exp(sigmoid(0.5) * (1 - entropy)), math.exp(sigmoid(1.0) * 0)]
    fused = diff_unet(region).fused([[voxel(0.1), voxel(0.5)]])
    torch.testing.assert_close(fused, voxel((w[0] * 0.1 + w[1] * 0.5) / sum(w)))
    classes = diff_unet(LABELS).fused([[voxel(0.0, 1.0), voxel(1 / 3, 1 / 3)]])
    w = [math.exp(sigmoid(0.5)), 1.0]
    torch.testing.assert_close(classes, voxel(w[1] / 3 / sum(w), (w[0] + w[1] / 3) / sum(w)))


def test_the_literal_form_decides_as_the_code_does() -> None:
    """One-sided, floored entropy; unnormalised sum of weighted x_0 in [-1, 1] over steps and runs, cut at 0."""
    runs = estimates_of(NESTED, runs=4, steps=10)
    total = torch.zeros_like(runs[0][0])
    for i in range(10):
        s = torch.stack([run[i] for run in runs]).mean(0)
        s[s < 0.001] = 0.001
        w = torch.exp(torch.sigmoid(torch.tensor((i + 1) / 10)) * (1 + s * torch.log(s)))
        for run in runs:
            total += w * (2 * run[i] - 1)
    fused = diff_unet(NESTED, literal=True).fused(runs)
    assert torch.equal(fused > 0.5, total > 0)
    assert 0.2 < (total > 0).float().mean() < 0.8


@BOTH
@FORMS
def test_agreeing_steps_are_left_as_they_are(foreground: Foreground, literal: bool) -> None:
    p = estimates_of(foreground, 1, 1)[0][0]
    if literal and foreground.exclusive:  # channels are weighted one by one, but all steps alike
        p = p.clamp(0.01, 0.49)
    torch.testing.assert_close(diff_unet(foreground, literal).fused([[p] * 3] * 2), p)


@BOTH
@FORMS
def test_the_result_is_a_distribution_between_the_steps(foreground: Foreground, literal: bool) -> None:
    runs = estimates_of(foreground, runs=2, steps=5)
    fused = diff_unet(foreground, literal).fused(runs)
    assert fused.min() >= 0
    if foreground.exclusive:
        assert fused.sum(1).max() <= 1 + 1e-6
    if not (literal and foreground.exclusive):  # rescaling may leave the range
        means = torch.stack([torch.stack(step).mean(0) for step in zip(*runs, strict=True)])
        assert (fused >= means.amin(0) - 1e-6).all()
        assert (fused <= means.amax(0) + 1e-6).all()


def test_only_the_sound_entropy_treats_foreground_and_background_alike() -> None:
    """Fusing the complements is the complement of fusing; with classes, their order does not matter."""
    runs = estimates_of(NESTED, runs=2, steps=4)
    complements = [[1 - p for p in run] for run in runs]
    sound, literal = diff_unet(NESTED), diff_unet(NESTED, literal=True)
    torch.testing.assert_close(sound.fused(complements), 1 - sound.fused(runs))
    assert (literal.fused(complements) - (1 - literal.fused(runs))).abs().max() > 0.01
    runs = estimates_of(LABELS, runs=2, steps=4)
    for exchanged in ([1, 0, 2], [2, 1, 0]):  # the background with either class
        others = [[torch.cat((1 - p.sum(1, True), p), 1)[:, exchanged][:, 1:] for p in run] for run in runs]
        fused = diff_unet(LABELS).fused(runs)
        expected = torch.cat((1 - fused.sum(1, True), fused), 1)[:, exchanged][:, 1:]
        torch.testing.assert_close(diff_unet(LABELS).fused(others), expected)


@FORMS
def test_surer_and_later_steps_count_more(literal: bool) -> None:
    method = diff_unet(Foreground(("whole",), exclusive=False), literal)
    surer = method.fused([[voxel(0.98), voxel(0.4)]])
    assert surer > method.fused([[voxel(0.58), voxel(0.0)]]) + 0.01  # the same plain mean
    late, early = method.fused([[voxel(0.2), voxel(0.8)]]), method.fused([[voxel(0.8), voxel(0.2)]])
    assert late > early


@BOTH
def test_it_learns_to_segment(foreground: Foreground) -> None:
    assert errors_left(foreground, "diff_unet") < 0.5


def test_the_prior_is_refused_as_a_condition() -> None:
    with pytest.raises(ConfigError, match=r"condition\.prior.*diff_unet needs 'none'"):
        diff_unet(LABELS, condition={"prior": "soft"})
