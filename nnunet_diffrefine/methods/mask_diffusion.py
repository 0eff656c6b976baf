"""Gaussian diffusion of the mask, conditioned on image and prior: the second process behind the same interface.

x_0 is the reference in {-1, 1} times the input scale; the denoiser sees image, prior and x_t and predicts x_0 (as
segmentation logits, trained with nnU-Net's loss), epsilon or v (mean squared error). UA-Diffusion of Re-DiffiNet
(https://arxiv.org/abs/2402.07354) is the x_0 form with a hard prior.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nnunet_diffrefine.batch import Foreground, RefineBatch
from nnunet_diffrefine.config import ConfigError, RefineConfig
from nnunet_diffrefine.diffusion import GaussianProcess, sample
from nnunet_diffrefine.methods.base import (
    AbstractRefineMethod,
    Denoiser,
    SegmentationLoss,
    draw_times,
    finest,
    recycle,
)


class MaskDiffusion(AbstractRefineMethod):
    """Conditional Gaussian diffusion of the reference mask."""

    trainer = "DiffRefineTrainer_MaskDiffusion"

    def __init__(self, config: RefineConfig, foreground: Foreground) -> None:
        super().__init__(config, foreground)
        self.prediction = config.process.prediction
        if config.process.kind != "gaussian":
            raise ConfigError("diffrefine setting 'process.kind': mask_diffusion needs 'gaussian'.")
        if self.prediction != "x0" and config.training.deep_supervision:
            raise ConfigError("diffrefine setting 'training.deep_supervision' must be false to predict epsilon or v.")
        if self.prediction != "x0" and config.training.recycling > 0:  # its noise would lead to the prediction, not x_0
            raise ConfigError("diffrefine setting 'training.recycling' must be 0 to predict epsilon or v.")
        p = config.process
        self.process = GaussianProcess(p.timesteps, p.schedule, p.input_scale, config.sampling.eta)

    def channels(self, image_channels: int) -> tuple[int, int]:
        """Image, prior and x_t in; heads (x0) or foreground channels (epsilon, v) out."""
        outputs = self.foreground.heads if self.prediction == "x0" else self.foreground.channels
        return image_channels + 2 * self.foreground.channels, outputs

    def loss(
        self, denoiser: Denoiser, batch: RefineBatch, segmentation_loss: SegmentationLoss, generator: torch.Generator
    ) -> Tensor:
        """Segmentation loss of x_0, or masked mean squared error of epsilon or v."""
        training, timesteps = self.config.training, self.process.timesteps
        image, prior = batch.image, batch.prior
        t = draw_times(len(image), timesteps, training.prior_end, generator)

        def own_prediction(rows: Tensor) -> Tensor:
            x_T = self.process.start(prior[rows], generator)
            return self.predict(denoiser, image[rows], prior[rows], x_T, torch.full_like(t[rows], timesteps))

        clean = self.scaled(torch.where(batch.valid > 0, batch.reference, prior))
        x0 = recycle(clean, t, timesteps, training.recycling, own_prediction, generator)
        noise = torch.randn(x0.shape, generator=generator, device=x0.device, dtype=x0.dtype)
        x_t = self.process.marginal_with(x0, noise, t)
        output = denoiser(torch.cat((image, prior, x_t), 1), t)
        if self.prediction == "x0":
            return segmentation_loss(output, batch.target)
        target = self.process.training_target(self.prediction, x0, noise, t)
        error = (finest(output).float() - target) ** 2 * batch.valid
        return error.sum() / (batch.valid.sum() * error.shape[1]).clamp(min=1)

    def scaled(self, probabilities: Tensor) -> Tensor:
        """Probabilities in [0, 1] to the process' variable in [-1, 1]."""
        return 2 * probabilities - 1

    def predict(self, denoiser: Denoiser, image: Tensor, prior: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Predicted x_0 (B, R, *S) in [-1, 1]."""
        output = finest(denoiser(torch.cat((image, prior, x_t), 1), t)).float()
        if self.prediction == "x0":
            return self.scaled(self.foreground.probabilities(output))
        return self.process.predicted_x0(self.prediction, output, x_t, t).clamp(-1, 1)

    def refine(self, denoiser: Denoiser, image: Tensor, prior: Tensor, generator: torch.Generator) -> Tensor:
        """Mean over the seeds of the sampled mask, as logits."""
        sampling = self.config.sampling
        draws = [
            sample(
                self.process, lambda x, t: self.predict(denoiser, image, prior, x, t), prior, sampling.steps, generator
            )
            for _ in range(sampling.samples)
        ]
        return self.foreground.logits((torch.stack(draws).mean(0) + 1) / 2)
