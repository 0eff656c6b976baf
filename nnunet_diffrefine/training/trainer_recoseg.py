"""``ReCoSegTrainer``: nnU-Net's own training of a segmentation that sees where a synthesis went wrong."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import Tensor, nn

from nnunet_diffrefine.data import PriorDataset
from nnunet_diffrefine.data.residuals import ExtraChannelTransform
from nnunet_diffrefine.inference.volume import volume_predictor
from nnunet_diffrefine.methods.recoseg import ReCoSeg
from nnunet_diffrefine.methods.recoseg_settings import ReCoSegConfig
from nnunet_diffrefine.networks.recoseg import ReCoSegNetwork, StoredChannelNetwork
from nnunet_diffrefine.training.recoseg import prepare_recoseg
from nnunet_diffrefine.training.recoseg_build import build_recoseg
from nnunet_diffrefine.training.thresholds import ThresholdChoice
from nnunet_diffrefine.training.trainer_base import BaseTrainer, network_weights
from nnunet_diffrefine.training.trainer_calibration import hand_to_best_checkpoint, held_out
from nnunet_diffrefine.training.trainer_evaluation import evaluate_validation


class ReCoSegTrainer(BaseTrainer):
    """Train a segmentation on the image and its out-of-fold residual, with nnU-Net's loss, optimiser and schedule.

    Overridden hooks beside those of :class:`BaseTrainer`, everything else is nnU-Net's: ``__init__`` (checks first),
    ``build_network_architecture``, ``do_split`` (cases kept out for the thresholds), datasets and transforms (the
    additional channel travels along), ``set_deep_supervision_enabled``, ``on_train_end`` and
    ``perform_actual_validation`` (thresholds first, ``metrics.csv`` beside ``summary.json`` afterwards).
    """

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),  # noqa: B008 (nnU-Net's signature)
    ) -> None:
        self.prepared = prepare_recoseg(type(self).__name__, plans, configuration, fold, dataset_json)
        super().__init__(self.prepared.plans, configuration, fold, dataset_json, device)
        self.config: ReCoSegConfig
        self.take_settings(self.prepared.config)

    @staticmethod
    def build_network_architecture(
        plans_manager: Any,  # noqa: ANN401
        configuration_manager: Any,  # noqa: ANN401
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = True,
    ) -> nn.Module:
        """Synthesis plus segmentation, from the plans' ``diffrefine`` block; called by nnU-Net, at prediction too."""
        return build_recoseg(configuration_manager, num_output_channels, enable_deep_supervision)

    def prepare_weights(self) -> None:
        """The fold's synthesis and scale."""
        self.recoseg.synthesis.load_state_dict(network_weights(self.prepared.checkpoint))
        self.recoseg.scale.copy_(self.prepared.scale(self.do_split()[0]))
        self.print_to_log_file(f"Residuals are divided by {float(self.recoseg.scale):.3f} standard deviations.")

    @property
    def trained(self) -> nn.Module:
        """The segmentation."""
        return self.recoseg.segmenter

    @property
    def recoseg(self) -> ReCoSegNetwork:
        """The network without its distributed wrapper."""
        return self.network.module if self.is_ddp else self.network

    @property
    def method(self) -> ReCoSeg:
        """The method the network was built for."""
        return self.recoseg.method  # type: ignore[return-value]

    def set_deep_supervision_enabled(self, enabled: bool) -> None:
        """Switch the segmentation between one output and one a decoder stage."""
        segmenter: Any = self.recoseg.segmenter
        segmenter.decoder.deep_supervision = enabled

    def do_split(self) -> tuple[list[str], list[str]]:
        """nnU-Net's split, less the training cases on which the thresholds are chosen (:attr:`calibration_cases`)."""
        training, validation = super().do_split()
        self.calibration_cases = sorted(held_out(training, self.config.decision.calibration, self.fold))
        return [case for case in training if case not in self.calibration_cases], validation

    def get_tr_and_val_datasets(self) -> tuple[PriorDataset, PriorDataset]:
        """nnU-Net's datasets, carrying the stored syntheses."""
        training, validation = super().get_tr_and_val_datasets()
        return PriorDataset(training, self.prepared.store), PriorDataset(validation, self.prepared.store)

    def get_training_transforms(
        self,
        *args: Any,  # noqa: ANN401 (nnU-Net's arguments)
        **kwargs: Any,  # noqa: ANN401
    ) -> BasicTransform:
        """nnU-Net's augmentation; the additional channel moves with the image, its values stay."""
        return self._with_extra(nnUNetTrainer.get_training_transforms(*args, **kwargs))

    def get_validation_transforms(
        self,
        *args: Any,  # noqa: ANN401 (nnU-Net's arguments)
        **kwargs: Any,  # noqa: ANN401
    ) -> BasicTransform:
        """nnU-Net's validation transforms, with the additional channel."""
        return self._with_extra(nnUNetTrainer.get_validation_transforms(*args, **kwargs))

    def _with_extra(self, transforms: BasicTransform) -> ExtraChannelTransform:
        channel = self.prepared.channel
        return ExtraChannelTransform(transforms, self.method.extra, channel.index, channel.maximum)

    def on_train_end(self) -> None:
        """Choose the thresholds; final and best checkpoint hold them."""
        self.calibrate()
        super().on_train_end()

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """nnU-Net's validation of the network that users get; a best checkpoint without thresholds gets them first."""
        if not bool(self.recoseg.calibrated):
            self.calibrate()
        super().perform_actual_validation(save_probabilities)
        evaluate_validation(self)

    def calibrate(self) -> None:
        """Choose the thresholds on the cases kept out of training, from their out-of-fold syntheses, and store them."""
        self.do_split()
        decision = self.config.decision
        choice = threshold_choice(self.method, decision.candidates)
        predictor = self._predictor()
        for case in self.calibration_cases:
            stacked, target = self._whole_case(case)
            logits = predictor.predict_sliding_window_return_logits(stacked).float().cpu()
            reference, valid = self.method.foreground.from_target(target[None])
            choice.add(logits, reference[0].bool(), valid[0].bool())
        thresholds = choice.best() if choice.cases else [decision.threshold] * choice.channels
        self.recoseg.thresholds.copy_(torch.tensor(thresholds))
        self.recoseg.calibrated.fill_(True)
        hand_to_best_checkpoint(self, ("thresholds", "calibrated"))
        chosen = ", ".join(f"{tau:.2f}" for tau in thresholds)
        self.print_to_log_file(f"Thresholds {chosen}, chosen on {len(self.calibration_cases)} case(s) not trained on.")

    def _predictor(self) -> nnUNetPredictor:
        """nnU-Net's sliding window as in its validation, for images with their stored channel."""
        self.set_deep_supervision_enabled(False)
        plans, configuration, name = self.plans_manager, self.configuration_manager, type(self).__name__
        network = StoredChannelNetwork(self.recoseg)
        return volume_predictor(network, plans, configuration, self.dataset_json, name, self.device)

    def _whole_case(self, case: str) -> tuple[Tensor, Tensor]:
        """Image and additional channel (C + 1, D, H, W), and nnU-Net's target (1 or R, D, H, W), of a whole case."""
        dataset = self.dataset_class(self.preprocessed_dataset_folder, [case])
        data, segmentation, _, _ = PriorDataset(dataset, self.prepared.store).load_case(case)
        manager = self.label_manager
        regions = manager.foreground_regions if manager.has_regions else None
        transforms = self.get_validation_transforms(None, regions=regions, ignore_label=manager.ignore_label)
        image, labels = torch.from_numpy(data[:]), torch.from_numpy(np.asarray(segmentation[:], np.int16))
        out = transforms(image=image, segmentation=labels)
        return out["image"], out["segmentation"]


def threshold_choice(method: ReCoSeg, candidates: Sequence[float]) -> ThresholdChoice:
    """Choice of the binarisation threshold (section 4.2) on logits (H, *S), of equals the nearest to 0.5.

    Every region has its own; exclusive classes share one, because they compete.
    """
    foreground = method.foreground

    def decide(logits: Tensor, thresholds: Tensor) -> Tensor:
        return foreground.decide(method.shifted(logits, thresholds))

    preferred = sorted(candidates, key=lambda tau: (abs(tau - 0.5), tau))
    return ThresholdChoice(decide, foreground.channels, preferred, together=foreground.exclusive)
