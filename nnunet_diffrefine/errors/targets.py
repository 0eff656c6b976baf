"""What a denoiser may learn to generate, and the way back from it to a mask: mask, absolute error, three-way error.

Each target is a clean variable x_0 (B, R, *S), made from reference and prior; a reading of the denoiser's output as a
prediction of it; a loss; and *evidence*, the logits from which :meth:`ErrorTarget.decide` makes the corrected mask.
Errors are defined on the hard prior: of a soft one, |U - G| is not a flip.

Decision of an error target: channel r of the hard prior flips where its evidence (the logit of the probability that it
is wrong) exceeds the channel's threshold. With m the prior and e the evidence less the threshold, the corrected logit
is e where m = 0 and -e where m = 1, so the margin says how sure the decision is. Exclusive classes that flip at once
are settled by one rule: the background has logit 0, and the class with the largest corrected logit wins where that is
above 0. Regions are cut to the regions that contain them (``error.nesting``). Masks are decided as nnU-Net decides.

References:
    Ren et al. 2024, Re-DiffiNet, https://arxiv.org/abs/2402.07354: the absolute discrepancy and its flip (Eq. 5).
    Yavari et al. 2025, DMCIE, https://arxiv.org/abs/2507.00983: the signed error (Eq. 1; sign corrected).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from nnunet_diffrefine.batch import Foreground, RefineBatch
from nnunet_diffrefine.config import ErrorConfig
from nnunet_diffrefine.errors.maps import absolute_error, enforce_nesting, signed_error
from nnunet_diffrefine.errors.surface import surface_loss

Output = Tensor | list[Tensor]
SegmentationLoss = Callable[[Output, Output], Tensor]
SMOOTH = 1.0
EPS = 1e-6
LIMIT = 20.0
"""Of corrected logits; nnU-Net adds up weighted windows in half precision."""


class ErrorTarget(ABC):
    """What is generated; see the module for the decision.

    Args:
        config: the ``error`` settings.
        foreground: meaning of the R foreground channels.
        independent: whether channels are predicted without regard to each other, as noise is (masks only).
    """

    signed: ClassVar[bool] = False
    """Whether x_0 lies in [-1, 1] instead of [0, 1]."""
    flips: ClassVar[bool] = True
    """Whether evidence is an error, mended above a threshold."""

    def __init__(self, config: ErrorConfig, foreground: Foreground, independent: bool = False) -> None:
        self.config = config
        self.foreground = foreground
        self.independent = independent

    @property
    @abstractmethod
    def outputs(self) -> int:
        """Output channels of a denoiser that predicts x_0."""

    @abstractmethod
    def clean(self, batch: RefineBatch) -> Tensor:
        """x_0 (B, R, *S); no error where ``batch.valid`` is 0."""

    def anchor(self, prior: Tensor) -> Tensor:
        """The x_0 (B, R, *S) that leaves the prior as it is: no error."""
        return torch.zeros_like(prior)

    @abstractmethod
    def estimate(self, output: Tensor) -> Tensor:
        """Predicted x_0 (B, R, *S) of a denoiser's output (B, ``outputs``, *S)."""

    @abstractmethod
    def evidence(self, estimate: Tensor, prior: Tensor) -> Tensor:
        """Logits of the decision, of a predicted x_0 and the prior, both (B, R, *S)."""

    def evidence_of(self, output: Tensor, prior: Tensor) -> Tensor:
        """Evidence of a denoiser's output (B, ``outputs``, *S)."""
        return self.evidence(self.estimate(output), prior)

    @abstractmethod
    def loss(self, output: Output, batch: RefineBatch, segmentation_loss: SegmentationLoss) -> Tensor:
        """Loss of a denoiser that predicts x_0."""

    def decide(self, evidence: Tensor, prior: Tensor, thresholds: Tensor) -> Tensor:
        """Logits (B, H, *S) of the corrected mask.

        Args:
            evidence: of a flip, (B, R, *S).
            prior: probabilities (B, R, *S).
            thresholds: logits (R,); infinity never flips.
        """
        margin = evidence.float() - thresholds.to(evidence.device).view(1, -1, *([1] * (evidence.ndim - 2)))
        margin = margin.clamp(-LIMIT, LIMIT).masked_fill(margin == 0, -EPS)  # at the threshold nothing flips
        corrected = torch.where(self.hard(prior) > 0, -margin, margin)
        if self.foreground.exclusive:
            return torch.cat((torch.zeros_like(corrected[:, :1]), corrected), 1)
        nested = self.config.nesting and self.foreground.parents
        return enforce_nesting(corrected, self.foreground.parents) if nested else corrected

    def hard(self, prior: Tensor) -> Tensor:
        """The prior's own decision (B, R, *S) in {0, 1}."""
        return self.foreground.decide(self.foreground.logits(prior))


