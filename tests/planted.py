"""A planted problem: blobs that a noisy image shows; stage one is displaced, to a side that the image alone tells."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager
from torch import Tensor, nn
from torch.nn import functional as F

from nnunet_diffrefine.batch import Foreground, RefineBatch
from nnunet_diffrefine.config import RefineConfig
from nnunet_diffrefine.inference.volume import GivenPrior
from nnunet_diffrefine.methods import METHODS, AbstractRefineMethod
from nnunet_diffrefine.networks.build import build_denoiser
from nnunet_diffrefine.networks.refinement import RefinementNetwork
from nnunet_diffrefine.plans import PAPER_LITERAL, merge, shipped_settings
from nnunet_diffrefine.training.optimisation import WarmupCosine
from nnunet_diffrefine.training.thresholds import ThresholdChoice
from tests.builders import generator, nnunet_loss, target_of

SPACE = (10, 14, 16)
DISPLACEMENT = 2
"""Of stage one, in voxels."""
NOISE = 0.4
"""Standard deviation; that of the blobs' intensities is 1 a label."""
ARCHITECTURE = {
    "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
    "arch_kwargs": {
        "n_stages": 2, "features_per_stage": [8, 16], "conv_op": "torch.nn.modules.conv.Conv3d",
        "kernel_sizes": [[3, 3, 3]] * 2, "strides": [[1, 1, 1], [2, 2, 2]], "n_conv_per_stage": [1, 1],
        "n_conv_per_stage_decoder": [1], "conv_bias": True, "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
        "norm_op_kwargs": {"eps": 1e-5, "affine": True}, "dropout_op": None, "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU", "nonlin_kwargs": {"inplace": True},
    },
    "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
}  # fmt: skip


@cache
def planted_cases(foreground: Foreground, size: int, seed: int, sides: tuple[int, ...] = (-1, 1)) -> RefineBatch:
    """Cases (size, ., *SPACE): a ball of label 2 in one of label 1, of intensities 2 and 1 on 0, in noise.

    Stage one's probabilities are the blurred truth, displaced along the last axis to one of the ``sides``, which is
    drawn apart from everything that stage one shows: with both of them the image alone tells.
    """
    g = generator(seed)
    radius = 3.25 + torch.rand(size, 1, 1, 1, 1, generator=g)
    jitter = torch.tensor([0.5, 2.0, 1.0]) * (2 * torch.rand(size, 3, generator=g) - 1)
    noise = NOISE * torch.randn(size, 1, *SPACE, generator=g)
    shift = torch.zeros(size, 3)
    shift[:, 2] = DISPLACEMENT * torch.tensor(sides)[torch.randint(len(sides), (size,), generator=g)]
    labels, seen = balls(jitter - shift, radius), balls(jitter, radius)
    target, displaced = target_of(foreground, labels), foreground.from_target(target_of(foreground, seen))[0]
    prior = F.avg_pool3d(displaced, 3, 1, 1)
    return RefineBatch.from_nnunet(torch.cat((labels + noise, prior), 1), target, foreground)


def balls(offset: Tensor, radius: Tensor) -> Tensor:
    """Label maps (B, 1, *SPACE) of balls about the middle plus ``offset`` (B, 3)."""
    grid = torch.stack(torch.meshgrid(*(torch.arange(n) - (n - 1) / 2 for n in SPACE), indexing="ij"))
    distance = (grid - offset.view(-1, 3, 1, 1, 1)).norm(dim=1, keepdim=True)
    return (distance < radius).float() + (distance < 0.6 * radius).float()


def shipped_method(
    name: str, foreground: Foreground, literal: bool = False, **changes: Mapping[str, Any]
) -> AbstractRefineMethod:
    """A method with its preset, or as its paper prints it; at most two seeds, one output scale, and ``changes``."""
    values = shipped_settings(name, {PAPER_LITERAL: literal})
    seeds = min(values.get("sampling", {}).get("samples", 1), 2)
    short = {"sampling": {"samples": seeds}, "training": {"deep_supervision": False}}
    values = merge(merge(values, short), changes)
    return METHODS[name](RefineConfig.from_dict(values), foreground)


def network_with(method: AbstractRefineMethod, stage_one: nn.Module | None = None, seed: int = 0) -> RefinementNetwork:
    """Refiner of the architecture above for images of one channel; no stage one is needed where its prior is given."""
    configuration = ConfigurationManager({"architecture": ARCHITECTURE})
    shown, channels = method.condition_channels(1), method.channels(1)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        denoiser = build_denoiser(method.config.condition, configuration, shown, channels, method.foreground, False)
    return RefinementNetwork(stage_one or nn.Identity(), denoiser, method, method.foreground, method.config.sampling)


def train(network: RefinementNetwork, cases: RefineBatch, steps: int, size: int = 2, peak: float = 2e-2) -> None:
    """AdamW as in a real training; the peak of the learning rate suits the few steps."""
    method, config = network.method, network.method.config.training
    parameters = [p for p in network.denoiser.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, weight_decay=config.weight_decay)
    schedule, loss, g = (
        WarmupCosine(optimizer, peak, steps, config.warmup),
        nnunet_loss(method.foreground),
        generator(9),
    )
    for step in range(steps):
        schedule.step(step)
        rows = torch.randperm(len(cases.image), generator=g)[:size]
        batch = RefineBatch(*(x[rows] for x in (cases.image, cases.prior, cases.reference, cases.valid, cases.target)))
        optimizer.zero_grad()
        method.loss(network, batch, loss, g).backward()
        nn.utils.clip_grad_norm_(parameters, config.gradient_clip)
        optimizer.step()
    network.eval()


@torch.no_grad()
def calibrate(network: RefinementNetwork, cases: RefineBatch) -> None:
    """Thresholds of held-out cases, as the trainer chooses them."""
    foreground = network.foreground
    evidence = GivenPrior(network, evidence=True)(torch.cat((cases.image, cases.prior), 1))[:, -foreground.channels :]
    choice = ThresholdChoice(network.method.decide, foreground)
    for case in zip(evidence, cases.prior, cases.reference.bool(), cases.valid.bool(), strict=True):
        choice.add(*case)
    network.thresholds.copy_(torch.tensor(choice.best()).logit())


def decided(foreground: Foreground, cases: RefineBatch) -> Tensor:
    """Stage one's decision (B, R, *S)."""
    return foreground.decide(foreground.logits(cases.prior))


@torch.no_grad()
def wrong_voxels(network: RefinementNetwork, cases: RefineBatch) -> tuple[int, int]:
    """Voxels that any channel has wrong in all cases together, of stage one and refined."""
    refined = network.foreground.decide(GivenPrior(network)(torch.cat((cases.image, cases.prior), 1)))
    before, after = (
        int((mask != cases.reference).any(1).sum()) for mask in (decided(network.foreground, cases), refined)
    )
    return before, after
