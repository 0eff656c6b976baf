"""What travels through training: image, prior, reference; shapes and value ranges defined once.

Axis order is nnU-Net's: (batch, channel, z, y, x). ``R`` is the number of foreground channels: one per class of a
label dataset, one per region of a region dataset. ``H`` is the number of nnU-Net's segmentation heads: R + 1 for
labels (head 0 is background), R for regions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Foreground:
    """What the R foreground channels of a dataset mean.

    Attributes:
        names: name of each class or region, in nnU-Net's channel order.
        exclusive: True for label datasets (softmax with background), False for region datasets (sigmoid).
        ignore_label: value of the ignore label in label maps, or None.
        parents: for each region the index of the smallest region that contains it, or None; empty for labels
            and where it is not known.
    """

    names: tuple[str, ...]
    exclusive: bool
    ignore_label: int | None = None
    parents: tuple[int | None, ...] = ()

    @property
    def channels(self) -> int:
        """R, the number of foreground channels."""
        return len(self.names)

    @property
    def heads(self) -> int:
        """H, the number of nnU-Net's segmentation heads."""
        return self.channels + int(self.exclusive)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Foreground probabilities (B, R, *S) in [0, 1] of nnU-Net logits (B, H, *S)."""
        logits = logits.float()
        return torch.softmax(logits, 1)[:, 1:] if self.exclusive else torch.sigmoid(logits)

    def logits(self, probabilities: Tensor, eps: float = 1e-4) -> Tensor:
        """Logits (B, H, *S) whose :meth:`probabilities` are the given ones, (B, R, *S), clamped to [eps, 1 - eps]."""
        p = probabilities.float()
        if self.exclusive:
            p = torch.cat((1 - p.sum(1, keepdim=True), p), 1)
            return p.clamp(eps, 1 - eps).log()
        return torch.logit(p, eps=eps)

    def independent_logits(self, probabilities: Tensor, eps: float = 1e-6) -> Tensor:
        """Logits (B, H, *S) of probabilities (B, R, *S) that were each predicted without regard to the others.

        For exclusive classes the background competes at 0.5: a voxel goes to the likeliest class if that is likelier
        than not, else to the background. One minus their sum would not do: it lets two classes at 0.4 each win.
        """
        logits = torch.logit(probabilities.float(), eps=eps)
        return torch.cat((torch.zeros_like(logits[:, :1]), logits), 1) if self.exclusive else logits

    def decide(self, logits: Tensor) -> Tensor:
        """Hard foreground channels (B, R, *S) in {0, 1} of logits (B, H, *S), as nnU-Net decides them.

        One decision for exclusive classes (arg max over all heads), one per region otherwise: regions may leave their
        parents, which :meth:`exported` mends as nnU-Net's label map does.
        """
        if not self.exclusive:
            return (logits > 0).float()
        winner = logits.argmax(1, keepdim=True)
        classes = torch.arange(1, self.heads, device=logits.device).view(1, -1, *([1] * (logits.ndim - 2)))
        return (winner == classes).float()

    def ancestors(self, region: int) -> list[int]:
        """The regions that contain a region, its parent first; empty where ``parents`` is."""
        found: list[int] = []
        parent = self.parents[region] if self.parents else None
        while parent is not None:
            found.append(parent)
            parent = self.parents[parent]
        return found

    def exported(self, decided: Tensor) -> Tensor:
        """Channels of the label map that nnU-Net writes for decided channels, both (B, R, *S) in {0, 1}.

        nnU-Net writes regions one over the other in their order, so of those decided at a voxel the last one counts,
        and the voxel is in it and in its ancestors. Exact where the label that ``regions_class_order`` gives a region
        lies in these regions only. Exclusive classes, and regions whose ``parents`` are not known, stay as they are.
        """
        if not self.parents:
            return decided
        written = torch.zeros_like(decided)
        for region in range(self.channels):
            inside = decided.new_zeros(self.channels)
            inside[[region, *self.ancestors(region)]] = 1
            here = decided[:, region : region + 1] > 0
            written = torch.where(here, inside.view(1, -1, *([1] * (decided.ndim - 2))), written)
        return written

    def from_target(self, target: Tensor) -> tuple[Tensor, Tensor]:
        """Split nnU-Net's training target into reference (B, R, *S) in {0, 1} and valid mask (B, 1, *S) in {0, 1}.

        Args:
            target: label maps (B, 1, *S), or region channels (B, R, *S) with the ignore mask as a last channel
                where the dataset has an ignore label.
        """
        if self.exclusive:
            classes = torch.arange(1, self.heads, device=target.device).view(1, -1, *([1] * (target.ndim - 2)))
            valid = torch.ones_like(target) if self.ignore_label is None else target != self.ignore_label
            return (target == classes).float(), valid.float()
        reference = target[:, : self.channels].float()
        if self.ignore_label is None:
            return reference, torch.ones_like(reference[:, :1])
        return reference, 1 - target[:, self.channels :].float()


@dataclass(frozen=True)
class RefineBatch:
    """One training batch.

    Attributes:
        image: (B, C, *S), as nnU-Net normalised and augmented it.
        prior: (B, R, *S), stage one's out-of-fold foreground probabilities in [0, 1], moved with the image.
        reference: (B, R, *S) in {0, 1}.
        valid: (B, 1, *S) in {0, 1}; 0 where the ignore label is.
        target: nnU-Net's own training target (a list with deep supervision), for nnU-Net's own loss.
    """

    image: Tensor
    prior: Tensor
    reference: Tensor
    valid: Tensor
    target: Tensor | list[Tensor]

    @classmethod
    def from_nnunet(cls, data: Tensor, target: Tensor | list[Tensor], foreground: Foreground) -> RefineBatch:
        """Split a loader's batch: the last R channels of ``data`` (B, C + R, *S) are the prior."""
        image, prior = data[:, : -foreground.channels], data[:, -foreground.channels :]
        finest = target[0] if isinstance(target, list) else target
        reference, valid = foreground.from_target(finest)
        return cls(image, prior, reference, valid, target)
