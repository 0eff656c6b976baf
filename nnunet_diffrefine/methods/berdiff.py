"""BerDiff (Chen et al. 2023): Bernoulli diffusion of the mask given the image; the denoiser predicts the flips.

    x_t = x_0 XOR epsilon,    epsilon ~ Bernoulli((1 - a_t) / 2),    x_T a fair coin
    x_hat_0 = |x_t - epsilon_hat|,    epsilon_hat = sigmoid((1 - 2 x_t) denoiser(I, x_t, t))
    calibration: p(x_{t-1} | x_t) = theta(x_t, x_hat_0), the posterior of the process
    loss = KL(theta(x_t, x_0) || theta(x_t, x_hat_0)) + lambda BCE(epsilon, epsilon_hat)

The paper puts the soft x_hat_0 into theta. The KL is then smallest at p(x_0 | I), which has not weighed x_t, the BCE at
p(x_0 | I, x_t): two optima. The default mixes the posteriors of both clean values instead, whose KL has the BCE's
optimum; ``paper_literal`` plugs in. Dice of x_hat_0 (``error.dice``) is what DMCIE's comparison adds.

The sign (1 - 2 x_t) is ours: without it the network has to turn its output over wherever x_t is 1, which it learns
slowly, while losses and samples are the same functions of epsilon_hat. ``paper_literal`` leaves it out.

Classes are independent Bernoulli channels, as the paper is binary; the likeliest wins if above one half.

Chen et al. 2023, https://arxiv.org/abs/2304.04429
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from nnunet_diffrefine.batch import Foreground, RefineBatch
from nnunet_diffrefine.config import ConfigError, RefineConfig
from nnunet_diffrefine.diffusion import BernoulliProcess
from nnunet_diffrefine.errors.targets import EPS, Output, dice_loss, masked_mean
from nnunet_diffrefine.methods.base import finest
from nnunet_diffrefine.methods.composition import ComposedMethod


class BerDiff(ComposedMethod):
    """Bernoulli diffusion of the reference mask given the image.

    Raises:
        ConfigError: flips are to be predicted at several scales.
    """

    name = "berdiff"
    trainer = "DiffRefineTrainer_BerDiff"
    needs = {"process.kind": ("bernoulli",), "error.target": ("mask",), "condition.prior": ("none",)}

    def __init__(self, config: RefineConfig, foreground: Foreground) -> None:
        super().__init__(config, foreground)
        if self.prediction == "flip" and config.training.deep_supervision:
            raise ConfigError(  # each voxel flips on its own: a coarser grid has no flips
                "diffrefine setting 'training.deep_supervision' is True; it must be false to predict flips."
            )
        process = config.process
        self.process: BernoulliProcess = BernoulliProcess(
            process.timesteps, process.schedule, config.sampling.eta, plug_in=config.paper_literal
        )

    def flip_logits(self, output: Tensor, x_t: Tensor) -> Tensor:
        """Logits of epsilon_hat (B, R, *S) of the denoiser's output; ``x_t`` in {0, 1}."""
        return output.float() if self.config.paper_literal else (1 - 2 * x_t) * output.float()

    def predicted(self, output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """x_hat_0 (B, R, *S) in [0, 1] of the denoiser's output; ``x_t`` in {0, 1}."""
        if self.prediction == "x0":
            return super().predicted(output, x_t, t)
        return x_t + (1 - 2 * x_t) * torch.sigmoid(self.flip_logits(output, x_t))

    def noise_loss(
        self, output: Output, x0: Tensor, x_t: Tensor, noise: Tensor | None, t: Tensor, batch: RefineBatch
    ) -> Tensor:
        """KL of the posteriors, BCE of the flips and Dice of the mask, where the reference is valid.

        ``x0``, from which x_t was drawn, may be the denoiser's own prediction; the flips lead to the reference.
        """
        logits, clean = self.flip_logits(finest(output), x_t), self.target.clean(batch)
        own, weight = self.predicted(finest(output), x_t, t), self.config.error
        theta, theta_hat = (self.process.posterior(x_t, x, t, t - 1) for x in (clean, own))
        kl = masked_mean(bernoulli_kl(theta, theta_hat), batch.valid)
        flips = (x_t - clean).abs()
        bce = masked_mean(F.binary_cross_entropy_with_logits(logits, flips, reduction="none"), batch.valid)
        return kl + weight.entropy * bce + weight.dice * dice_loss(own, clean, batch.valid)


def bernoulli_kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(Bernoulli(p) || Bernoulli(q)), elementwise, in nats; q is kept away from 0 and 1 by 1e-6."""
    q = q.clamp(EPS, 1 - EPS)
    return torch.xlogy(p, p) - torch.xlogy(p, q) + torch.xlogy(1 - p, 1 - p) - torch.xlogy(1 - p, 1 - q)
