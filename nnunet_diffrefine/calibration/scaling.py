"""Calibrated class probabilities: a logistic regression on refined and stage-one logits, fitted with the log loss.

With R_c and S_c the logits of class c (of a region; of an exclusive class, relative to the background),

    z_c = a_c R_c + b_c S_c + d_c,

and the probability q is the softmax over background (z = 0) and classes, or each region's sigmoid. The log loss is a
proper scoring rule, and convex in (a, b, d). With a = 0 this is stage one's temperature scaling with a bias a class
(Guo et al. 2017, https://arxiv.org/abs/1706.04599; Platt 1999), with b = 0 the refiner's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor
from torch.nn import functional

from nnunet_diffrefine.batch import Foreground

LIMIT = 10.0
"""Of the features: what saturates says no more."""
RIDGE = 1e-4
"""Weight of the squared distance from the starting values: keeps a class without errors finite."""


@dataclass(frozen=True)
class Scaling:
    """Coefficients of each of the R channels.

    Attributes:
        refiner: a.
        stage_one: b.
        bias: d.
    """

    refiner: list[float]
    stage_one: list[float]
    bias: list[float]

    def __call__(self, refined: Tensor, stage_one: Tensor, foreground: Foreground) -> Tensor:
        """Probabilities (B, R, *S) in [0, 1] of refined and stage-one logits (B, H, *S)."""
        shape = (1, -1, *([1] * (refined.ndim - 2)))
        a, b, d = (torch.tensor(c).to(refined).view(shape) for c in (self.refiner, self.stage_one, self.bias))
        z = a * features(refined, foreground) + b * features(stage_one, foreground) + d
        return probabilities(z, foreground)


def features(logits: Tensor, foreground: Foreground) -> Tensor:
    """R_c or S_c (B, R, *S) of logits (B, H, *S)."""
    relative = logits[:, 1:] - logits[:, :1] if foreground.exclusive else logits
    return relative.clamp(-LIMIT, LIMIT)


def probabilities(z: Tensor, foreground: Foreground) -> Tensor:
    """The q (B, R, *S) of z (B, R, *S)."""
    if not foreground.exclusive:
        return torch.sigmoid(z)
    return torch.softmax(torch.cat((torch.zeros_like(z[:, :1]), z), 1), 1)[:, 1:]


def identity(foreground: Foreground, source: str) -> Scaling:
    """The probabilities of ``source``, ``refiner`` or ``stage_one``, as they are (logits clamped)."""
    one, none = [1.0] * foreground.channels, [0.0] * foreground.channels
    return Scaling(one if source == "refiner" else none, one if source == "stage_one" else none, none)


def fit(
    refined: Tensor, stage_one: Tensor, reference: Tensor, foreground: Foreground, use: tuple[bool, bool]
) -> Scaling:
    """The scaling of least log loss; an even start that the ridge pulls to where data say nothing.

    Args:
        refined: logits (1, H, N).
        stage_one: logits (1, H, N).
        reference: {0, 1}, (1, R, N).
        foreground: meaning of the R channels.
        use: whether refined and stage-one logits are.
    """
    inputs = [features(x.double(), foreground) for x in (refined, stage_one)]
    truth, channels = reference.double(), foreground.channels
    start = torch.zeros(3, channels, dtype=torch.float64)
    for row, used in enumerate(use):
        start[row] = 1 / sum(use) if used else 0
    free = torch.tensor([*use, True], dtype=torch.float64)[:, None]

    def loss(values: np.ndarray) -> tuple[float, np.ndarray]:
        w = torch.from_numpy(values).view(3, channels).requires_grad_()
        used = torch.where(free > 0, w, start)
        a, b, d = (row.view(1, -1, 1) for row in used)
        value = log_loss(a * inputs[0] + b * inputs[1] + d, truth, foreground) + RIDGE * ((used - start) ** 2).sum()
        value.backward()
        gradient: Any = w.grad
        return value.item(), gradient.numpy().ravel()

    with torch.inference_mode(False), torch.enable_grad():
        found = minimize(loss, start.numpy().ravel(), jac=True, method="L-BFGS-B")
    best = np.where(free.numpy() > 0, found.x.reshape(3, channels), start.numpy())
    return Scaling(*(row.tolist() for row in best))


def log_loss(z: Tensor, reference: Tensor, foreground: Foreground) -> Tensor:
    """Mean negative log-likelihood of the reference (1, R, N) under z (1, R, N); regions: the sum of theirs."""
    if not foreground.exclusive:
        return functional.binary_cross_entropy_with_logits(z, reference, reduction="none").sum(1).mean()
    total = torch.logsumexp(torch.cat((torch.zeros_like(z[:, :1]), z), 1), 1)
    return (total - (z * reference).sum(1)).mean()
