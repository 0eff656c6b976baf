r"""Processes that end at the prior: the clean mask x_0 at t = 0, stage one's probabilities at t = T.

    mean of x_t = (1 - a_t) prior + a_t x_0 = prior + a_t (x_0 - prior)

:class:`DeterministicBridge` is that mean; :class:`DiscreteBridge` draws hard masks from it. The discrete one is the
Markov chain in which a voxel is redrawn from the prior with probability 1 - a_t / a_{t-1} at step t:

    q(x_t | x_{t-1}) = (a_t / a_{t-1}) x_{t-1} + (1 - a_t / a_{t-1}) prior

and likewise between any s < t, with a_t / a_s. All values are probabilities in [0, 1].

References:
    Austin et al. 2021, Structured Denoising Diffusion Models in Discrete State-Spaces (D3PM),
        https://arxiv.org/abs/2107.03006: Eq. 3 (marginal and posterior), Eq. 4 (soft x_0).
    Chen et al. 2024, HiDiff, https://arxiv.org/abs/2407.03548: the binary relative. New here: exclusive classes.
    Bansal et al. 2022, Cold Diffusion, https://arxiv.org/abs/2208.09392: Algorithm 1, the deterministic reversal.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nnunet_diffrefine.diffusion.process import Process, per_sample
from nnunet_diffrefine.diffusion.schedule import Schedule, bridge_schedule


class DeterministicBridge(Process):
    """State x_t = prior + a_t (x_0 - prior); no randomness, generators are ignored.

    Args:
        timesteps: T.
        schedule: of a_t, see :func:`bridge_schedule`.
    """

    def __init__(self, timesteps: int, schedule: Schedule) -> None:
        """Tabulate the schedule; see the class for the arguments."""
        self.timesteps = timesteps
        self._a = bridge_schedule(timesteps, schedule)

    def start(self, prior: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """The prior itself, (B, R, *S)."""
        return prior

    def marginal(self, x0: Tensor, prior: Tensor, t: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """x_t (B, R, *S): exactly ``x0`` at t = 0 and ``prior`` at t = T."""
        return _mix(x0, prior, _at(self._a, t))

    def reverse(
        self,
        x_t: Tensor,
        x0: Tensor,
        prior: Tensor,
        t: Tensor,
        s: Tensor,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """x_s of the predicted ``x0``. ``x_t`` and ``t`` have no say: prior and x_0 fix every state between them."""
        return _mix(x0, prior, _at(self._a, s))


class DiscreteBridge(Process):
    """Hard masks in {0, 1}, drawn: categorical for exclusive classes, Bernoulli for overlapping regions.

    Exclusive: the R channels and the background 1 - sum are one categorical variable; states have at most one 1 per
    voxel. Priors whose sum exceeds 1 (quantisation) are renormalised when drawn.

    Regions: one uniform number per voxel, shared by all channels, decides them together. What that keeps nested:

    - :meth:`start` and :meth:`marginal`, where ``prior`` and ``x0`` are nested (child <= parent), always.
    - :meth:`reverse` from t = T and to s = 0, always; and between, wherever x_t differs between child and parent or
      their priors agree.
    - Not guaranteed: a step between 0 < s < t < T where child and parent have the same x_t and different priors. The
      posterior asks how likely x_t stems from x_0 and not from the prior, and that is not monotone in the prior.

    Args:
        timesteps: T.
        schedule: of a_t, see :func:`bridge_schedule`.
        exclusive: True for exclusive classes, False for overlapping regions.
    """

    def __init__(self, timesteps: int, schedule: Schedule, exclusive: bool) -> None:
        """Tabulate the schedule; see the class for the arguments."""
        self.timesteps = timesteps
        self.exclusive = exclusive
        self._a = bridge_schedule(timesteps, schedule)

    def start(self, prior: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """A draw (B, R, *S) in {0, 1} from the prior (B, R, *S) in [0, 1]."""
        return self._draw(prior, generator)

    def marginal(self, x0: Tensor, prior: Tensor, t: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """A draw x_t (B, R, *S) in {0, 1} from prior + a_t (x0 - prior); a soft ``x0`` is drawn from too."""
        return self._draw(_mix(x0, prior, _at(self._a, t)), generator)

    def reverse(
        self,
        x_t: Tensor,
        x0: Tensor,
        prior: Tensor,
        t: Tensor,
        s: Tensor,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """A draw x_s (B, R, *S) in {0, 1} from :meth:`posterior`; where s = 0, ``x0`` itself, soft if it is."""
        draw = self._draw(self.posterior(x_t, x0, prior, t, s), generator)
        return torch.where(per_sample(s == 0, x0) > 0, x0, draw)

    def posterior(self, x_t: Tensor, x0: Tensor, prior: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """Probabilities of q(x_s | x_t, x0, prior), (B, R, *S) in [0, 1]; D3PM Eq. 3.

        By Bayes, proportional to q(x_t | x_s) q(x_s | x0). A soft ``x0`` is put into the same formula, which is D3PM
        Eq. 4: q(x_s, x_t | x0) summed over clean values with their probabilities, then normalised. (Normalising first
        would differ for t < T.) A state that ``x0`` and the prior both rule out cannot be conditioned on; the result
        there is q(x_s | x0).

        Args:
            x_t: state in {0, 1}, (B, R, *S).
            x0: predicted clean probabilities in [0, 1], (B, R, *S).
            prior: probabilities in [0, 1], (B, R, *S).
            t: times of ``x_t``, (B,) integers.
            s: times wanted, (B,) integers with 0 <= s < t. Not checked: that would wait for the GPU at every step.
        """
        a_t, a_s = _at(self._a, t), _at(self._a, s)
        outcomes_t, outcomes_prior = self._outcomes(x_t), self._outcomes(prior)
        mean_s = self._outcomes(_mix(x0, prior, a_s))
        prior_of_x_t = (outcomes_t * outcomes_prior).sum(1, keepdim=True)
        joint = _mix(outcomes_t, prior_of_x_t, a_t / a_s) * mean_s
        total = joint.sum(1, keepdim=True)
        posterior = torch.where(total > 0, joint / total, mean_s)
        return posterior[:, 1:] if self.exclusive else posterior[:, 1]

    def _outcomes(self, p: Tensor) -> Tensor:
        """Add the probability of 'none of these' in front of dim 1: (B, R + 1, *S), or (B, 2, R, *S) for regions."""
        if self.exclusive:
            return torch.cat(((1 - p.sum(1, keepdim=True)).clamp(min=0), p), 1)
        return torch.stack((1 - p, p), 1)

    def _draw(self, p: Tensor, generator: torch.Generator | None) -> Tensor:
        shape = (p.shape[0], 1, *p.shape[2:])
        u = torch.rand(shape, generator=generator, device=p.device, dtype=p.dtype)  # in [0, 1): never below p = 0
        if not self.exclusive:
            return (u < p).to(p.dtype)
        cumulative = p.cumsum(1)
        below = (u * cumulative[:, -1:].clamp(min=1) < cumulative).to(p.dtype)  # 0..0 1..1 along the classes
        return torch.diff(below, dim=1, prepend=torch.zeros_like(below[:, :1]))


def _at(a: Tensor, t: Tensor) -> Tensor:
    return a.to(t.device)[t]


def _mix(x: Tensor, prior: Tensor, a: Tensor) -> Tensor:
    """``prior + a (x - prior)``, written so that rounding cannot break its ends, its range or its monotony."""
    return per_sample(a, x) * x + per_sample(1 - a, x) * prior
