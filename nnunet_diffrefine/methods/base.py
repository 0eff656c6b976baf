"""The contract of a refinement method, and the two draws that training states are made of."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from nnunet_diffrefine.batch import Foreground, RefineBatch
from nnunet_diffrefine.config import RefineConfig
from nnunet_diffrefine.errors.targets import Output, SegmentationLoss

Denoiser = Callable[..., Output]
"""Input (B, C_in, *S) and times (B,) -> output; a network may take the condition's features as a third argument."""


class AbstractRefineMethod(ABC):
    """What a denoiser takes in and puts out, how it is trained, and how a mask is drawn from it.

    Args:
        config: settings; stored, not interpreted here.
        foreground: meaning of the R foreground channels.
    """

    name: ClassVar[str]
    """Of the method, and of its preset ``plans/<name>.json``."""
    trainer: ClassVar[str]
    """Class name of the method's trainer, for ``nnUNetv2_train -tr``; its shim is ``trainers/<trainer>.py``."""

    def __init__(self, config: RefineConfig, foreground: Foreground) -> None:
        self.config = config
        self.foreground = foreground

    @abstractmethod
    def channels(self, image_channels: int) -> tuple[int, int]:
        """Numbers of input and output channels of the denoiser."""

    @abstractmethod
    def loss(
        self, denoiser: Denoiser, batch: RefineBatch, segmentation_loss: SegmentationLoss, generator: torch.Generator
    ) -> Tensor:
        """Scalar training loss; ``segmentation_loss`` is nnU-Net's own, of logits and ``batch.target``."""

    @abstractmethod
    def condition_channels(self, image_channels: int) -> int:
        """How many of the denoiser's input channels, the first ones, do not change from step to step."""

    @property
    @abstractmethod
    def flips(self) -> bool:
        """Whether evidence is that of errors, which a threshold a class turns into flips."""

    @abstractmethod
    def evidence(self, denoiser: Denoiser, image: Tensor, prior: Tensor, generator: torch.Generator) -> Tensor:
        """What sampling says, before any decision, from image (B, C, *S) and prior (B, R, *S); no reference is read.

        Returns:
            Logits of the corrected mask (B, H, *S), or of the errors (B, R, *S) if the method :attr:`flips`.
        """

    @abstractmethod
    def decide(self, evidence: Tensor, prior: Tensor, thresholds: Tensor) -> Tensor:
        """Logits (B, H, *S) of the corrected mask, of evidence, prior (B, R, *S) and threshold logits (R,)."""

    def initial_thresholds(self) -> Tensor:
        """Threshold logits (R,) as the settings have them, before any calibration."""
        return torch.full((self.foreground.channels,), self.config.error.threshold).logit()

    def refine(
        self,
        denoiser: Denoiser,
        image: Tensor,
        prior: Tensor,
        generator: torch.Generator,
        thresholds: Tensor | None = None,
    ) -> Tensor:
        """Logits (B, H, *S) of the corrected mask; thresholds (R,) as the settings have them unless given."""
        evidence = self.evidence(denoiser, image, prior, generator)
        return self.decide(evidence, prior, self.initial_thresholds() if thresholds is None else thresholds)


def finest(output: Output) -> Tensor:
    """The full-resolution output of a network with or without deep supervision."""
    return output[0] if isinstance(output, list) else output


def draw_times(size: int, timesteps: int, prior_end: float, generator: torch.Generator) -> Tensor:
    """Times (size,) in 1..T: T with probability ``prior_end``, otherwise uniform."""
    device = generator.device
    uniform = torch.randint(1, timesteps + 1, (size,), generator=generator, device=device)
    at_end = torch.rand(size, generator=generator, device=device) < prior_end
    return torch.where(at_end, timesteps, uniform)


def recycle(
    reference: Tensor,
    t: Tensor,
    timesteps: int,
    share: float,
    predict: Callable[[Tensor], Tensor],
    generator: torch.Generator,
) -> Tensor:
    """Replace the reference of a share of the batch by the model's own prediction made at t = T (recycling).

    Test-time states are built from predictions, so training states should be too: Fu et al. 2023,
    https://arxiv.org/abs/2308.16355. Elements at t = T need none, because their state is the process' end either way.

    Args:
        reference: (B, R, *S), the clean variable.
        t: (B,) drawn times.
        timesteps: T.
        share: probability of recycling, per element.
        predict: indices (n,) of batch elements -> their predicted clean variable (n, R, *S).
        generator: source of the draws.
    """
    chosen = torch.rand(len(t), generator=generator, device=generator.device) < share
    rows = torch.nonzero(chosen & (t < timesteps)).flatten()
    if not len(rows):
        return reference
    with torch.no_grad():
        own = predict(rows)
    torch.clear_autocast_cache()  # older PyTorch would reuse the casts made without gradient (pytorch#165068)
    return reference.index_copy(0, rows, own.to(reference))
