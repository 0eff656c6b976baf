"""A planted problem: blobs that a noisy image shows; stage one is displaced, to a side that the image alone tells."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager
from torch import Tensor, nn
from torch.nn import functional as F

from nnunet_diffrefine.batch import Foreground, RefineBatch
from nnunet_diffrefine.config import RefineConfig, TrainingConfig
from nnunet_diffrefine.inference.volume import GivenPrior
from nnunet_diffrefine.methods import METHODS, AbstractRefineMethod
from nnunet_diffrefine.methods.recoseg import ReCoSeg, from_parts, to_parts
from nnunet_diffrefine.methods.recoseg_settings import ReCoSegConfig, SynthesisConfig, to_dict
from nnunet_diffrefine.networks.build import build_denoiser
from nnunet_diffrefine.networks.planned import planned_unet
from nnunet_diffrefine.networks.recoseg import ReCoSegNetwork, StoredChannelNetwork, SynthesisNetwork
from nnunet_diffrefine.networks.refinement import RefinementNetwork
from nnunet_diffrefine.plans import PAPER_LITERAL, merge, shipped_settings
from nnunet_diffrefine.stage_one.manifest import ChannelRecord
from nnunet_diffrefine.stage_one.residual import median_quantile, residual_quantiles
from nnunet_diffrefine.training.optimisation import WarmupCosine
from nnunet_diffrefine.training.recoseg_build import build_synthesis
from nnunet_diffrefine.training.trainer_calibration import flip_choice
from tests.builders import generator, nnunet_loss, target_of

SPACE = (10, 14, 16)
DISPLACEMENT = 2
"""Of stage one, in voxels."""
NOISE = 0.4
"""Standard deviation; that of the blobs' intensities is 1 a label."""
CONTRAST = 1.0
"""Of lesions in the planted channel; standard deviations of the channels are 0.8 to 1."""
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

CONFIGURATION = ConfigurationManager({"architecture": ARCHITECTURE})
LESION, TARGET = Foreground(("lesion",), exclusive=True), 1
"""Of the planted channels: what is segmented, and the index of the channel that is synthesised."""


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
    shown, channels = method.condition_channels(1), method.channels(1)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        denoiser = build_denoiser(method.config.condition, CONFIGURATION, shown, channels, method.foreground, False)
    return RefinementNetwork(stage_one or nn.Identity(), denoiser, method, method.foreground, method.config.sampling)


def train(network: RefinementNetwork, cases: RefineBatch, steps: int, size: int = 2, peak: float = 2e-2) -> None:
    """AdamW as in a real training; the peak of the learning rate suits the few steps."""
    method, loss = network.method, nnunet_loss(network.method.foreground)

    def loss_of(rows: Tensor, g: torch.Generator) -> Tensor:
        batch = RefineBatch(*(x[rows] for x in (cases.image, cases.prior, cases.reference, cases.valid, cases.target)))
        return method.loss(network, batch, loss, g)

    fit(network.denoiser, loss_of, len(cases.image), steps, method.config.training, size, peak)
    network.eval()


def fit(
    module: nn.Module,
    loss: Callable[[Tensor, torch.Generator], Tensor],
    cases: int,
    steps: int,
    config: TrainingConfig,
    size: int = 2,
    peak: float = 2e-2,
) -> None:
    """AdamW, warm-up and cosine on ``loss(rows, generator)``, of ``size`` rows drawn anew from so many cases."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, weight_decay=config.weight_decay)
    schedule, g = WarmupCosine(optimizer, peak, steps, config.warmup), generator(9)
    for step in range(steps):
        schedule.step(step)
        rows = torch.randperm(cases, generator=g)[:size]
        optimizer.zero_grad()
        loss(rows, g).backward()
        nn.utils.clip_grad_norm_(parameters, config.gradient_clip)
        optimizer.step()


@torch.no_grad()
def calibrate(network: RefinementNetwork, cases: RefineBatch) -> None:
    """Thresholds of held-out cases, as the trainer chooses them."""
    foreground = network.foreground
    evidence = GivenPrior(network, evidence=True)(torch.cat((cases.image, cases.prior), 1))[:, -foreground.channels :]
    choice = flip_choice(network.method, foreground)
    voxels = torch.cat((evidence, cases.prior), 1)
    for case in zip(voxels, cases.reference.bool(), cases.valid.bool(), strict=True):
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


# ReCoSeg


@cache
def planted_channels(size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images (size, 3, *SPACE) whose second channel is the distance of the others, and lesions (size, 1, *SPACE).

    A lesion is a ball in which the second channel is brighter or darker than that: no channel shows it by itself.
    """
    g = generator(seed)
    smooth = F.avg_pool3d(torch.randn(size, 2, *(n + 2 for n in SPACE), generator=g), 3, 1)
    first, last = (smooth / smooth.std()).split(1, 1)
    radius = 2.5 + torch.rand(size, 1, 1, 1, 1, generator=g)
    lesions = balls(torch.tensor([1.0, 3.0, 4.0]) * (2 * torch.rand(size, 3, generator=g) - 1), radius).clamp(max=1)
    sign = 2 * torch.randint(2, (size, 1, 1, 1, 1), generator=g) - 1
    return torch.cat((first, (first - last).abs() + CONTRAST * sign * lesions, last), 1), lesions


