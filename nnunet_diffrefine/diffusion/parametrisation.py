"""What a denoiser of the Gaussian process may predict: the clean variable, the noise, or the velocity.

    x_t = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) epsilon,    v = sqrt(alpha_bar) epsilon - sqrt(1 - alpha_bar) x_0

Here x_0 is the variable that was noised; a process that scales its input hands over the scaled one. Roots are taken
in the precision of ``alpha_bar``: in float32, 1 - alpha_bar has lost half its digits at low noise.

References:
    Salimans & Ho 2022, Progressive Distillation, section 4 and appendix D, https://arxiv.org/abs/2202.00512
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from nnunet_diffrefine.diffusion.process import per_sample

Prediction = Literal["x0", "epsilon", "v"]


def signal_and_noise(alpha_bar: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """sqrt(alpha_bar) and sqrt(1 - alpha_bar) of ``alpha_bar`` (B,), shaped to broadcast over ``like`` (B, R, *S)."""
    return per_sample(alpha_bar.sqrt(), like), per_sample((1 - alpha_bar).sqrt(), like)


def x0_from(kind: Prediction, prediction: Tensor, x_t: Tensor, alpha_bar: Tensor) -> Tensor:
    """The clean variable x_0 (B, R, *S) that a prediction implies; not clipped.

    From ``epsilon``, errors grow by sqrt((1 - alpha_bar) / alpha_bar): clip the result near t = T.

    Args:
        kind: what ``prediction`` is.
        prediction: network output, (B, R, *S).
        x_t: state it was made from, (B, R, *S).
        alpha_bar: signal share at t, (B,) in (0, 1), float64 for full precision.

    Raises:
        ValueError: ``kind`` is unknown.
    """
    signal, noise = signal_and_noise(alpha_bar, x_t)
    if kind == "x0":
        return prediction
    if kind == "epsilon":
        return (x_t - noise * prediction) / signal
    if kind == "v":
        return signal * x_t - noise * prediction
    raise _unknown(kind)


def epsilon_from(x0: Tensor, x_t: Tensor, alpha_bar: Tensor) -> Tensor:
    """The noise (B, R, *S) that leads from ``x0`` to ``x_t``, both (B, R, *S); ``alpha_bar`` (B,) below 1 (t > 0)."""
    signal, noise = signal_and_noise(alpha_bar, x_t)
    return (x_t - signal * x0) / noise


def target_for(kind: Prediction, x0: Tensor, noise: Tensor, alpha_bar: Tensor) -> Tensor:
    """What a network that predicts ``kind`` should output, (B, R, *S).

    Args:
        kind: what the network predicts.
        x0: clean variable, (B, R, *S).
        noise: the epsilon that was mixed in, (B, R, *S).
        alpha_bar: signal share at t, (B,) in [0, 1].

    Raises:
        ValueError: ``kind`` is unknown.
    """
    signal, sigma = signal_and_noise(alpha_bar, x0)
    if kind == "x0":
        return x0
    if kind == "epsilon":
        return noise
    if kind == "v":
        return signal * noise - sigma * x0
    raise _unknown(kind)


def _unknown(kind: str) -> ValueError:
    return ValueError(f"kind is {kind!r}; it must be one of x0, epsilon, v. Set process.prediction.")
