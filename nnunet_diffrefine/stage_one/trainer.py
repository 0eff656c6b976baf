"""A stage one that exports its own out-of-fold priors when its validation is done."""

from __future__ import annotations

import torch.distributed as dist
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_diffrefine.paths import StageOneId
from nnunet_diffrefine.stage_one.export import export
from nnunet_diffrefine.stage_one.splits import FOLD_ALL


class DiffRefineStageOneTrainer(nnUNetTrainer):
    """nnU-Net's trainer unchanged, plus ``nnUNetv2_diffrefine export`` of its fold after the validation.

    Overrides ``perform_actual_validation`` only. The export reads ``checkpoint_final.pth`` instead of taking the
    network at hand, because with ``--val_best`` that is another one.
    """

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """Validate as nnU-Net does, then export the fold's validation cases; under DDP on the first rank only."""
        super().perform_actual_validation(save_probabilities)
        if self.is_ddp:
            dist.barrier()
        if self.local_rank != 0:
            return
        if why := self._no_export():
            self.print_to_log_file(f"No out-of-fold export. {why}.")
            return
        plans = self.plans_manager
        stage_one = StageOneId(type(self).__name__, plans.plans_name, self.configuration_name)
        self.print_to_log_file(f"Exporting the out-of-fold priors of fold {self.fold}")
        export(plans.dataset_name, stage_one, folds=[self.fold], device=self.device.type)

    def _no_export(self) -> str:
        """Why this training has nothing to export; empty where it has."""
        if self.fold == "all":
            return FOLD_ALL
        if self.disable_checkpointing:
            return "Checkpoints are disabled, so nothing could tie the priors to their network"
        return ""
