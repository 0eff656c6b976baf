"""Small random pieces that the unit tests share: foregrounds, batches, networks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from nnunetv2.training.loss.compound_losses import DC_and_BCE_loss, DC_and_CE_loss
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from torch import Tensor, nn

from nnunet_diffrefine.batch import Foreground, RefineBatch
from nnunet_diffrefine.config import RefineConfig
from nnunet_diffrefine.diffusion.process import per_sample
from nnunet_diffrefine.methods import METHODS, AbstractRefineMethod
from nnunet_diffrefine.networks.refinement import RefinementNetwork

SPACE = (4, 8, 12)
IGNORE = 3
LABELS = Foreground(("edema", "core"), exclusive=True)
REGIONS = Foreground(("whole", "core"), exclusive=False)  # label 1 or 2, label 2


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def with_ignore(foreground: Foreground) -> Foreground:
    return replace(foreground, ignore_label=IGNORE)


def label_maps(foreground: Foreground, size: int = 2, seed: int = 0) -> Tensor:
    """Label maps (size, 1, *SPACE) of 0, 1, 2 in blobs, with IGNORE in the first two slices where there is one."""
    noise = torch.randn(size, 3, *SPACE, generator=generator(seed))
    labels = nn.functional.avg_pool3d(noise, 3, 1, 1).argmax(1, keepdim=True)
    if foreground.ignore_label is not None:
        labels[:, :, :2] = foreground.ignore_label
    return labels.float()


def target_of(foreground: Foreground, labels: Tensor) -> Tensor:
    """Label maps as nnU-Net hands them to its loss."""
    if foreground.exclusive:
        return labels
    regions = [(labels == 1) | (labels == 2), labels == 2]
    ignored = [] if foreground.ignore_label is None else [labels == foreground.ignore_label]
    return torch.cat(regions + ignored, 1)


def stage_one_logits(foreground: Foreground, labels: Tensor, seed: int = 0) -> Tensor:
    """Logits (B, H, *SPACE) that often agree with ``labels`` and are never sure."""
    reference, _ = foreground.from_target(target_of(foreground, labels))
    truth = torch.cat((1 - reference.amax(1, keepdim=True), reference), 1) if foreground.exclusive else reference
    return 2 * truth - 1 + torch.randn(truth.shape, generator=generator(100 + seed))


def batch_of(foreground: Foreground, size: int = 2, seed: int = 0, image_channels: int = 1) -> RefineBatch:
    labels = label_maps(foreground, size, seed)
    image = torch.randn(size, image_channels, *SPACE, generator=generator(200 + seed))
    prior = foreground.probabilities(stage_one_logits(foreground, labels, seed))
    return RefineBatch.from_nnunet(torch.cat((image, prior), 1), target_of(foreground, labels), foreground)


def nnunet_loss(foreground: Foreground) -> nn.Module:
    """nnU-Net's own loss, as its trainer builds it without deep supervision."""
    ignore, dice = foreground.ignore_label, {"batch_dice": False, "smooth": 1e-5, "ddp": False}
    if foreground.exclusive:
        return DC_and_CE_loss({**dice, "do_bg": False}, {}, ignore_label=ignore, dice_class=MemoryEfficientSoftDiceLoss)
    return DC_and_BCE_loss(
        {}, {**dice, "do_bg": True}, use_ignore_label=ignore is not None, dice_class=MemoryEfficientSoftDiceLoss
    )


def method_of(foreground: Foreground, name: str = "bridge", **settings: dict[str, Any]) -> AbstractRefineMethod:
    """Build a method from nested settings, e.g. ``process={"timesteps": 4}``; noise is predicted without recycling."""
    if settings.get("process", {}).get("prediction", "x0") in ("epsilon", "v"):
        settings["training"] = {**settings.get("training", {}), "recycling": 0.0}
    config = RefineConfig.from_dict({"method": name, **settings})
    return METHODS[name](config, foreground)


def unet(
    kind: str = "plain", inputs: int = 2, outputs: int = 3, deep_supervision: bool = False, seed: int = 0
) -> nn.Module:
    """nnU-Net's networks with three stages of 4, 6 and 8 features, for sides that are multiples of 4."""
    shared = {
        "input_channels": inputs, "n_stages": 3, "features_per_stage": [4, 6, 8], "conv_op": nn.Conv3d,
        "kernel_sizes": [[3, 3, 3]] * 3, "strides": [[1, 1, 1], [2, 2, 2], [2, 2, 2]], "num_classes": outputs,
        "n_conv_per_stage_decoder": [1, 1], "conv_bias": True, "norm_op": nn.InstanceNorm3d,
        "norm_op_kwargs": {"eps": 1e-5, "affine": True}, "nonlin": nn.LeakyReLU, "nonlin_kwargs": {"inplace": True},
        "deep_supervision": deep_supervision,
    }  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if kind == "plain":
            return PlainConvUNet(**shared, n_conv_per_stage=[1, 1, 1])
        return ResidualEncoderUNet(**shared, n_blocks_per_stage=[1, 1, 1])


class TinyDenoiser(nn.Module):
    """A convolution that is told the time and mixes its neighbours unevenly: not equivariant to mirroring.

    Batch elements do not touch each other.
    """

    def __init__(self, inputs: int, outputs: int, seed: int = 0, kernel: int = 3) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.convolution = nn.Conv3d(inputs, outputs, kernel, padding=kernel // 2)
            self.time = nn.Linear(1, outputs)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        shift = self.time(torch.log1p(t.to(x.dtype))[:, None])
        return 3 * self.convolution(x) + shift.view(*shift.shape, 1, 1, 1)


def network_of(
    foreground: Foreground, name: str = "bridge", seed: int = 0, axes: tuple[int, ...] = (), **settings: dict[str, Any]
) -> RefinementNetwork:
    """Stage one and refiner, a convolution each, for images of one channel; both mirrored over ``axes``."""
    method = method_of(foreground, name, **settings)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        stage_one = nn.Conv3d(1, foreground.heads, 3, padding=1)
    denoiser = TinyDenoiser(*method.channels(1), seed=seed + 1)
    return RefinementNetwork(stage_one, denoiser, method, foreground, method.config.sampling, axes, axes)


def for_seeds(values: Tensor, x: Tensor) -> Tensor:
    """Values (B, ., *S) once for each seed in a denoiser's input, whose batch is B times the seeds."""
    return values.repeat(len(x) // len(values), 1, 1, 1, 1)


def true_output(method: AbstractRefineMethod, clean: Tensor, x: Tensor, t: Tensor) -> Tensor:
    """What a perfect denoiser outputs for input ``x`` (condition, state) if the target is ``clean`` (B, R, *S)."""
    prediction, clean = method.config.process.prediction, for_seeds(clean, x)
    if prediction == "x0":
        if method.config.error.target == "mask":
            return method.foreground.logits(clean)
        if method.config.error.target == "absolute":
            return torch.logit(clean, eps=1e-6)
        return 20 * torch.stack((clean < 0, clean == 0, clean > 0), 1).float().flatten(1, 2)
    x_t = x[:, -clean.shape[1] :]
    if prediction == "flip":
        return torch.logit((x_t - clean).abs() if method.config.paper_literal else clean, eps=1e-6)
    signal_share = per_sample(method.process.alpha_bar(t), x_t)
    scaled = method.config.process.input_scale * method.to_state(clean)
    noise = (x_t - signal_share.sqrt() * scaled) / (1 - signal_share).sqrt()
    return noise if prediction == "epsilon" else signal_share.sqrt() * noise - (1 - signal_share).sqrt() * scaled
