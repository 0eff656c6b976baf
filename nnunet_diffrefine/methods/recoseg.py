"""ReCoSeg++ (Yavari, Pandya, Furst, August 2025): segmentation guided by what a cross-modal synthesis gets wrong.

Stage 1, section 3.1: a conditional diffusion model draws one MRI channel x_0 (T1ce) from the others, c:

    x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) epsilon,    network(x_t, c, t) -> x_0 or epsilon    (Eq. 2-5)

Residual: R = |x_hat_0 - x_0| (Eq. 7), thresholded and scaled to [0, 1].
Stage 2, section 3.2: a U-Net segments the other channels, the real one unless dropped, and R (Eq. 8). DDMM-Synth
(https://arxiv.org/abs/2303.15770), as the paper uses it for comparison, puts x_hat_0 in R's place.

Departures, with reasons, in docs/methods/recoseg.md: the loss is L1 or L2 where Eq. 6 has BCE and Dice of
intensities; residuals of training cases are out-of-fold. Intensities are nnU-Net's, in standard deviations (SD).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from nnunet_diffrefine.batch import Foreground
from nnunet_diffrefine.diffusion import GaussianProcess, sample
from nnunet_diffrefine.errors.maps import enforce_nesting
from nnunet_diffrefine.methods.base import draw_times
from nnunet_diffrefine.methods.recoseg_settings import ReCoSegConfig, ResidualConfig, SynthesisConfig

Denoiser = Callable[[Tensor, Tensor], Tensor]
LOSSES = {"l1": F.l1_loss, "l2": F.mse_loss}


class Synthesis:
    """Conditional diffusion of one image channel from the others.

    Args:
        config: settings.
        target: index of the synthesised channel.
        image_channels: C, at least 2.
    """

    trainer: ClassVar[str] = "ReCoSegSynthesisTrainer"

    def __init__(self, config: SynthesisConfig, target: int, image_channels: int) -> None:
        self.config, self.target, self.image_channels = config, target, image_channels
        p = config.process
        self.process = GaussianProcess(p.timesteps, p.schedule, p.input_scale, config.sampling.eta)

    @property
    def channels(self) -> tuple[int, int]:
        """Condition and x_t in; x_0 or epsilon out."""
        return self.image_channels, 1

    def split(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Image (B, C, *S) -> real channel x_0 (B, 1, *S) and condition c (B, C - 1, *S)."""
        return image[:, self.target : self.target + 1], without(image, self.target)

    def loss(self, denoiser: Denoiser, image: Tensor, generator: torch.Generator) -> Tensor:
        """Mean error of the predicted channel or noise (Eq. 4) at a drawn time, of images (B, C, *S)."""
        x0, c = self.split(image)
        t = draw_times(len(image), self.process.timesteps, self.config.training.noise_end, generator)
        noise = torch.randn(x0.shape, generator=generator, device=x0.device, dtype=x0.dtype)
        output = denoiser(torch.cat((c, self.process.marginal_with(x0, noise, t)), 1), t).float()
        target = self.process.training_target(self.config.process.prediction, x0, noise, t)
        return LOSSES[self.config.training.loss](output, target)

    def synthesise(self, denoiser: Denoiser, image: Tensor, generator: torch.Generator) -> Tensor:
        """The channel (B, 1, *S) in SD, drawn from the others; the real one in ``image`` (B, C, *S) is not read."""
        c = without(image, self.target)
        clip, kind = self.config.sampling.clip, self.config.process.prediction

        def predict_x0(x_t: Tensor, t: Tensor) -> Tensor:
            output = denoiser(torch.cat((c, x_t), 1), t).float()
            return self.process.predicted_x0(kind, output, x_t, t).clamp(-clip, clip)

        shape, sampling = torch.zeros_like(c[:, :1]), self.config.sampling
        draws = [sample(self.process, predict_x0, shape, sampling.steps, generator) for _ in range(sampling.samples)]
        return torch.stack(draws).mean(0)


def without(image: Tensor, channel: int) -> Tensor:
    """Image (B, C, *S) less one channel, (B, C - 1, *S)."""
    return torch.cat((image[:, :channel], image[:, channel + 1 :]), 1)