def trained_synthesis(images: Tensor, steps: int, seed: int = 0) -> SynthesisNetwork:
    """The synthesis of the planted channel with its preset, trained on images (B, 3, *SPACE)."""
    config = SynthesisConfig()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        record = ChannelRecord("T1ce", TARGET, images.shape[1], config.maximum, to_dict(config))
        network = build_synthesis(CONFIGURATION, record)

    def loss_of(rows: Tensor, g: torch.Generator) -> Tensor:
        return network.method.loss(network, images[rows], g)

    fit(network, loss_of, len(images), steps, RefineConfig().training, peak=1e-2)
    return network.eval()


@torch.no_grad()
def stored_parts(network: SynthesisNetwork, images: Tensor) -> Tensor:
    """What an export keeps of images (B, 3, *SPACE): excess and deficit of what is drawn, (B, 2, *SPACE)."""
    pairs = zip(network.synthesise(images), network.real(images), strict=True)
    return torch.stack([to_parts(drawn, real, SynthesisConfig().maximum) for drawn, real in pairs])


def trained_recoseg(
    synthesis: SynthesisNetwork, images: Tensor, parts: Tensor, lesions: Tensor, steps: int, seed: int = 0
) -> ReCoSegNetwork:
    """The segmentation with its preset, trained on images and stored parts as the trainer shows them."""
    method = ReCoSeg(ReCoSegConfig(), LESION, TARGET, images.shape[1], SynthesisConfig().maximum)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        segmenter = planned_unet(CONFIGURATION, method.input_channels, LESION.heads, deep_supervision=False)
    network = ReCoSegNetwork(synthesis, segmenter, method, torch.tensor([method.config.decision.threshold]))
    quantiles = [residual_quantiles(p.numpy(), i.numpy(), method.maximum) for p, i in zip(parts, images, strict=True)]
    network.scale.copy_(median_quantile(dict(enumerate(quantiles)), method.config.residual.saturation))
    stacked, loss = with_extra(method, images, parts), nnunet_loss(LESION)

    def loss_of(rows: Tensor, _: torch.Generator) -> Tensor:
        return loss(network(stacked[rows]), lesions[rows])

    fit(segmenter, loss_of, len(images), steps, RefineConfig().training)
    return network.eval()


def with_extra(method: ReCoSeg, images: Tensor, parts: Tensor) -> Tensor:
    """Images and their additional channel, (B, 4, *SPACE)."""
    real = images[:, TARGET : TARGET + 1]
    drawn = [from_parts(*pair, method.maximum) for pair in zip(parts, real, strict=True)]
    return torch.cat((images, method.extra(torch.stack(drawn), real)), 1)


@torch.no_grad()
def wrong_lesion_voxels(network: ReCoSegNetwork, images: Tensor, parts: Tensor, lesions: Tensor) -> int:
    """Voxels that the segmentation has wrong in all cases together."""
    logits = StoredChannelNetwork(network)(with_extra(network.method, images, parts))
    return int((LESION.decide(network.method.shifted(logits, network.thresholds)) != lesions).sum())
