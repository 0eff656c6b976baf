"""What all trainers of a denoiser share: averaged weights, checkpoints that hold both sets, seeded draws, clipping."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from nnunet_diffrefine.config import BLOCK
from nnunet_diffrefine.training.optimisation import ema_model, swapped_weights
from nnunet_diffrefine.training.prepare import differing_settings
from nnunet_diffrefine.training.trainer_base import BaseTrainer

EXTRA = BLOCK
"""Entry of a checkpoint for what nnU-Net's do not hold."""


class AveragedTrainer(BaseTrainer):
    """nnU-Net's trainer around a denoiser whose exponential moving average (EMA) is used for inference.

    Checkpoints hold the averaged weights as ``network_weights``, because that is what nnU-Net loads for inference, and
    the raw ones under ``diffrefine``, because that is what ``--c`` continues from.
    """

    generator: torch.Generator
    continued = False
    """Whether the weights come from a checkpoint, so that what a new training starts from does not matter."""

    def take_settings(self, config: Any) -> None:  # noqa: ANN401 (a settings dataclass)
        """Keep the settings and pass on to nnU-Net what it has its own attributes for; to be called by constructors."""
        super().take_settings(config)
        self.initial_lr = config.training.learning_rate
        self.weight_decay = config.training.weight_decay
        self.generator = torch.Generator(device=self.device)

    @property
    def denoiser(self) -> nn.Module:
        """The part of the network that is trained."""
        raise NotImplementedError

    @property
    def trained(self) -> nn.Module:
        """The denoiser."""
        return self.denoiser

    def prepare_weights(self) -> None:
        """Start the average from the weights that the denoiser starts from."""
        self.ema = ema_model(self.denoiser, self.config.training.ema_decay)

    def on_train_epoch_start(self) -> None:
        """Start an epoch with draws that depend on fold, epoch and rank alone."""
        super().on_train_epoch_start()
        self.generator.manual_seed(1_000_003 * (self.fold + 1) + 1_009 * self.current_epoch + self.local_rank)

    def optimise(self, loss: Tensor) -> None:
        """One clipped step of the optimiser, and of the average."""
        scaler = self.grad_scaler
        (loss if scaler is None else scaler.scale(loss)).backward()
        if scaler is not None:
            scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.denoiser.parameters(), self.config.training.gradient_clip)
        if scaler is None:
            self.optimizer.step()
        else:
            scaler.step(self.optimizer)
            scaler.update()
        self.ema.update_parameters(self.denoiser)

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Use the averaged weights inside the block."""
        with swapped_weights(self.denoiser, self.ema):
            yield

    def on_validation_epoch_start(self) -> None:
        """Validate what inference will use: the averaged weights."""
        super().on_validation_epoch_start()
        self._swap = self.averaged_weights()
        self._swap.__enter__()

    def on_validation_epoch_end(self, val_outputs: list[dict]) -> None:
        """Back to the raw weights."""
        self._swap.__exit__(None, None, None)
        super().on_validation_epoch_end(val_outputs)

    def extra_state(self) -> dict[str, Any]:
        """What else a checkpoint has to hold for ``--c``."""
        return {}

    def restore_extra_state(self, state: dict[str, Any]) -> None:
        """Take :meth:`extra_state` back."""

    def save_checkpoint(self, filename: str) -> None:
        """Write nnU-Net's checkpoint with the averaged weights, plus what resuming needs, atomically."""
        if self.local_rank != 0 or self.disable_checkpointing:
            super().save_checkpoint(filename)
            return
        temporary = f"{filename}.tmp"
        with self.averaged_weights():
            super().save_checkpoint(temporary)
        checkpoint = torch.load(temporary, map_location="cpu", weights_only=False)
        both = {"denoiser": self.denoiser.state_dict(), "ema": self.ema.state_dict()}
        checkpoint[EXTRA] = {**both, **self.extra_state()}
        torch.save(checkpoint, temporary)
        os.replace(temporary, filename)

    def check_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of other settings, with a ``RuntimeError`` and before anything changes."""
        plans, configuration = (checkpoint["init_args"][key] for key in ("plans", "configuration"))
        before = plans["configurations"][configuration].get(BLOCK)
        now = self.plans_manager.plans["configurations"][self.configuration_name][BLOCK]
        if before and (differing := differing_settings(before, now, asdict(type(self.config)()))):
            raise RuntimeError(
                f"The checkpoint of fold {self.fold} in {self.output_folder} was trained with other diffrefine "
                f"settings than the plans (-p) now have ({', '.join(differing)}). Restore them, or write the new ones "
                "under another plans name (nnUNetv2_diffrefine plan -d DATASET -o NEW_PLANS) and train with "
                "-p NEW_PLANS."
            )

    def load_checkpoint(self, filename_or_checkpoint: str) -> None:
        """Restore nnU-Net's state, then the raw and averaged weights and the rest.

        Raises:
            RuntimeError: the file cannot be read, no trainer of this package wrote it, or it is of another training.
        """
        try:
            checkpoint = torch.load(filename_or_checkpoint, map_location=self.device, weights_only=False)
            extra = checkpoint[EXTRA]
        except (RuntimeError, EOFError, KeyError, OSError) as error:
            raise RuntimeError(
                f"{filename_or_checkpoint} is not a complete checkpoint of {type(self).__name__} ({error}). "
                "Delete it; --c then continues from the next older one (latest, best), or starts anew."
            ) from error
        self.check_checkpoint(checkpoint)
        self.continued = True
        super().load_checkpoint(filename_or_checkpoint)
        self.denoiser.load_state_dict(extra["denoiser"])
        self.ema.load_state_dict(extra["ema"])
        self.restore_extra_state(extra)
