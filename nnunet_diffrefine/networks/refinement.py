"""Stage one and refiner in one module that behaves like any nnU-Net network: image patch in, logits out.

Because stage one's weights are part of the state dict, a model folder is self-contained: ``nnUNetv2_predict``, model
zips, ensembling and model selection work unchanged. Stage one is averaged over its mirrored copies *inside* the
network and its prior refined in a few of them, instead of nnU-Net mirroring the whole module eight times.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from nnunet_diffrefine.batch import Foreground
from nnunet_diffrefine.config import SamplingConfig
from nnunet_diffrefine.networks.denoiser import TimeConditionedUNet
from nnunet_diffrefine.networks.gate import Gate


class Refiner(Protocol):
    """What the network needs of a method: evidence of a window, and the decision."""

    @property
    def flips(self) -> bool:
        """Whether thresholds matter."""

    def initial_thresholds(self) -> Tensor:
        """Threshold logits (R,)."""

    def evidence(
        self, denoiser: Callable[..., Any], image: Tensor, prior: Tensor, generator: torch.Generator
    ) -> Tensor:
        """Image (B, C, *S) and prior (B, R, *S) -> evidence (B, H or R, *S)."""

    def decide(self, evidence: Tensor, prior: Tensor, thresholds: Tensor) -> Tensor:
        """Evidence, prior and threshold logits (R,) -> logits (B, H, *S)."""


def mirrored_mean(
    predict: Callable[..., Tensor], axes: Sequence[int], *inputs: Tensor, copies: int | None = None
) -> Tensor:
    """Average ``predict`` over mirrored copies of its inputs.

    Args:
        predict: function of tensors (B, ., *S) that returns (B, ., *S).
        axes: spatial axes that may be mirrored, 0-based; empty for none.
        inputs: tensors mirrored together.
        copies: how many copies; None for all. The first is unmirrored, the second mirrored along all axes.
    """
    flips = [c for n in range(len(axes) + 1) for c in combinations([axis + 2 for axis in axes], n)]
    flips = [*flips[:1], *flips[:0:-1]][:copies]
    total = predict(*inputs)
    for flip in flips[1:]:
        total = total + torch.flip(predict(*(torch.flip(x, flip) for x in inputs)), flip)
    return total / len(flips)


class RefinementNetwork(nn.Module):
    """Image patch (B, C, *S) -> nnU-Net logits (B, H, *S) of the corrected segmentation.

    Deterministic: noise, where a method needs any, comes from the fixed seed of the settings, anew for each window,
    so the result depends neither on tiling order nor on the number of processes.

    Args:
        stage_one: frozen network, (B, C, *S) -> logits (B, H, *S).
        denoiser: trainable network of (input, t).
        method: how the denoiser turns image and prior into logits.
        foreground: meaning of the R foreground channels.
        sampling: settings of the result.
        stage_one_axes: spatial axes over whose mirrored copies stage one is averaged; empty for none.
        refiner_axes: the same for the refiner, as many copies as the settings say.
        gate: which classes are refined; None for all. Only :meth:`forward` obeys it, so a training sees the refiner
            as it is.
    """

    def __init__(
        self,
        stage_one: nn.Module,
        denoiser: TimeConditionedUNet,
        method: Refiner,
        foreground: Foreground,
        sampling: SamplingConfig,
        stage_one_axes: Sequence[int] = (),
        refiner_axes: Sequence[int] = (),
        gate: Gate | None = None,
    ) -> None:
        super().__init__()
        self.stage_one = stage_one.requires_grad_(False)
        self.denoiser = denoiser
        self.method = method
        self.foreground = foreground
        self.sampling = sampling
        self.thresholds: Tensor
        self.stage_one_axes = tuple(stage_one_axes)
        self.refiner_axes = tuple(refiner_axes)
        self.gate = gate or Gate(foreground)
        # In the checkpoint of methods that flip alone: thresholds are calibrated once the training is over.
        self.register_buffer("thresholds", method.initial_thresholds(), persistent=method.flips)
        # Frozen stage one has nothing to synchronise; ranks may differ in their number of forward passes (recycling).
        self._ddp_params_and_buffers_to_ignore = [f"stage_one.{name}" for name in stage_one.state_dict()]
        self._ddp_params_and_buffers_to_ignore.append("thresholds")

    def train(self, mode: bool = True) -> RefinementNetwork:
        """Switch the denoiser's mode; stage one always stays in evaluation mode."""
        super().train(mode)
        self.stage_one.eval()
        return self

    def forward(self, x: Tensor, t: Tensor | None = None) -> Tensor | list[Tensor]:
        """Without ``t``: refined logits of image ``x`` (B, C, *S). With ``t`` (B,): the denoiser, as in training."""
        if t is not None:
            return self.denoiser(x, t)
        stage_one = self.stage_one_logits(x)
        return stage_one if self.gate.closed else self.gate(self.refined(x, stage_one), stage_one)

    def stage_one_logits(self, image: Tensor) -> Tensor:
        """Stage one's logits (B, H, *S), averaged over mirrored copies.

        Raises:
            ValueError: they are not finite.
        """
        logits = mirrored_mean(self.stage_one, self.stage_one_axes, image).float()
        if not torch.isfinite(logits).all():
            raise ValueError("Stage one's output is not finite: the image holds NaN or infinity. Repair the image.")
        return logits

    def refined(self, image: Tensor, stage_one_logits: Tensor) -> Tensor:
        """Refine the windows in which stage one sees any foreground; the others pass through.

        So does everything if no threshold allows a flip.
        """
        if self.never_flips:
            return stage_one_logits
        prior = self.foreground.probabilities(stage_one_logits)
        seen = prior.flatten(1).amax(1) >= self.sampling.min_foreground
        if not seen.any():
            return stage_one_logits
        result = stage_one_logits.clone()
        windows = zip(*(x[seen].split(1) for x in (image, prior, stage_one_logits)), strict=True)  # each its own noise
        result[seen] = torch.cat([self.decided(self.evidence(i, p), p, own) for i, p, own in windows])
        return result

    def refine_window(self, image: Tensor, prior: Tensor) -> Tensor:
        """Refined logits (1, H, *S), given image (1, C, *S) and prior probabilities (1, R, *S) of a window."""
        return self.decided(self.evidence(image, prior), prior)

    @property
    def never_flips(self) -> bool:
        """Whether the method flips voxels and no threshold allows it."""
        return self.method.flips and bool(torch.isposinf(self.thresholds).all())

    def decided(self, evidence: Tensor, prior: Tensor, own: Tensor | None = None) -> Tensor:
        """What follows from evidence and thresholds, with stage one's share; the prior's own logits without any flip.

        Blended over windows or resampled, hard decisions are not the prior, even where nothing flips.

        Args:
            evidence: the method's, (B, H or R, *S).
            prior: probabilities (B, R, *S).
            own: the prior's logits (B, H, *S), where they are known better than from its probabilities.

        Returns:
            Logits (B, H, *S).
        """
        weight = 1.0 if self.never_flips else self.sampling.stage_one_weight
        logits = self.method.decide(evidence, prior, self.thresholds).float()
        if weight == 0:
            return logits
        return (1 - weight) * logits + weight * (self.foreground.logits(prior) if own is None else own)

    def evidence(self, image: Tensor, prior: Tensor) -> Tensor:
        """The method's evidence (1, H or R, *S) of a window, averaged over the refiner's mirrored copies."""
        generator = torch.Generator(device=image.device).manual_seed(self.sampling.seed)

        def of_copy(image: Tensor, prior: Tensor) -> Tensor:
            return self.method.evidence(self.denoiser, image, prior, generator).float()

        return mirrored_mean(of_copy, self.refiner_axes, image, prior, copies=self.sampling.mirrored_copies)