# The residual


def to_parts(synthetic: Tensor, real: Tensor, maximum: float) -> Tensor:
    """What is stored of a case: excess and deficit of the synthetic channel in units of ``maximum``, (2, *S) in [0, 1].

    Two channels keep the sign, so both R and the synthetic channel can be had from them, and 0 is exact in 8 bits.
    Differences above ``maximum`` SD are clipped. ``synthetic`` and ``real`` are (1, *S).
    """
    difference = (synthetic - real) / maximum
    return torch.cat((difference, -difference)).clamp(0, 1)


def from_parts(parts: Tensor, real: Tensor, maximum: float) -> Tensor:
    """The synthetic channel (1, *S) of stored ``parts`` (2, *S) and the ``real`` channel (1, *S); inverts to_parts."""
    return real + maximum * (parts[:1] - parts[1:])


def extra_channel(synthetic: Tensor, real: Tensor, kind: str, maximum: float) -> Tensor:
    """The additional channel in SD: R (Eq. 7), at most ``maximum``, or the synthetic channel; any equal shapes."""
    return synthetic if kind == "synthesis" else (synthetic - real).abs().clamp(max=maximum)


def calibrated(residual: Tensor, config: ResidualConfig, scale: Tensor) -> Tensor:
    """Min-max normalisation and threshold calibration: R (B, 1, *S) in SD -> (B, 1, *S) in [0, 1].

    u = clip((R - low) / (high - low)), result = clip((u - tau) / (1 - tau)). The bounds are 0 and ``scale`` (the
    model's own), or each window's minimum and maximum; a window without any range gives 0.
    """
    low, high = torch.zeros_like(scale), scale
    if config.normalisation == "window":
        axes = tuple(range(1, residual.ndim))
        low, high = residual.amin(axes, keepdim=True), residual.amax(axes, keepdim=True)
    u = ((residual - low) / (high - low).clamp(min=1e-6)).clamp(0, 1)
    return ((u - config.threshold) / (1 - config.threshold)).clamp(0, 1)


# Segmentation


class ReCoSeg:
    """Inputs of the segmentation network, and its decision.

    Args:
        config: settings.
        foreground: meaning of the R foreground channels.
        target: index of the synthesised channel.
        image_channels: C.
        maximum: largest residual in SD, as it was stored.
    """

    trainer: ClassVar[str] = "ReCoSegTrainer"

    def __init__(
        self, config: ReCoSegConfig, foreground: Foreground, target: int, image_channels: int, maximum: float
    ) -> None:
        self.config, self.foreground, self.maximum = config, foreground, maximum
        self.target, self.image_channels = target, image_channels

    @property
    def input_channels(self) -> int:
        """Channels of :meth:`inputs`."""
        return self.image_channels + int(self.config.keep_target)

    def extra(self, synthetic: Tensor, real: Tensor) -> Tensor:
        """The additional channel in SD."""
        return extra_channel(synthetic, real, self.config.channel, self.maximum)

    def inputs(self, image: Tensor, extra: Tensor, scale: Tensor) -> Tensor:
        """X_seg (Eq. 8): image (B, C, *S), with or without the real channel, and the calibrated ``extra``."""
        if self.config.channel == "residual":
            extra = calibrated(extra, self.config.residual, scale)
        kept = image if self.config.keep_target else without(image, self.target)
        return torch.cat((kept, extra.to(kept)), 1)

    def shifted(self, logits: Tensor, thresholds: Tensor) -> Tensor:
        """Logits (B, H, *S) whose ordinary decision is that of ``logits`` at ``thresholds`` (R,) in (0, 1).

        Exact for regions, sigmoid(z) > tau there and in every region that contains them, and for one class, p > tau;
        with several exclusive classes, the class of the largest p / p_background wins if that exceeds tau / (1 - tau).
        """
        shift = torch.logit(thresholds.to(logits))
        if self.foreground.exclusive:
            shift = torch.cat((shift.new_zeros(1), shift))
        shifted = logits - shift.view(-1, *([1] * (logits.ndim - 2)))
        parents = self.foreground.parents
        return enforce_nesting(shifted, parents) if parents else shifted
