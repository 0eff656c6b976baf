"""What the tests of Re-DiffiNet, its relatives and its baseline share: presets, true denoisers, a problem to learn."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from nnunet_diffrefine.batch import Foreground, RefineBatch
from nnunet_diffrefine.methods.composition import ComposedMethod
from nnunet_diffrefine.networks.condition_encoder import ConditionEncoder
from nnunet_diffrefine.networks.denoiser import TimeConditionedUNet
from nnunet_diffrefine.plans import PAPER_LITERAL, merge, shipped_settings
from tests.builders import batch_of, generator, method_of, nnunet_loss, unet

NESTED = Foreground(("whole", "core"), exclusive=False, parents=(None, 0))


def preset_of(foreground: Foreground, name: str, literal: bool = False, **changes: dict) -> ComposedMethod:
    """A method as its preset has it, with changes."""
    block = {PAPER_LITERAL: literal, **changes}
    settings = merge(shipped_settings(name, block), block)
    del settings["method"]
    return method_of(foreground, name, **settings)


def denoiser_of(method: ComposedMethod, image_channels: int = 1, seed: int = 0) -> TimeConditionedUNet:
    """A planned U-Net with the encoder that the method asks for."""
    config, shown = method.config.condition, method.condition_channels(image_channels)
    inputs, outputs = method.channels(image_channels)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        encoder = None
        if config.encoder:
            encoder = ConditionEncoder(unet(inputs=shown, outputs=outputs, seed=seed + 1).encoder, shown, config.fusion)
        return TimeConditionedUNet(unet(inputs=inputs, outputs=outputs, seed=seed), 16, condition=encoder)


class Recording:
    """A denoiser that keeps its inputs, times and outputs."""

    def __init__(self, network: torch.nn.Module) -> None:
        self.network = network
        self.inputs: list[Tensor] = []
        self.times: list[Tensor] = []
        self.outputs: list[Tensor] = []

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        self.inputs.append(x.detach())
        self.times.append(t)
        self.outputs.append(self.network(x, t))
        return self.outputs[-1]


def visible(foreground: Foreground, size: int, seed: int) -> RefineBatch:
    """A batch whose image shows the reference under noise, so that stage one's mistakes can be seen."""
    batch = batch_of(foreground, size, seed)
    shown = batch.reference[:, :1] - batch.reference[:, 1:]
    if not foreground.exclusive:
        shown = batch.reference.sum(1, keepdim=True)
    noise = torch.randn(shown.shape, generator=generator(300 + seed))
    return replace(batch, image=shown + 0.1 * noise)


def errors_left(foreground: Foreground, name: str, steps: int = 60, **changes: dict) -> float:
    """Share of stage one's wrong voxels on unseen cases that are wrong after a short training."""
    method = preset_of(foreground, name, **merge({"training": {"deep_supervision": False}}, changes))
    denoiser, loss = denoiser_of(method), nnunet_loss(foreground)
    optimiser, draws = torch.optim.Adam(denoiser.parameters(), 1e-2), generator(1)
    for step in range(steps):
        optimiser.zero_grad()
        method.loss(denoiser, visible(foreground, 4, step), loss, draws).backward()
        optimiser.step()
    unseen = visible(foreground, 4, 1000)
    with torch.no_grad():
        refined = foreground.decide(method.refine(denoiser, unseen.image, unseen.prior, generator()))
    before = foreground.decide(foreground.logits(unseen.prior)) != unseen.reference
    return float((refined != unseen.reference).sum() / before.sum())