class Mask(ErrorTarget):
    """x_0 is the reference; trained with nnU-Net's own loss, decided as nnU-Net decides."""

    flips = False

    @property
    def outputs(self) -> int:
        """nnU-Net's heads."""
        return self.foreground.heads

    def clean(self, batch: RefineBatch) -> Tensor:
        """The reference; the prior stands in for it under the ignore label."""
        return torch.where(batch.valid > 0, batch.reference, batch.prior)

    def anchor(self, prior: Tensor) -> Tensor:
        """The prior itself."""
        return prior

    def estimate(self, output: Tensor) -> Tensor:
        """Foreground probabilities."""
        return self.foreground.probabilities(output)

    def evidence(self, estimate: Tensor, prior: Tensor) -> Tensor:
        """Segmentation logits (B, H, *S)."""
        return (self.foreground.independent_logits if self.independent else self.foreground.logits)(estimate)

    def evidence_of(self, output: Tensor, prior: Tensor) -> Tensor:
        """The output itself."""
        return output

    def loss(self, output: Output, batch: RefineBatch, segmentation_loss: SegmentationLoss) -> Tensor:
        """nnU-Net's loss; of the finest output, the squared error and the surface loss where they are switched on."""
        loss = segmentation_loss(output, batch.target)
        finest = output[0] if isinstance(output, list) else output
        if self.config.squared > 0:
            squared = (self.estimate(finest) - batch.reference) ** 2
            loss = loss + self.config.squared * masked_mean(squared, batch.valid)
        if self.config.surface > 0:
            loss = loss + self.config.surface * surface_loss(finest, batch.reference, batch.valid, self.foreground)
        return loss

    def decide(self, evidence: Tensor, prior: Tensor, thresholds: Tensor) -> Tensor:
        """Evidence is the decision's logits already."""
        return evidence


class AbsoluteError(ErrorTarget):
    """x_0 = |reference - hard prior|, the voxels to flip; Dice, cross-entropy and squared error of its sigmoid."""

    @property
    def outputs(self) -> int:
        """One a channel."""
        return self.foreground.channels

    def clean(self, batch: RefineBatch) -> Tensor:
        """1 where the hard prior is wrong."""
        return absolute_error(batch.reference, self.hard(batch.prior), batch.valid)

    def estimate(self, output: Tensor) -> Tensor:
        """Probability that the channel is wrong."""
        return torch.sigmoid(output.float())

    def evidence(self, estimate: Tensor, prior: Tensor) -> Tensor:
        """Logit of the probability that the channel is wrong."""
        return torch.logit(estimate, eps=EPS)

    def loss(self, output: Output, batch: RefineBatch, segmentation_loss: SegmentationLoss) -> Tensor:
        """Weighted sum over scales; ``segmentation_loss`` is not used."""
        return over_scales(self._loss, output, self.clean(batch), batch.valid)

    def _loss(self, output: Tensor, clean: Tensor, valid: Tensor) -> Tensor:
        p, weight = self.estimate(output), self.config
        entropy = functional.binary_cross_entropy_with_logits(output.float(), clean, reduction="none")
        squared = (p - clean) ** 2
        return (
            weight.dice * dice_loss(p, clean, valid)
            + weight.entropy * masked_mean(entropy, valid)
            + weight.squared * masked_mean(squared, valid)
        )


