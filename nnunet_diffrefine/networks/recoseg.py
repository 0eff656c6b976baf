"""ReCoSeg's networks: the synthesis of one channel; and synthesis, residual and segmentation in one module.

The second behaves like any nnU-Net network (image patch in, logits out), so a model folder is self-contained and
``nnUNetv2_predict`` and model zips work: see networks/refinement.py for the same idea around stage one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from nnunet_diffrefine.networks.refinement import mirrored_mean


class ChannelSynthesis(Protocol):
    """What the network needs of the synthesis method."""

    config: Any
    target: int

    def synthesise(self, denoiser: Any, image: Tensor, generator: torch.Generator) -> Tensor:  # noqa: ANN401
        """Image (B, C, *S) -> channel (B, 1, *S)."""


class ResidualSegmentation(Protocol):
    """What the network needs of the segmentation method."""

    foreground: Any
    image_channels: int

    def extra(self, synthetic: Tensor, real: Tensor) -> Tensor:
        """Additional channel."""

    def inputs(self, image: Tensor, extra: Tensor, scale: Tensor) -> Tensor:
        """Input of the segmentation network."""

    def shifted(self, logits: Tensor, thresholds: Tensor) -> Tensor:
        """Logits with the thresholds at 0."""


class SynthesisNetwork(nn.Module):
    """A denoiser and the method that draws a channel with it.

    Args:
        denoiser: network of (input (B, C, *S), t (B,)) -> (B, 1, *S).
        method: how the channel is drawn.
    """

    def __init__(self, denoiser: nn.Module, method: ChannelSynthesis) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.method = method

    def forward(self, x: Tensor, t: Tensor | None = None) -> Tensor:
        """The denoiser's output (B, 1, *S) at times ``t`` (B,), as in training.

        Raises:
            NotImplementedError: called without ``t``, as nnU-Net calls networks that segment.
        """
        if t is None:
            raise NotImplementedError(
                "ReCoSegSynthesisTrainer makes an image channel, not a segmentation. Predict with -tr ReCoSegTrainer; "
                "its out-of-fold channels come from: nnUNetv2_diffrefine export -tr ReCoSegSynthesisTrainer."
            )
        return self.denoiser(x, t)

    def synthesise(self, image: Tensor) -> Tensor:
        """The channel (B, 1, *S) of images (B, C, *S); the noise is that of the fixed seed, anew for each window.

        Raises:
            ValueError: the image is not finite.
        """
        if not torch.isfinite(image).all():
            raise ValueError("The image holds NaN or infinity. Repair the image.")
        seed = self.method.config.sampling.seed
        draws = []
        for window in image.split(1):
            generator = torch.Generator(device=image.device).manual_seed(seed)
            draws.append(self.method.synthesise(self.denoiser, window, generator))
        return torch.cat(draws)

    def real(self, image: Tensor) -> Tensor:
        """The real channel (B, 1, *S) of images (B, C, *S)."""
        return image[:, self.method.target : self.method.target + 1]


class Synthesiser(nn.Module):
    """The synthesis as nnU-Net's sliding window calls networks: image (B, C, *S) in, channel (B, 1, *S) out."""

    def __init__(self, network: SynthesisNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        """Draw the channel."""
        return self.network.synthesise(x)


class ReCoSegNetwork(nn.Module):
    """Image patch (B, C, *S) -> nnU-Net logits (B, H, *S), by way of the synthesis and its residual.

    Args:
        synthesis: frozen.
        segmenter: trainable, of the method's inputs.
        method: residual, inputs, decision.
        thresholds: of the foreground channels, (R,) in (0, 1), until they are calibrated.
        axes: spatial axes over whose mirrored copies the segmentation is averaged; the channel is drawn once.
    """

    def __init__(
        self,
        synthesis: SynthesisNetwork,
        segmenter: nn.Module,
        method: ResidualSegmentation,
        thresholds: Tensor,
        axes: Sequence[int] = (),
    ) -> None:
        super().__init__()
        self.synthesis = synthesis.requires_grad_(False)
        self.segmenter = segmenter
        self.method = method
        self.axes = tuple(axes)
        self.scale: Tensor
        self.thresholds: Tensor
        self.calibrated: Tensor
        # In the state dict: they are a fold's own, while nnU-Net keeps one plans.json for all folds.
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("thresholds", thresholds)
        self.register_buffer("calibrated", torch.tensor(False))
        frozen = [f"synthesis.{name}" for name in synthesis.state_dict()]
        self._ddp_params_and_buffers_to_ignore = [*frozen, "scale", "thresholds", "calibrated"]

    def train(self, mode: bool = True) -> ReCoSegNetwork:
        """Switch the segmentation's mode; the synthesis always stays in evaluation mode."""
        super().train(mode)
        self.synthesis.eval()
        return self

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """Segment.

        Args:
            x: image (B, C, *S): prediction, with mirroring and thresholds. Or image and its stored additional channel
                in SD, (B, C + 1, *S): the bare segmentation network, as in training.
        """
        if x.shape[1] > self.method.image_channels:
            return self.segment(x)
        with torch.no_grad():
            extra = self.method.extra(self.synthesis.synthesise(x), self.synthesis.real(x))
        return self.method.shifted(self.mirrored(torch.cat((x, extra), 1)), self.thresholds)

    def segment(self, stacked: Tensor) -> Any:  # noqa: ANN401 (a tensor, or a list with deep supervision)
        """Logits of image and additional channel (B, C + 1, *S), no mirroring, thresholds not applied."""
        return self.segmenter(self.method.inputs(stacked[:, :-1], stacked[:, -1:], self.scale))

    def mirrored(self, stacked: Tensor) -> Tensor:
        """The same, averaged over mirrored copies."""
        return mirrored_mean(lambda x: self.segment(x).float(), self.axes, stacked)


class StoredChannelNetwork(nn.Module):
    """Prediction from a stored additional channel, before thresholds: what the thresholds are chosen on."""

    def __init__(self, network: ReCoSegNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, H, *S) of image and additional channel (B, C + 1, *S)."""
        return self.network.mirrored(x)
