"""The denoiser: the U-Net that nnU-Net planned, told the time t at every stage of encoder and decoder.

Three additions: a second encoder of the condition and a module behind the deepest stage, which papers ask for, and a
skip from the prior to the output.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nnunet_diffrefine.config import ConfigError
from nnunet_diffrefine.networks.condition_encoder import ConditionEncoder
from nnunet_diffrefine.networks.prior_skip import PriorSkip
from nnunet_diffrefine.networks.time_embedding import FiLM, TimeEmbedding


class TimeConditionedUNet(nn.Module):
    """A planned U-Net (PlainConvUNet or ResidualEncoderUNet) with feature-wise modulation by t after every stage.

    Args:
        unet: network with ``encoder.stages``, ``decoder.stages``, ``decoder.transpconvs``, ``decoder.seg_layers``.
        embedding_size: width of the time embedding.
        condition: encoder of the condition, or None.
        bottleneck: module behind the deepest stage, features (B, width, *s) to the same, or None.
        skip: what is added to the outputs, whose layers then start at zero, or None.

    Raises:
        NotImplementedError: the planned architecture has no such stages.
    """

    def __init__(
        self,
        unet: Any,  # noqa: ANN401 (nnU-Net's untyped networks)
        embedding_size: int = 128,
        condition: ConditionEncoder | None = None,
        bottleneck: nn.Module | None = None,
        skip: PriorSkip | None = None,
    ) -> None:
        super().__init__()
        _require_stages(unet)
        self.unet: Any = unet
        self.condition = condition
        self.bottleneck = bottleneck
        self.skip = skip
        if skip is not None:
            for parameter in unet.decoder.seg_layers.parameters():
                nn.init.zeros_(parameter)
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

    def forward(self, x: Tensor, t: Tensor, features: list[Tensor] | None = None) -> Tensor | list[Tensor]:
        """Map input (B, C_in, *S) at times t (B,) to (B, C_out, *S), or to a list of them, finest first.

        Args:
            x: condition and state.
            t: times.
            features: of the condition, where they are known already (:meth:`condition_features`); (B, ., *s), or fewer
                if the batch is a repetition of fewer conditions.
        """
        embedding = self.time(t)
        if features is None and self.condition is not None:
            features = self.condition(x[:, : self.condition.channels])
        skips = self._encode(x, embedding, features)
        output = self._decode(skips, embedding)
        return output if self.skip is None else self.skip(x, output)

    def condition_features(self, condition: Tensor) -> list[Tensor] | None:
        """What need not be computed again at every step, of a condition (B, C_cond, *S)."""
        return None if self.condition is None else self.condition(condition)

    def _encode(self, x: Tensor, embedding: Tensor, features: list[Tensor] | None) -> list[Tensor]:
        encoder = self.unet.encoder
        stem = getattr(encoder, "stem", None)
        h, skips = (x if stem is None else stem(x)), []
        for i, (stage, film) in enumerate(zip(encoder.stages, self.encoder_film, strict=True)):
            h = film(stage(h), embedding)
            if self.condition is not None and features is not None:
                h = self.condition.fusions[i](h, _repeated(features[i], len(h)))
            skips.append(h)
        if self.bottleneck is not None:
            skips[-1] = self.bottleneck(skips[-1])
        return skips

    def _decode(self, skips: list[Tensor], embedding: Tensor) -> Tensor | list[Tensor]:
        decoder = self.unet.decoder
        h, outputs = skips.pop(), []
        for i, (up, stage, film) in enumerate(zip(decoder.transpconvs, decoder.stages, self.decoder_film, strict=True)):
            h = film(stage(torch.cat((up(h), skips.pop()), 1)), embedding)
            if decoder.deep_supervision or not skips:
                outputs.append(decoder.seg_layers[i](h))
        return outputs[::-1] if decoder.deep_supervision else outputs[0]

    def start_from(self, weights: dict[str, Tensor], head: bool = True) -> int:
        """Copy another U-Net's weights, its encoder's also into the encoder of the condition.

        Input convolutions get zeros for the new channels. Output layers are copied where shapes agree.

        Args:
            weights: state dict of a U-Net of the same plan whose inputs are this one's first channels.
            head: copy the output layers too; they stay as they are if the outputs are no masks, or with a skip.

        Returns:
            The number of tensors copied.

        Raises:
            ConfigError: some of them, output layers aside, have no place here; nothing is copied then.
        """
        head = head and self.skip is None
        _refuse_strangers(self.unet, weights)
        copied = _copy_into(self.unet, {k: v for k, v in weights.items() if head or "seg_layers" not in k})
        if self.condition is None:
            return copied
        start = "encoder."
        inner = {k.removeprefix(start): v for k, v in weights.items() if k.startswith(start)}
        return copied + _copy_into(self.condition.encoder, inner)


def _refuse_strangers(module: nn.Module, weights: dict[str, Tensor]) -> None:
    own = module.state_dict()
    inner = {name: value for name, value in weights.items() if "seg_layers" not in name}
    if strangers := [name for name, value in inner.items() if name not in own or not _fits(value, own[name])]:
        raise ConfigError(
            "diffrefine setting 'training.initial_weights' is 'stage_one', but stage one is another architecture than "
            f"the refiner: {len(strangers)} of its {len(weights)} tensors have no place there, the first is "
            f"{strangers[0]}. Set training.initial_weights=random, or train the refiner on stage one's plans (-p)."
        )


def _fits(value: Tensor, target: Tensor) -> bool:
    """Whether a tensor can be copied into another, of the same shape or of more input channels."""
    alike = target.shape[:1] == value.shape[:1] and target.shape[2:] == value.shape[2:]
    return target.shape == value.shape or (alike and value.ndim > 2 and target.shape[1] > value.shape[1])


def _copy_into(module: nn.Module, weights: dict[str, Tensor]) -> int:
    """Copy tensors that fit under their name, with zeros for new input channels; the number of them."""
    own, copied = module.state_dict(), 0
    for name, value in weights.items():
        target = own.get(name)
        if target is None or not _fits(value, target):
            continue
        if target.shape != value.shape:
            target.zero_()
            target = target[:, : value.shape[1]]
        target.copy_(value)
        copied += 1
    return copied


def _repeated(features: Tensor, size: int) -> Tensor:
    """Features of a batch (b, ., *s), once for every repetition of it in a batch of ``size``."""
    return features if len(features) == size else features.repeat(size // len(features), *([1] * (features.ndim - 1)))


def _require_stages(unet: nn.Module) -> None:
    wanted = {"encoder": ("stages", "output_channels"), "decoder": ("stages", "transpconvs", "seg_layers")}
    for part, attributes in wanted.items():
        for attribute in attributes:
            if not hasattr(getattr(unet, part, None), attribute):
                raise NotImplementedError(
                    f"The planned network {type(unet).__name__} has no {part}.{attribute}. The refiner conditions "
                    "PlainConvUNet and ResidualEncoderUNet; train it with plans that use one of them (-p nnUNetPlans)."
                )
