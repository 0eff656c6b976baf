"""The bridge from the prior to the reference: the project's first method.

With the error E = x_0 - p of stage one's probabilities p against the reference x_0, the state is

    x_t = p + a_t E,    a_0 = 1, a_T = 0,

as it stands (deterministic) or as its Bernoulli / categorical draw (discrete). It ends at the prior, not at noise, so
sampling starts from stage one and the first step is an ordinary correction; later steps can only build on it. The
denoiser sees image, p and x_t and outputs the logits of the corrected mask, trained with nnU-Net's own loss.

Relatives: HiDiff (binary, https://arxiv.org/abs/2407.03548), SegRefiner (https://arxiv.org/abs/2312.12425), Cold
Diffusion (deterministic states, https://arxiv.org/abs/2208.09392).
"""

from __future__ import annotations

import torch
from torch import Tensor

from nnunet_diffrefine.batch import Foreground, RefineBatch
from nnunet_diffrefine.config import ConfigError, RefineConfig
from nnunet_diffrefine.diffusion import from_config, sample
from nnunet_diffrefine.methods.base import (
    AbstractRefineMethod,
    Denoiser,
    SegmentationLoss,
    draw_times,
    finest,
    recycle,
)


class Bridge(AbstractRefineMethod):
    """Corrected-mask prediction along a bridge that ends at the prior."""

    trainer = "DiffRefineTrainer"

    def __init__(self, config: RefineConfig, foreground: Foreground) -> None:
        super().__init__(config, foreground)
        if config.process.kind != "bridge":
            raise ConfigError("diffrefine setting 'process.kind': the method bridge needs 'bridge'.")
        self.process = from_config(config.process, foreground.exclusive, config.sampling.eta)

    def channels(self, image_channels: int) -> tuple[int, int]:
        """Image, prior and state in; nnU-Net's heads out."""
        return image_channels + 2 * self.foreground.channels, self.foreground.heads

    def loss(
        self, denoiser: Denoiser, batch: RefineBatch, segmentation_loss: SegmentationLoss, generator: torch.Generator
    ) -> Tensor:
        """nnU-Net's loss of the corrected mask at a drawn time; the ignore label has no error."""
        training, timesteps = self.config.training, self.process.timesteps
        image, prior = batch.image, batch.prior
        t = draw_times(len(image), timesteps, training.prior_end, generator)

        def own_prediction(rows: Tensor) -> Tensor:
            end = self.process.start(prior[rows], generator)
            return self.predict(denoiser, image[rows], prior[rows], end, torch.full_like(t[rows], timesteps))[0]

        x0 = recycle(batch.reference, t, timesteps, training.recycling, own_prediction, generator)
        x0 = torch.where(batch.valid > 0, x0, prior)
        x_t = self.process.marginal(x0, prior, t, generator)
        return segmentation_loss(denoiser(torch.cat((image, prior, x_t), 1), t), batch.target)

    def predict(
        self, denoiser: Denoiser, image: Tensor, prior: Tensor, x_t: Tensor, t: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Predicted x_0 (B, R, *S) in [0, 1] and its logits (B, H, *S)."""
        logits = finest(denoiser(torch.cat((image, prior, x_t), 1), t))
        return self.foreground.probabilities(logits), logits

    def refine(self, denoiser: Denoiser, image: Tensor, prior: Tensor, generator: torch.Generator) -> Tensor:
        """Logits after the set number of steps, averaged in probability over the seeds."""
        sampling, last = self.config.sampling, {}

        def predict_x0(x_t: Tensor, t: Tensor) -> Tensor:
            x0, last["logits"] = self.predict(denoiser, image, prior, x_t, t)
            return x0

        draws = [sample(self.process, predict_x0, prior, sampling.steps, generator) for _ in range(self.seeds)]
        return last["logits"] if self.seeds == 1 else self.foreground.logits(torch.stack(draws).mean(0))

    @property
    def seeds(self) -> int:
        """K; a deterministic state has nothing to average."""
        return 1 if self.config.process.state == "deterministic" else self.config.sampling.samples
