"""The contract of a refinement method, and the two draws that training states are made of.

A method is composition (error target x process x parametrisation x conditioning x sampler x decision), so it inherits
from nothing but this interface.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from nnunet_diffrefine.batch import Foreground, RefineBatch
from nnunet_diffrefine.config import RefineConfig

Output = Tensor | list[Tensor]
Denoiser = Callable[[Tensor, Tensor], Output]
SegmentationLoss = Callable[[Output, Output], Tensor]


class AbstractRefineMethod(ABC):
    """What a denoiser takes in and puts out, how it is trained, and how a mask is drawn from it.

    Args:
        config: settings; stored, not interpreted here.
        foreground: meaning of the R foreground channels.
    """

    trainer: ClassVar[str]
    """Class name of the method's trainer, for ``nnUNetv2_train -tr``."""

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
    def refine(self, denoiser: Denoiser, image: Tensor, prior: Tensor, generator: torch.Generator) -> Tensor:
        """Logits (B, H, *S) of the corrected mask from image (B, C, *S) and prior (B, R, *S); no reference is read."""


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
