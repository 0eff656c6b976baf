"""``DiffRefineTrainer``: nnU-Net's training loop around a denoiser that corrects stage one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import nn

from nnunet_diffrefine.batch import RefineBatch
from nnunet_diffrefine.config import RefineConfig
from nnunet_diffrefine.data import PriorDataset, PriorTransform
from nnunet_diffrefine.errors.augmentation import augment_prior
from nnunet_diffrefine.methods import DEFAULT_METHOD, AbstractRefineMethod
from nnunet_diffrefine.networks.denoiser import TimeConditionedUNet
from nnunet_diffrefine.networks.gate import Gate
from nnunet_diffrefine.networks.precision import mixed_precision
from nnunet_diffrefine.networks.refinement import RefinementNetwork
from nnunet_diffrefine.paths import StageOneId
from nnunet_diffrefine.stage_one.origin import ORIGIN, check_origin
from nnunet_diffrefine.training.build import build_network
from nnunet_diffrefine.training.curves import RefinementCurves
from nnunet_diffrefine.training.optimisation import WarmupCosine
from nnunet_diffrefine.training.prepare import prepare
from nnunet_diffrefine.training.trainer_averaged import EXTRA, AveragedTrainer
from nnunet_diffrefine.training.trainer_base import network_weights
from nnunet_diffrefine.training.trainer_calibration import calibrate, hand_to_best_checkpoint, held_out
from nnunet_diffrefine.training.trainer_evaluation import evaluate_validation
from nnunet_diffrefine.training.trainer_hits import hits, pooled_dice

STAGE_ONE = "stage_one_"


class DiffRefineTrainer(AveragedTrainer):
    """Train a refiner on stage one's out-of-fold predictions, on any 3D configuration nnU-Net planned.

    Overridden hooks beside those of :class:`AveragedTrainer`, everything else is nnU-Net's: ``__init__`` (checks),
    ``build_network_architecture``, ``initialize`` (a loss for validation), ``configure_optimizers``, ``do_split``
    (cases kept out for the thresholds), datasets and transforms (the prior travels along), ``train_step``,
    ``validation_step`` and the epoch hooks around them, ``set_deep_supervision_enabled``, ``on_train_end``
    (thresholds), ``perform_actual_validation`` (with the averaged weights; ``metrics.csv`` beside ``summary.json``).
    """

    method: ClassVar[str] = DEFAULT_METHOD

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),  # noqa: B008 (nnU-Net's signature)
    ) -> None:
        prepared = prepare(type(self).__name__, self.method, plans, configuration, fold, dataset_json)
        super().__init__(prepared.plans, configuration, fold, dataset_json, device)
        self.config: RefineConfig
        self.take_settings(prepared.config)
        self.foreground = prepared.resolved.channels()
        self.store = prepared.store
        self.stage_one_checkpoint = prepared.checkpoint
        self.origin = self.present_origin = prepared.origin
        self.enable_deep_supervision = self.config.training.deep_supervision
        self.curves = RefinementCurves()
        self.step_in_epoch = 0

    @staticmethod
    def build_network_architecture(
        plans_manager: Any,  # noqa: ANN401
        configuration_manager: Any,  # noqa: ANN401
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = True,
    ) -> nn.Module:
        """Stage one plus refiner, from the plans' ``diffrefine`` block; called by nnU-Net, at prediction too."""
        return build_network(
            plans_manager, configuration_manager, num_input_channels, num_output_channels, enable_deep_supervision
        )

    def initialize(self) -> None:
        """The set-up, and the loss of one output scale."""
        super().initialize()
        wanted, self.enable_deep_supervision = self.enable_deep_supervision, False
        self.validation_loss = self._build_loss()
        self.enable_deep_supervision = wanted

    def prepare_weights(self) -> None:
        """Stage one's weights, which the denoiser may start from; no gate: a validation shows the refiner as it is."""
        network = self.refinement
        network.gate = Gate(network.foreground)
        if self.is_ddp and any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in network.denoiser.modules()):
            raise NotImplementedError("Several GPUs with batch normalisation: use plans with instance normalisation.")
        weights = network_weights(self.stage_one_checkpoint)
        network.stage_one.load_state_dict(weights)
        if self.config.training.initial_weights == "stage_one" and not self.continued:
            masks = not network.method.flips and self.config.process.prediction == "x0"
            copied = network.denoiser.start_from(weights, head=masks)
            self.print_to_log_file(f"The denoiser starts from {copied} tensors of stage one.")
        super().prepare_weights()

    @property
    def refinement(self) -> RefinementNetwork:
        """The network without its distributed wrapper."""
        return self.network.module if self.is_ddp else self.network

    @property
    def denoiser(self) -> TimeConditionedUNet:
        """The part of the network that is trained."""
        return self.refinement.denoiser

    @property
    def refine_method(self) -> AbstractRefineMethod:
        """The method the network was built for."""
        return cast(AbstractRefineMethod, self.refinement.method)

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, WarmupCosine]:
        """AdamW on the denoiser alone; warm-up, then cosine."""
        parameters = self.network.denoiser.parameters()
        optimizer = torch.optim.AdamW(parameters, self.initial_lr, weight_decay=self.weight_decay)
        return optimizer, WarmupCosine(optimizer, self.initial_lr, self.num_epochs, self.config.training.warmup)

    def do_split(self) -> tuple[list[str], list[str]]:
        """nnU-Net's split, less the training cases that thresholds are calibrated on."""
        training, validation = super().do_split()
        kept = held_out(training, self.config.error.calibration, self.fold)
        self.calibration_cases = sorted(kept)
        return [case for case in training if case not in kept], validation

    def get_tr_and_val_datasets(self) -> tuple[PriorDataset, PriorDataset]:
        """nnU-Net's datasets, carrying the prior."""
        training, validation = super().get_tr_and_val_datasets()
        return PriorDataset(training, self.store), PriorDataset(validation, self.store)

    @staticmethod
    def get_training_transforms(*args: Any, **kwargs: Any) -> BasicTransform:  # noqa: ANN401 (nnU-Net's arguments)
        """nnU-Net's augmentation; the prior moves with the image, its values stay."""
        return PriorTransform(nnUNetTrainer.get_training_transforms(*args, **kwargs), _prior_channels(kwargs))

    @staticmethod
    def get_validation_transforms(*args: Any, **kwargs: Any) -> BasicTransform:  # noqa: ANN401 (nnU-Net's arguments)
        """nnU-Net's validation transforms, with the prior."""
        return PriorTransform(nnUNetTrainer.get_validation_transforms(*args, **kwargs), _prior_channels(kwargs))

    def set_deep_supervision_enabled(self, enabled: bool) -> None:
        """Switch the denoiser between one output and one a decoder stage."""
        self.refinement.denoiser.deep_supervision = enabled

    def refine_batch(self, batch: dict) -> RefineBatch:
        """A loader's batch on the device."""
        data, target = batch["data"], batch["target"]
        move = lambda x: x.to(self.device, non_blocking=True)  # noqa: E731
        target = [move(x) for x in target] if isinstance(target, list) else move(target)
        return RefineBatch.from_nnunet(move(data), target, self.foreground)

    def with_augmented_prior(self, batch: RefineBatch) -> RefineBatch:
        """The batch with errors made in its prior, where the settings ask for any."""
        t = self.config.training
        shares = {"morphology": t.prior_morphology, "removal": t.prior_removal, "dropping": t.prior_dropping}
        return replace(batch, prior=augment_prior(batch.prior, self.foreground, self.generator, **shares))

    def on_train_epoch_start(self) -> None:
        """Start an epoch."""
        super().on_train_epoch_start()
        self.step_in_epoch = 0

    def train_step(self, batch: dict) -> dict:
        """One optimiser step on the method's loss."""
        self.lr_scheduler.step(self.current_epoch + self.step_in_epoch / self.num_iterations_per_epoch)
        self.step_in_epoch += 1
        self.optimizer.zero_grad(set_to_none=True)
        refine_batch = self.with_augmented_prior(self.refine_batch(batch))
        with mixed_precision(self.device):
            loss = self.refine_method.loss(self.network, refine_batch, self.loss, self.generator)
        self.optimise(loss)
        return {"loss": loss.detach().cpu().numpy()}

    def on_validation_epoch_start(self) -> None:
        """Validate what inference will use: the averaged weights, without deep supervision."""
        super().on_validation_epoch_start()
        self.set_deep_supervision_enabled(False)

    def validation_step(self, batch: dict) -> dict:
        """Refine a batch from its out-of-fold prior; count hits and misses before and after."""
        b = self.refine_batch(batch)
        target = b.target[0] if isinstance(b.target, list) else b.target
        stage_one = self.foreground.logits(b.prior)
        with torch.no_grad(), mixed_precision(self.device):
            logits = self.refinement.refined(b.image, stage_one)
            loss = self.validation_loss(logits, target)
        before = hits(self.foreground, stage_one, b, prefix=STAGE_ONE)
        return {"loss": loss.detach().cpu().numpy(), **hits(self.foreground, logits, b), **before}

    def on_validation_epoch_end(self, val_outputs: list[dict]) -> None:
        """nnU-Net's pseudo Dice of the refined patches, and ours beside it: stage one, refined, change."""
        self.set_deep_supervision_enabled(self.enable_deep_supervision)
        super().on_validation_epoch_end(val_outputs)
        before = pooled_dice(val_outputs, STAGE_ONE, self.is_ddp)
        after = float(self.logger.get_value("mean_fg_dice", step=-1))
        self.curves.log(self.current_epoch, before, after)
        for logger in self.logger.loggers:
            logger.log("stage_one_dice", before, self.current_epoch)
        self.print_to_log_file(f"Dice: stage one {before:.4f}, refined {after:.4f}, change {after - before:+.4f}")

    def on_epoch_end(self) -> None:
        """nnU-Net's end of an epoch, and the refinement curves."""
        super().on_epoch_end()
        if self.local_rank == 0:
            self.curves.save(Path(self.output_folder))

    def on_train_end(self) -> None:
        """Calibrate, then nnU-Net's end of the training; final and best checkpoint hold the thresholds."""
        if self.refine_method.flips and self.calibration_cases:
            with self.averaged_weights():
                self.set_deep_supervision_enabled(False)
                calibrate(self, self.calibration_cases)
                self.set_deep_supervision_enabled(self.enable_deep_supervision)
            hand_to_best_checkpoint(self)
        super().on_train_end()

    def extra_state(self) -> dict[str, Any]:
        """The curves, and what the fold is trained from (empty if its training began before that was recorded)."""
        return {"curves": self.curves.columns, ORIGIN: self.origin}

    def restore_extra_state(self, state: dict[str, Any]) -> None:
        """The curves, and what the fold was trained from."""
        self.curves = RefinementCurves(*(list(column) for column in state["curves"]))
        self.origin = state.get(ORIGIN, {})

    def check_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint that contains another stage one than the exported one, or saw other cases."""
        super().check_checkpoint(checkpoint)
        own = StageOneId(type(self).__name__, self.plans_manager.plans_name, self.configuration_name)
        recorded, dataset = checkpoint[EXTRA].get(ORIGIN, {}), self.plans_manager.dataset_name
        check_origin(recorded, self.present_origin, dataset, own, self.fold)

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """nnU-Net's validation of the network that users get: averaged weights, stage one inside; then our metrics."""
        with self.averaged_weights():
            super().perform_actual_validation(save_probabilities)
        evaluate_validation(self)


def _prior_channels(arguments: dict) -> int:
    regions = arguments["regions"]
    return len(arguments["foreground_labels"] if regions is None else regions)
