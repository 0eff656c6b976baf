"""Gaussian diffusion of the mask: its noise, its scale, and what the denoiser may predict."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from nnunet_diffrefine.batch import Foreground, RefineBatch
from nnunet_diffrefine.config import ConfigError, RefineConfig
from nnunet_diffrefine.methods.mask_diffusion import MaskDiffusion
from tests.builders import LABELS, REGIONS, TinyDenoiser, batch_of, generator, method_of, nnunet_loss, with_ignore

T = 8
BOTH = pytest.mark.parametrize("foreground", [LABELS, REGIONS], ids=["labels", "regions"])
FLAT = {"deep_supervision": False}


def diffusion(
    foreground: Foreground, prediction: str = "x0", scale: float = 0.5, sampling: dict | None = None, **training: object
) -> MaskDiffusion:
    process = {"kind": "gaussian", "timesteps": T, "schedule": "cosine", "prediction": prediction, "input_scale": scale}
    return method_of(
        foreground, "mask_diffusion", process=process, sampling=sampling or {}, training={**FLAT, **training}
    )


def states(method: MaskDiffusion, batch: RefineBatch, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """What the training pass got: image and prior, x_t, t."""
    seen: list[tuple[Tensor, Tensor]] = []
    network = TinyDenoiser(*method.channels(1))

    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        seen.append((x.detach(), t))
        return network(x, t)

    method.loss(denoiser, batch, nnunet_loss(method.foreground), generator(seed))
    x, t = seen[-1]
    return x[:, :-2], x[:, -2:], t


@BOTH
@pytest.mark.parametrize("scale", [0.25, 1.0])
def test_states_are_scaled_masks_in_standard_noise(foreground: Foreground, scale: float) -> None:
    foreground = with_ignore(foreground)
    method, batch = diffusion(foreground, scale=scale, recycling=0.0, prior_end=0.0), batch_of(foreground, size=24)
    condition, x_t, t = states(method, batch)
    assert torch.equal(condition, torch.cat((batch.image, batch.prior), 1))
    assert len(t.unique()) >= 6
    share = method.process.alpha_bar(t).view(-1, 1, 1, 1, 1).float()
    # no reference where it is to be ignored: the prior stands in, so that nothing wrong is learned there
    clean = scale * (2 * torch.where(batch.valid > 0, batch.reference, batch.prior) - 1)
    noise = (x_t - share.sqrt() * clean) / (1 - share).sqrt()
    for part in (noise, noise[:, :, :2], noise[:, :, 2:], noise[batch.reference > 0], noise[t == t.min()]):
        error = part.numel() ** -0.5
        assert abs(part.mean()) < 4 * error
        assert abs(part.std() - 1) < 4 * error


@BOTH
@pytest.mark.parametrize("recycling", [0.0, 1.0])
def test_recycling_hides_the_reference(foreground: Foreground, recycling: float) -> None:
    method, batch = diffusion(foreground, recycling=recycling, prior_end=0.0), batch_of(foreground, size=8)
    other = replace(batch, reference=batch.reference.flip(2))
    (_, first, t), (_, second, _) = states(method, batch), states(method, other)
    assert (t < T).sum() >= 5
    assert torch.equal(first[t < T], second[t < T]) == (recycling == 1.0)


@BOTH
@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_the_error_is_a_mean_over_valid_voxels(foreground: Foreground, prediction: str) -> None:
    """A constant error c has a mean squared error of c squared, however many voxels are ignored."""
    foreground = with_ignore(foreground)
    method, batch = diffusion(foreground, prediction, recycling=0.0), batch_of(foreground, size=4)
    targets: list[Tensor] = []

    def network(x: Tensor, t: Tensor) -> Tensor:
        clean = method.to_state(torch.where(batch.valid > 0, batch.reference, batch.prior)) * 0.5
        share = method.process.alpha_bar(t).view(-1, 1, 1, 1, 1).float()
        noise = (x[:, -2:] - share.sqrt() * clean) / (1 - share).sqrt()
        targets.append(noise if prediction == "epsilon" else share.sqrt() * noise - (1 - share).sqrt() * clean)
        return targets[-1] + 0.3 * batch.valid + 9 * (1 - batch.valid)

    loss = method.loss(network, batch, nnunet_loss(foreground), generator())
    torch.testing.assert_close(loss, torch.tensor(0.09), atol=1e-4, rtol=0)


@BOTH
@pytest.mark.parametrize("prediction", ["x0", "epsilon", "v"])
def test_samples_are_averaged(foreground: Foreground, prediction: str) -> None:
    batch = batch_of(foreground)
    method = diffusion(foreground, prediction, sampling={"samples": 3, "steps": 1})
    network = TinyDenoiser(*method.channels(1))
    seen: list[tuple[Tensor, Tensor]] = []

    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        seen.append((x, t))
        return network(x, t)

    refined = method.refine(denoiser, batch.image, batch.prior, generator())
    ((x, t),) = seen
    first, second, _ = x.chunk(3)
    assert not torch.equal(first, second)
    samples = method.predicted(network(x, t), x[:, -2:], t).chunk(3)
    assert all(sample.min() >= -1 and sample.max() <= 1 for sample in samples)
    mean = ((torch.stack(samples).mean(0) + 1) / 2).clamp(0, 1)
    if prediction == "x0":
        torch.testing.assert_close(foreground.probabilities(refined), mean, atol=5e-4, rtol=0)
    else:  # channels predicted one by one need not add up
        torch.testing.assert_close(refined, foreground.independent_logits(mean), atol=1e-3, rtol=0)


def test_the_start_is_standard_noise_without_the_prior() -> None:
    method, batch = diffusion(REGIONS), batch_of(REGIONS, size=16)
    seen: list[Tensor] = []
    network = TinyDenoiser(*method.channels(1))
    for prior in (batch.prior, 1 - batch.prior):
        method.refine(lambda x, t: seen.append(x) or network(x, t), batch.image, prior, generator())
    first, second = (x[:, -2:] for x in seen)
    assert torch.equal(first, second)
    error = first.numel() ** -0.5
    assert abs(first.mean()) < 4 * error
    assert abs(first.std() - 1) < 4 * error


@BOTH
def test_channels_follow_the_prediction(foreground: Foreground) -> None:
    assert diffusion(foreground).channels(3) == (3 + 4, foreground.heads)
    for prediction in ("epsilon", "v"):
        assert diffusion(foreground, prediction).channels(3) == (3 + 4, 2)


def test_what_cannot_work_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"process.kind.*needs 'gaussian'"):
        MaskDiffusion(RefineConfig(), LABELS)
    for prediction in ("epsilon", "v"):
        with pytest.raises(ConfigError, match=r"training.deep_supervision.*false"):
            diffusion(LABELS, prediction, deep_supervision=True)
    assert diffusion(LABELS, "x0", deep_supervision=True)


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_predicted_noise_refuses_recycling(prediction: str) -> None:
    """Its noise would lead from the state to the model's own prediction, not to the reference."""
    process = {"kind": "gaussian", "prediction": prediction}
    with pytest.raises(ConfigError, match="training.recycling"):
        RefineConfig.from_dict({"process": process, "training": {**FLAT, "recycling": 0.5}})
