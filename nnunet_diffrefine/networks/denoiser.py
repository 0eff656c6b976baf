"""The denoiser: the U-Net that nnU-Net planned, told the time t at every stage of encoder and decoder."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nnunet_diffrefine.networks.time_embedding import FiLM, TimeEmbedding


class TimeConditionedUNet(nn.Module):
    """A planned U-Net (PlainConvUNet or ResidualEncoderUNet) with feature-wise modulation by t after every stage.

    Args:
        unet: network with ``encoder.stages``, ``decoder.stages``, ``decoder.transpconvs``, ``decoder.seg_layers``.
        embedding_size: width of the time embedding.

    Raises:
        NotImplementedError: the planned architecture has no such stages.
    """

    def __init__(self, unet: Any, embedding_size: int = 128) -> None:  # noqa: ANN401 (nnU-Net's untyped networks)
        super().__init__()
        _require_stages(unet)
        self.unet: Any = unet
        self.time = TimeEmbedding(embedding_size)
        if not self.deep_supervision:  # outputs that are never used would wait for gradients in distributed training
            unet.decoder.seg_layers[:-1].requires_grad_(False)
        widths = list(unet.encoder.output_channels)
        self.encoder_film = nn.ModuleList(FiLM(embedding_size, width) for width in widths)
        self.decoder_film = nn.ModuleList(FiLM(embedding_size, width) for width in reversed(widths[:-1]))

    @property
    def deep_supervision(self) -> bool:
        """Whether :meth:`forward` returns one output a decoder stage, finest first."""
        return bool(self.unet.decoder.deep_supervision)

    @deep_supervision.setter
    def deep_supervision(self, enabled: bool) -> None:
        self.unet.decoder.deep_supervision = enabled

    def forward(self, x: Tensor, t: Tensor) -> Tensor | list[Tensor]:
        """Map input (B, C_in, *S) at times t (B,) to (B, C_out, *S), or to a list of them, finest first."""
        embedding = self.time(t)
        skips = self._encode(x, embedding)
        return self._decode(skips, embedding)

    def _encode(self, x: Tensor, embedding: Tensor) -> list[Tensor]:
        encoder = self.unet.encoder
        stem = getattr(encoder, "stem", None)
        h, skips = (x if stem is None else stem(x)), []
        for stage, film in zip(encoder.stages, self.encoder_film, strict=True):
            h = film(stage(h), embedding)
            skips.append(h)
        return skips

    def _decode(self, skips: list[Tensor], embedding: Tensor) -> Tensor | list[Tensor]:
        decoder = self.unet.decoder
        h, outputs = skips.pop(), []
        for i, (up, stage, film) in enumerate(zip(decoder.transpconvs, decoder.stages, self.decoder_film, strict=True)):
            h = film(stage(torch.cat((up(h), skips.pop()), 1)), embedding)
            if decoder.deep_supervision or not skips:
                outputs.append(decoder.seg_layers[i](h))
        return outputs[::-1] if decoder.deep_supervision else outputs[0]

    def start_from(self, weights: dict[str, Tensor]) -> int:
        """Copy another U-Net's weights where shapes agree; input convolutions get zeros for the new channels.

        Args:
            weights: state dict of a U-Net of the same plan whose inputs are this one's first channels.

        Returns:
            The number of tensors copied.
        """
        own, copied = self.unet.state_dict(), 0
        for name, value in weights.items():
            if name not in own:
                continue
            target, fits = own[name], own[name].shape[2:] == value.shape[2:] and own[name].shape[:1] == value.shape[:1]
            if target.shape == value.shape:
                target.copy_(value)
            elif fits and value.ndim > 2 and target.shape[1] > value.shape[1]:
                target.zero_()
                target[:, : value.shape[1]].copy_(value)
            else:
                continue
            copied += 1
        return copied


def _require_stages(unet: nn.Module) -> None:
    wanted = {"encoder": ("stages", "output_channels"), "decoder": ("stages", "transpconvs", "seg_layers")}
    for part, attributes in wanted.items():
        for attribute in attributes:
            if not hasattr(getattr(unet, part, None), attribute):
                raise NotImplementedError(
                    f"The planned network {type(unet).__name__} has no {part}.{attribute}. The refiner conditions "
                    "PlainConvUNet and ResidualEncoderUNet; train it with plans that use one of them (-p nnUNetPlans)."
                )
