"""What all trainers share: length, weights to start from, what is compiled, mirroring left to the network."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import Tensor, nn


class BaseTrainer(nnUNetTrainer):
    """nnU-Net's trainer of a network of which one part is trained, and which mirrors and samples by itself."""

    length: ClassVar[dict[str, int]] = {}
    """nnU-Net's attributes that a shorter variant changes, such as ``num_epochs``."""
    config: Any

    def take_settings(self, config: Any) -> None:  # noqa: ANN401 (a settings dataclass)
        """Keep the settings and set what a variant changes; to be called by constructors."""
        self.config = config
        for name, value in self.length.items():
            setattr(self, name, value)

    @property
    def trained(self) -> nn.Module:
        """The part of the network that is trained."""
        raise NotImplementedError

    def initialize(self) -> None:
        """nnU-Net's set-up, :meth:`prepare_weights` and, where nnU-Net compiles, compilation of the trained part."""
        super().initialize()
        self.prepare_weights()
        if super()._do_i_compile():
            self.trained.compile()

    def prepare_weights(self) -> None:
        """Load what the training starts from, once there is a network and before anything is compiled."""

    def on_train_end(self) -> None:
        """nnU-Net's end; no rank goes on before the first has written its checkpoints: ``--val_best`` loads one."""
        super().on_train_end()
        if self.is_ddp:
            dist.barrier()

    def _do_i_compile(self) -> bool:
        # Only the trained part is compiled (initialize): sampling has branches that depend on the data.
        return False

    def configure_rotation_dummyDA_mirroring_and_inital_patch_size(self) -> tuple:  # noqa: N802 (nnU-Net's name)
        """As nnU-Net, but mirroring at inference is the network's own business, so nnU-Net's is switched off."""
        settings = super().configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        self.inference_allowed_mirroring_axes = None
        return settings


def network_weights(checkpoint: Path) -> dict[str, Tensor]:
    """The weights in a checkpoint of nnU-Net, on the CPU, named as without several GPUs."""
    weights = torch.load(checkpoint, map_location="cpu", weights_only=False)["network_weights"]
    return {name.removeprefix("module."): value for name, value in weights.items()}
