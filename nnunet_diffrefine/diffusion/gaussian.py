"""The Gaussian process: from the clean variable to pure noise, reversed by DDPM, DDIM or anything between.

    x_t = sqrt(alpha_bar_t) b x_0 + sqrt(1 - alpha_bar_t) epsilon,    epsilon ~ N(0, I)

x_0 lies in [-1, 1]; b is the input scale. b < 1 lowers the signal at every t, which masks need: they stay legible
under noise that hides an image. The prior has no part in the process; it reaches the denoiser as a condition.

References:
    Ho et al. 2020, DDPM, https://arxiv.org/abs/2006.11239
    Song et al. 2021, DDIM, https://arxiv.org/abs/2010.02502
    Chen 2023, On the Importance of Noise Scheduling, https://arxiv.org/abs/2301.10972: the input scale.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nnunet_diffrefine.diffusion.parametrisation import Prediction, epsilon_from, signal_and_noise, target_for, x0_from
from nnunet_diffrefine.diffusion.process import Process, at_times, per_sample
from nnunet_diffrefine.diffusion.schedule import Schedule, gaussian_schedule


class GaussianProcess(Process):
    """Gaussian diffusion of x_0 in [-1, 1].

    Args:
        timesteps: T.
        schedule: of alpha_bar_t, see :func:`gaussian_schedule`.
        input_scale: b, above 0. Only states are scaled: every x_0 given to or returned by a method is in [-1, 1].
        eta: randomness of :meth:`reverse`: 0 is DDIM, 1 the ancestral DDPM posterior.
    """

    signed = True

    def __init__(self, timesteps: int, schedule: Schedule, input_scale: float = 1.0, eta: float = 0.0) -> None:
        """Tabulate the schedule; see the class for the arguments."""
        self.timesteps = timesteps
        self.input_scale = input_scale
        self.eta = eta
        self._alpha_bar = gaussian_schedule(timesteps, schedule)

    def alpha_bar(self, t: Tensor) -> Tensor:
        """Signal shares alpha_bar_t, (B,) float64, of integer times ``t`` (B,) in 0..T."""
        return at_times(self._alpha_bar, t)

    def start(self, prior: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """x_T ~ N(0, I) with the shape, dtype and device of ``prior`` (B, R, *S)."""
        return _normal_like(prior, generator)

    def marginal(self, x0: Tensor, prior: Tensor, t: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draw x_t (B, R, *S) of ``x0`` (B, R, *S) in [-1, 1]; b x_0 at t = 0. ``prior`` is unused."""
        return self.marginal_with(x0, _normal_like(x0, generator), t)

    def marginal_with(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t (B, R, *S) of ``x0`` in [-1, 1] and a given standard normal ``noise``, both (B, R, *S)."""
        signal, sigma = signal_and_noise(self.alpha_bar(t), x0)
        return signal * (self.input_scale * x0) + sigma * noise

    def training_target(self, kind: Prediction, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What a network that predicts ``kind`` should output for :meth:`marginal_with` of the same arguments.

        ``x0`` and the target of kind ``x0`` are in [-1, 1]; ``epsilon`` and ``v`` are those of the scaled variable.
        """
        return x0 if kind == "x0" else target_for(kind, self.input_scale * x0, noise, self.alpha_bar(t))

    def predicted_x0(self, kind: Prediction, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """x_0 (B, R, *S) that a network's output (B, R, *S) implies; inverts :meth:`training_target`, not clipped."""
        if kind == "x0":
            return prediction
        return x0_from(kind, prediction, x_t, self.alpha_bar(t)) / self.input_scale

    def reverse(
        self,
        x_t: Tensor,
        x0: Tensor,
        prior: Tensor,
        t: Tensor,
        s: Tensor,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw x_s (B, R, *S), s < t, from x_t and the predicted ``x0``; where s = 0, ``x0`` itself.

        Song et al. 2021, Eq. 12, with t - 1 replaced by any s, and sigma of their Eq. 16. With eta = 1 it is the
        posterior q(x_s | x_t, x0) of Ho et al. 2020, Eq. 6 and 7. ``prior`` is unused.
        """
        alpha_bar_t, alpha_bar_s = self.alpha_bar(t), self.alpha_bar(s)
        variance = self.eta**2 * (1 - alpha_bar_s) / (1 - alpha_bar_t) * (1 - alpha_bar_t / alpha_bar_s)
        direction = (1 - alpha_bar_s - variance).clamp(min=0).sqrt()
        scaled = self.input_scale * x0
        x_s = per_sample(alpha_bar_s.sqrt(), x0) * scaled
        x_s = x_s + per_sample(direction, x0) * epsilon_from(scaled, x_t, alpha_bar_t)
        if self.eta > 0:
            x_s = x_s + per_sample(variance.sqrt(), x0) * _normal_like(x0, generator)
        return torch.where(per_sample(s == 0, x0) > 0, x0, x_s)


class TruncatedGaussianProcess(GaussianProcess):
    """Gaussian diffusion up to T' < T only; reversed from the noised prior at T' instead of from noise.

    PD-DDPM, Guo et al. 2022, https://arxiv.org/abs/2210.17408: pre-segmentation saves the steps from T to T'.

    Args:
        timesteps: T, of the schedule.
        schedule: of alpha_bar, tabulated over T.
        input_scale: b, above 0.
        eta: randomness of :meth:`reverse`.
        truncation: T'/T in (0, 1]; T' is at least 1.
    """

    def __init__(
        self, timesteps: int, schedule: Schedule, input_scale: float = 1.0, eta: float = 0.0, truncation: float = 0.3
    ) -> None:
        """Tabulate the schedule; see the class for the arguments."""
        super().__init__(timesteps, schedule, input_scale, eta)
        self.timesteps = max(int(timesteps * truncation), 1)

    def start(self, prior: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """x_T' (B, R, *S): the prior (B, R, *S) in [-1, 1], noised to T'."""
        t = torch.full(prior.shape[:1], self.timesteps, device=prior.device)
        return self.marginal_with(prior, _normal_like(prior, generator), t)


def _normal_like(x: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
