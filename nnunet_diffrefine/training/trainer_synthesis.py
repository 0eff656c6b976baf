"""``ReCoSegSynthesisTrainer``: nnU-Net's training loop around the diffusion of one image channel."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import nn
from torch.nn import functional as F

from nnunet_diffrefine.data.residuals import TargetChannelTransform
from nnunet_diffrefine.methods.recoseg import Synthesis
from nnunet_diffrefine.methods.recoseg_settings import SynthesisConfig
from nnunet_diffrefine.networks.precision import mixed_precision
from nnunet_diffrefine.networks.recoseg import SynthesisNetwork
from nnunet_diffrefine.paths import StageOneId
from nnunet_diffrefine.stage_one.export import export
from nnunet_diffrefine.training.plateau import HalvedOnPlateau
from nnunet_diffrefine.training.recoseg import prepare_synthesis
from nnunet_diffrefine.training.recoseg_build import synthesis_of
from nnunet_diffrefine.training.trainer_averaged import AveragedTrainer


class ReCoSegSynthesisTrainer(AveragedTrainer):
    """Learn to draw one image channel from the others; its validation exports the fold's out-of-fold syntheses.

    Overridden hooks beside those of :class:`AveragedTrainer`, everything else is nnU-Net's: ``__init__`` (checks),
    ``build_network_architecture``, ``configure_optimizers``, ``set_deep_supervision_enabled`` (none), transforms,
    ``train_step``, ``validation_step`` and the end of its epoch, ``perform_actual_validation``.

    nnU-Net's curves show the error in standard deviations as loss, and 1 / (1 + validation error) where it has Dice:
    there is no mask, and the best checkpoint is the one of the highest curve.
    """

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),  # noqa: B008 (nnU-Net's signature)
    ) -> None:
        prepared = prepare_synthesis(type(self).__name__, plans, configuration, fold, dataset_json)
        super().__init__(prepared.plans, configuration, fold, dataset_json, device)
        self.config: SynthesisConfig
        self.take_settings(prepared.config)
        self.channel = prepared.channel
        self.enable_deep_supervision = False

    @staticmethod
    def build_network_architecture(
        plans_manager: Any,  # noqa: ANN401
        configuration_manager: Any,  # noqa: ANN401
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = True,
    ) -> nn.Module:
        """The synthesis network, from the plans' ``diffrefine`` block; called by nnU-Net, at prediction too."""
        return synthesis_of(configuration_manager)

    @property
    def synthesis(self) -> SynthesisNetwork:
        """The network without its distributed wrapper."""
        return self.network.module if self.is_ddp else self.network

    @property
    def denoiser(self) -> nn.Module:
        """The part of the network that is trained: all of it."""
        return self.synthesis.denoiser

    @property
    def method(self) -> Synthesis:
        """The method the network was built for."""
        return self.synthesis.method  # type: ignore[return-value]

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, HalvedOnPlateau]:
        """Adam (AdamW where weights decay), its rate halved on plateaus."""
        training = self.config.training
        optimizer = torch.optim.AdamW(self.network.parameters(), self.initial_lr, weight_decay=self.weight_decay)
        return optimizer, HalvedOnPlateau(optimizer, training.minimum_rate, training.patience)

    def set_deep_supervision_enabled(self, enabled: bool) -> None:
        """Nothing to switch."""

    def get_training_transforms(
        self,
        *args: Any,  # noqa: ANN401 (nnU-Net's arguments)
        **kwargs: Any,  # noqa: ANN401
    ) -> BasicTransform:
        """nnU-Net's augmentation; the synthesised channel keeps its intensities."""
        return TargetChannelTransform(nnUNetTrainer.get_training_transforms(*args, **kwargs), self.channel.index)

    def train_step(self, batch: dict) -> dict:
        """One optimiser step on the method's loss; the reference is not looked at."""
        image = batch["data"].to(self.device, non_blocking=True)
        self.optimizer.zero_grad(set_to_none=True)
        with mixed_precision(self.device):
            loss = self.method.loss(self.network, image, self.generator)
        self.optimise(loss)
        return {"loss": loss.detach().cpu().numpy()}

    def validation_step(self, batch: dict) -> dict:
        """Mean absolute error of drawn channels, in standard deviations."""
        image = batch["data"].to(self.device, non_blocking=True)
        with torch.no_grad(), mixed_precision(self.device):
            drawn = self.synthesis.synthesise(image)
        return {"loss": F.l1_loss(drawn.float(), self.synthesis.real(image)).cpu().numpy()}

    def on_validation_epoch_end(self, val_outputs: list[dict]) -> None:
        """Log the error, and let the learning rate see it."""
        self._swap.__exit__(None, None, None)
        errors: list[Any] = [output["loss"] for output in val_outputs]
        if self.is_ddp:
            everyone: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(everyone, errors)
            errors = [error for rank in everyone for error in rank]
        error = float(np.mean(errors))
        self.lr_scheduler.observe(error)
        score = 1 / (1 + error)
        for key, value in (("val_losses", error), ("mean_fg_dice", score), ("dice_per_class_or_region", [score])):
            self.logger.log(key, value, self.current_epoch)

    def extra_state(self) -> dict[str, Any]:
        """The state of the plateau."""
        return {"plateau": self.lr_scheduler.state_dict()}

    def restore_extra_state(self, state: dict[str, Any]) -> None:
        """The state of the plateau."""
        self.lr_scheduler.load_state_dict(state["plateau"])

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """Export the fold's out-of-fold syntheses instead of segmenting; under DDP on the first rank only."""
        if self.is_ddp:
            dist.barrier()
        if self.local_rank != 0:
            return
        if self.disable_checkpointing:
            self.print_to_log_file("Checkpoints are disabled, so nothing could tie syntheses to a network: no export.")
            return
        plans = self.plans_manager
        own = StageOneId(type(self).__name__, plans.plans_name, self.configuration_name)
        self.print_to_log_file(f"Exporting the out-of-fold syntheses of {self.channel.name}, fold {self.fold}")
        export(plans.dataset_name, own, folds=[self.fold], device=self.device.type)