class ThreeWayError(ErrorTarget):
    """x_0 = reference - hard prior in {-1, 0, 1}: remove, keep or add; cross-entropy and Dice over the three."""

    signed = True

    @property
    def outputs(self) -> int:
        """Remove, keep and add, each for every channel: (B, 3R, *S) as (B, 3, R, *S)."""
        return 3 * self.foreground.channels

    def clean(self, batch: RefineBatch) -> Tensor:
        """1 where foreground is missing, -1 where there is too much."""
        return signed_error(batch.reference, self.hard(batch.prior), batch.valid)

    def estimate(self, output: Tensor) -> Tensor:
        """Expected error, the probability of adding less that of removing."""
        p = torch.softmax(self._ways(output), 1)
        return p[:, 2] - p[:, 0]

    def evidence(self, estimate: Tensor, prior: Tensor) -> Tensor:
        """Logit of the expected error in the direction that the hard prior leaves open."""
        possible = torch.where(self.hard(prior) > 0, -estimate, estimate)
        return torch.logit(possible.clamp(0, 1), eps=EPS)

    def loss(self, output: Output, batch: RefineBatch, segmentation_loss: SegmentationLoss) -> Tensor:
        """Weighted sum over scales; ``segmentation_loss`` is not used."""
        return over_scales(self._loss, output, self.clean(batch), batch.valid)

    def _loss(self, output: Tensor, clean: Tensor, valid: Tensor) -> Tensor:
        ways = self._ways(output)
        entropy = functional.cross_entropy(ways, clean.long() + 1, reduction="none")
        changes = torch.softmax(ways, 1)[:, ::2].flatten(1, 2)
        wanted = torch.stack((clean < 0, clean > 0), 1).flatten(1, 2).float()
        return self.config.dice * dice_loss(changes, wanted, valid) + self.config.entropy * masked_mean(entropy, valid)

    def _ways(self, output: Tensor) -> Tensor:
        return output.float().view(len(output), 3, self.foreground.channels, *output.shape[2:])


TARGETS: dict[str, type[ErrorTarget]] = {"mask": Mask, "absolute": AbsoluteError, "three_way": ThreeWayError}


def over_scales(
    loss: Callable[[Tensor, Tensor, Tensor], Tensor], output: Output, clean: Tensor, valid: Tensor
) -> Tensor:
    """Sum of a loss over deep-supervision outputs, weighted as nnU-Net does: halved at every scale, the last without.

    Args:
        loss: of output (B, ., *s), x_0 (B, R, *s) and valid mask (B, 1, *s).
        output: one, or a list of them, finest first.
        clean: x_0 (B, R, *S), sampled to the nearest voxel for coarser outputs, as nnU-Net samples its target.
        valid: (B, 1, *S).
    """
    outputs = output if isinstance(output, list) else [output]
    weights = [0.5**i for i in range(len(outputs))]
    if len(outputs) > 1:
        weights[-1] = 0.0
    terms = []
    for weight, one in zip(weights, outputs, strict=True):
        size = one.shape[2:]
        scaled = [
            x if x.shape[2:] == size else functional.interpolate(x, size, mode="nearest-exact") for x in (clean, valid)
        ]
        terms.append(weight / sum(weights) * loss(one, *scaled))
    return torch.stack(terms).sum()


def dice_loss(p: Tensor, target: Tensor, valid: Tensor) -> Tensor:
    """One less the soft Dice, mean over batch and channels; p and target (B, K, *S) in [0, 1], valid (B, 1, *S)."""
    p, target = (p * valid).flatten(2), (target * valid).flatten(2)
    overlap, total = (p * target).sum(2), p.sum(2) + target.sum(2)
    return 1 - ((2 * overlap + SMOOTH) / (total + SMOOTH)).mean()


def masked_mean(values: Tensor, valid: Tensor) -> Tensor:
    """Mean of values (B, K, *S) where valid (B, 1, *S) is 1; 0 where it is so nowhere."""
    return (values * valid).sum() / (valid.sum() * values.shape[1]).clamp(min=1)
