r"""Processes that end at the prior: the clean mask x_0 at t = 0, stage one's probabilities at t = T.

    mean of x_t = (1 - a_t) prior + a_t x_0 = prior + a_t (x_0 - prior)

:class:`DeterministicBridge` is that mean; :class:`DiscreteBridge` draws hard masks from it. The discrete one is the
Markov chain in which a voxel is redrawn from the prior with probability 1 - a_t / a_{t-1} at step t:

    q(x_t | x_{t-1}) = (a_t / a_{t-1}) x_{t-1} + (1 - a_t / a_{t-1}) prior

and likewise between any s < t, with a_t / a_s. All values are probabilities in [0, 1].

Its reversal departs from D3PM where the predicted x_0 is soft. D3PM's Eq. 4 sums the joint q(x_s, x_t | x_0) over clean
values and normalises last; here each posterior is normalised first:

    p(x_s | x_t) = sum_k x0_k q(x_s | x_t, x_0 = k)

The denoisers here see x_t and are trained to predict x_0, so a calibrated x0_k is p(x_0 = k | x_t). It has weighed x_t
already; the joint, with its factor q(x_t | x_0 = k), weighs it again, each step anew, and drifts to the prior x_t came
from. Mean of the last x_0 with the exact p(x_0 | x_t) as denoiser (binary, T = 10, linear; truth 0.3, prior 0.6):

    steps        1      3      10
    Eq. 4        0.300  0.314  0.369
    mixture      0.300  0.300  0.300

The converse: for an x0 that ignores x_t, Eq. 4 would be the exact posterior.

References:
    Austin et al. 2021, Structured Denoising Diffusion Models in Discrete State-Spaces (D3PM),
        https://arxiv.org/abs/2107.03006: Eq. 3 (marginal and posterior); Eq. 4 (soft x_0) is not followed, see above.
    Chen et al. 2024, HiDiff, https://arxiv.org/abs/2407.03548: the binary relative. New here: exclusive classes.
    Bansal et al. 2022, Cold Diffusion, https://arxiv.org/abs/2208.09392: Algorithm 1, the deterministic reversal.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nnunet_diffrefine.diffusion.process import Process, at_times, per_sample
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
        return _mix(x0, prior, at_times(self._a, t))

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
        return _mix(x0, prior, at_times(self._a, s))


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
        return self._draw(_mix(x0, prior, at_times(self._a, t)), generator)

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
        """Probabilities of x_s given x_t, (B, R, *S) in [0, 1]: sum_k x0_k q(x_s | x_t, x_0 = k, prior).

        D3PM Eq. 3 for each clean value k; their mixture in place of Eq. 4, for the reason at the top of the module.
        Clean values that cannot have led to ``x_t`` are left out; where none can, the result is q(x_s | x0).

        Args:
            x_t: state in {0, 1}, (B, R, *S).
            x0: predicted clean probabilities p(x_0 | x_t) in [0, 1], (B, R, *S).
            prior: probabilities in [0, 1], (B, R, *S).
            t: times of ``x_t``, (B,) integers.
            s: times wanted, (B,) integers with 0 <= s < t. Not checked: that would wait for the GPU at every step.
        """
        a_t, a_s = at_times(self._a, t), at_times(self._a, s)
        state, clean, end = self._outcomes(x_t), self._outcomes(x0), self._outcomes(prior)
        end_of_x_t = (state * end).sum(1, keepdim=True)
        likelihood = _mix(state, end_of_x_t, a_t)  # q(x_t | x_0 = k)
        possible = likelihood > torch.finfo(likelihood.dtype).tiny  # and not > 0: the quotient must stay finite
        weight = torch.where(possible, clean / likelihood, 0)
        joint = _mix(state, end_of_x_t, a_t / a_s) * _mix(weight, end * weight.sum(1, keepdim=True), a_s)
        total = joint.sum(1, keepdim=True)
        posterior = torch.where(total > 0, joint / total, _mix(clean, end, a_s))
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


def _mix(x: Tensor, prior: Tensor, a: Tensor) -> Tensor:
    """``prior + a (x - prior)``, written so that rounding cannot break its ends, its range or its monotony."""
    return per_sample(a, x) * x + per_sample(1 - a, x) * prior
