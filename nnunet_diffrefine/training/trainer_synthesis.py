"""``ReCoSegSynthesisTrainer``: nnU-Net's training loop around the diffusion of one image channel."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import numpy as np
import torch
import torch.distributed as dist
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import Tensor, nn
from torch.nn import functional as F

from nnunet_diffrefine.data.residuals import TargetChannelTransform
from nnunet_diffrefine.methods.recoseg import Synthesis
from nnunet_diffrefine.methods.recoseg_settings import SynthesisConfig
from nnunet_diffrefine.networks.recoseg import SynthesisNetwork
from nnunet_diffrefine.paths import StageOneId
from nnunet_diffrefine.stage_one.export import export
from nnunet_diffrefine.training.optimisation import ema_model, swapped_weights
from nnunet_diffrefine.training.plateau import HalvedOnPlateau
from nnunet_diffrefine.training.recoseg import prepare_synthesis
from nnunet_diffrefine.training.recoseg_build import synthesis_of
from nnunet_diffrefine.training.trainer import mixed_precision


class ReCoSegSynthesisTrainer(nnUNetTrainer):
    """Learn to draw one image channel from the others; its validation exports the fold's out-of-fold syntheses.

    Overridden hooks, everything else is nnU-Net's: ``__init__`` (checks first), ``build_network_architecture``,
    ``initialize`` (EMA, compilation), ``configure_optimizers``, ``set_deep_supervision_enabled`` (none), mirroring
    axes (none at inference), transforms, ``train_step``, ``validation_step`` and the epoch hooks around them,
    checkpoints (EMA weights for inference, raw ones to resume), ``perform_actual_validation``.

    nnU-Net's curves show the error in standard deviations as loss, and 1 / (1 + validation error) where it has Dice:
    there is no mask, and the best checkpoint is the one of the highest curve.
    """

    length: ClassVar[dict[str, int]] = {}
    """nnU-Net's attributes that a shorter variant changes, such as ``num_epochs``."""

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
        self.config: SynthesisConfig = prepared.config
        self.channel = prepared.channel
        for name, value in self.length.items():
            setattr(self, name, value)
        self.initial_lr = self.config.training.learning_rate
        self.weight_decay = self.config.training.weight_decay
        self.enable_deep_supervision = False
        self.generator = torch.Generator(device=self.device)

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

    def initialize(self) -> None:
        """nnU-Net's set-up, then the averaged denoiser and, on CUDA, its compilation."""
        super().initialize()
        self.ema = ema_model(self.synthesis.denoiser, self.config.training.ema_decay)
        if super()._do_i_compile():
            self.synthesis.denoiser.compile()

    def _do_i_compile(self) -> bool:
        # Only the denoiser is compiled (initialize): sampling has branches that depend on the data.
        return False

    @property
    def synthesis(self) -> SynthesisNetwork:
        """The network without its distributed wrapper."""
        return self.network.module if self.is_ddp else self.network

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

    def configure_rotation_dummyDA_mirroring_and_inital_patch_size(self) -> tuple:  # noqa: N802 (nnU-Net's name)
        """As nnU-Net, but without mirroring at inference, where a channel is drawn once."""
        settings = super().configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        self.inference_allowed_mirroring_axes = None
        return settings

    def get_training_transforms(
        self,
        *args: Any,  # noqa: ANN401 (nnU-Net's arguments)
        **kwargs: Any,  # noqa: ANN401
    ) -> BasicTransform:
        """nnU-Net's augmentation; the synthesised channel keeps its intensities."""
        return TargetChannelTransform(nnUNetTrainer.get_training_transforms(*args, **kwargs), self.channel.index)

    def on_train_epoch_start(self) -> None:
        """Start an epoch with draws that depend on fold, epoch and rank alone."""
        super().on_train_epoch_start()
        self.generator.manual_seed(1_000_003 * (self.fold + 1) + 1_009 * self.current_epoch + self.local_rank)

    def train_step(self, batch: dict) -> dict:
        """One optimiser step on the method's loss; the reference is not looked at."""
        image = batch["data"].to(self.device, non_blocking=True)
        self.optimizer.zero_grad(set_to_none=True)
        with mixed_precision(self.device):
            loss = self.method.loss(self.network, image, self.generator)
        self._optimise(loss)
        self.ema.update_parameters(self.synthesis.denoiser)
        return {"loss": loss.detach().cpu().numpy()}

    def _optimise(self, loss: Tensor) -> None:
        scaler = self.grad_scaler
        (loss if scaler is None else scaler.scale(loss)).backward()
        if scaler is not None:
            scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.network.parameters(), self.config.training.gradient_clip)
        if scaler is None:
            self.optimizer.step()
            return
        scaler.step(self.optimizer)
        scaler.update()

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Use the averaged (EMA) weights inside the block."""
        with swapped_weights(self.synthesis.denoiser, self.ema):
            yield

    def on_validation_epoch_start(self) -> None:
        """Validate what inference will use: the averaged weights."""
        super().on_validation_epoch_start()
        self._swap = self.averaged_weights()
        self._swap.__enter__()

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

    def save_checkpoint(self, filename: str) -> None:
        """Write nnU-Net's checkpoint with the averaged weights, plus what resuming needs, atomically."""
        if self.local_rank != 0 or self.disable_checkpointing:
            super().save_checkpoint(filename)
            return
        temporary = f"{filename}.tmp"
        with self.averaged_weights():
            super().save_checkpoint(temporary)
        checkpoint = torch.load(temporary, map_location="cpu", weights_only=False)
        checkpoint["diffrefine"] = {
            "denoiser": self.synthesis.denoiser.state_dict(),
            "ema": self.ema.state_dict(),
            "plateau": self.lr_scheduler.state_dict(),
        }
        torch.save(checkpoint, temporary)
        os.replace(temporary, filename)

    def load_checkpoint(self, filename_or_checkpoint: str) -> None:
        """Restore nnU-Net's state, then the raw and averaged weights and the plateau.

        Raises:
            RuntimeError: the file cannot be read, or another trainer wrote it.
        """
        try:
            checkpoint = torch.load(filename_or_checkpoint, map_location=self.device, weights_only=False)
            extra = checkpoint["diffrefine"]
        except (RuntimeError, EOFError, KeyError, OSError) as error:
            raise RuntimeError(
                f"{filename_or_checkpoint} is not a complete checkpoint of {type(self).__name__} ({error}). "
                "Delete it; --c then continues from the next older one (latest, best), or starts anew."
            ) from error
        super().load_checkpoint(filename_or_checkpoint)
        self.synthesis.denoiser.load_state_dict(extra["denoiser"])
        self.ema.load_state_dict(extra["ema"])
        self.lr_scheduler.load_state_dict(extra["plateau"])

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
