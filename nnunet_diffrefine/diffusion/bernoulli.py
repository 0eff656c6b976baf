"""The Bernoulli process: from a hard mask to coin flips, every channel and voxel on its own.

    q(x_t | x_{t-1}) = Bernoulli((1 - beta_t) x_{t-1} + beta_t / 2)    so    q(x_t | x_0) = Bernoulli(mean_t),
    mean_t = a_t x_0 + (1 - a_t) / 2,    a_t = prod_{i <= t} (1 - beta_i)

Equivalently x_t = x_0 XOR epsilon with epsilon ~ Bernoulli((1 - a_t) / 2). The posterior, with r = a_t / a_s:

    theta(x_t, x_0) = f_1 / (f_0 + f_1),    f_1 = (r x_t + (1 - r) / 2) (a_s x_0 + (1 - a_s) / 2),

f_0 the same of 1 - x_t and 1 - x_0. BerDiff puts a soft x_0 into theta; the mixture x_0 theta(x_t, 1) + (1 - x_0)
theta(x_t, 0) is what a denoiser that has seen x_t needs, as :mod:`nnunet_diffrefine.diffusion.bridge` explains.

References:
    Chen et al. 2023, BerDiff, https://arxiv.org/abs/2304.04429: the process, its posterior, DDIM on binary states.
    Song et al. 2021, DDIM, https://arxiv.org/abs/2010.02502, appendix A: the non-Markovian family for discrete states.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nnunet_diffrefine.diffusion.process import Process, at_times, per_sample
from nnunet_diffrefine.diffusion.schedule import Schedule, bridge_schedule


class BernoulliProcess(Process):
    """Bernoulli diffusion of x_0 in {0, 1}; every prior given is ignored.

    Args:
        timesteps: T.
        schedule: of a_t, see :func:`bridge_schedule`; a_T = 0, so x_T is a fair coin exactly.
        eta: randomness of :meth:`reverse`: 1 draws from :meth:`posterior`, 0 from :meth:`ddim`, values between from
            one or the other. All have the marginal q(x_s | x_0).
        plug_in: put a soft x_0 into theta, as BerDiff does, instead of mixing.
    """

    def __init__(self, timesteps: int, schedule: Schedule, eta: float = 0.0, plug_in: bool = False) -> None:
        """Tabulate the schedule; see the class for the arguments."""
        self.timesteps = timesteps
        self.eta = eta
        self.plug_in = plug_in
        self._a = bridge_schedule(timesteps, schedule)

    def start(self, prior: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Fair coins in {0, 1} with the shape of ``prior`` (B, R, *S)."""
        return _draw(torch.full_like(prior, 0.5), generator)

    def marginal(self, x0: Tensor, prior: Tensor, t: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """A draw x_t (B, R, *S) in {0, 1}; a soft ``x0`` is drawn from too."""
        return _draw(_drift(x0, at_times(self._a, t)), generator)

    def reverse(
        self,
        x_t: Tensor,
        x0: Tensor,
        prior: Tensor,
        t: Tensor,
        s: Tensor,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """A draw x_s (B, R, *S) in {0, 1} from x_t and the predicted ``x0``; where s = 0, ``x0`` itself, even soft."""
        p = self.eta * self.posterior(x_t, x0, t, s) + (1 - self.eta) * self.ddim(x_t, x0, t, s)
        return torch.where(per_sample(s == 0, x0) > 0, x0, _draw(p, generator))

    def ddim(self, x_t: Tensor, x0: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """Probabilities of x_s (B, R, *S): x_t is kept with probability (1 - a_s) / (1 - a_t), x0 taken otherwise."""
        keep = (1 - at_times(self._a, s)) / (1 - at_times(self._a, t))
        return per_sample(keep, x0) * x_t + per_sample(1 - keep, x0) * x0

    def posterior(self, x_t: Tensor, x0: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """Probabilities of x_s (B, R, *S) in [0, 1] given ``x_t`` in {0, 1} and predicted ``x0`` in [0, 1].

        Args:
            x_t: state, (B, R, *S).
            x0: clean probabilities, (B, R, *S).
            t: times of ``x_t``, (B,) integers.
            s: times wanted, (B,) integers with 0 <= s < t.
        """
        if self.plug_in:  # at s = 0 the paper takes x_hat_0 itself, which theta would change
            return torch.where(per_sample(s == 0, x0) > 0, x0, self._theta(x_t, x0, t, s))
        one, zero = torch.ones_like(x0), torch.zeros_like(x0)
        return x0 * self._theta(x_t, one, t, s) + (1 - x0) * self._theta(x_t, zero, t, s)

    def _theta(self, x_t: Tensor, x0: Tensor, t: Tensor, s: Tensor) -> Tensor:
        a_t, a_s = at_times(self._a, t), at_times(self._a, s)
        foreground = _drift(x_t, a_t / a_s) * _drift(x0, a_s)
        background = _drift(1 - x_t, a_t / a_s) * _drift(1 - x0, a_s)
        return foreground / (foreground + background)


def _drift(x: Tensor, a: Tensor) -> Tensor:
    """``a x + (1 - a) / 2``: towards the fair coin."""
    return per_sample(a, x) * x + per_sample((1 - a) / 2, x)


def _draw(p: Tensor, generator: torch.Generator | None) -> Tensor:
    u = torch.rand(p.shape, generator=generator, device=p.device, dtype=p.dtype)  # in [0, 1): never below p = 0
    return (u < p).to(p.dtype)
