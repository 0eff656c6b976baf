"""What the command is asked to do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunet_diffrefine.paths import StageOneId


@dataclass(frozen=True)
class Request:
    """Arguments of the command; see ``nnUNetv2_diffrefine apply --help``."""

    images: Path
    predictions: Path
    output: Path
    dataset: str
    refiner: StageOneId
    folds: Sequence[int] = (0, 1, 2, 3, 4)
    checkpoint: str = "checkpoint_final.pth"
    steps: int | None = None
    samples: int | None = None
    seed: int | None = None
    region: Mapping[str, Any] | None = None
    gate: bool = True
    soften: float = 0.0
    save_probabilities: bool = False
    save_uncertainty: bool = False
    save_error_map: bool = False
    num_parts: int = 1
    part_id: int = 0
    continue_prediction: bool = False
    npp: int = 3
    nps: int = 3
    device: str = "cuda"
    on_device: bool = True
    progress: bool = True

    @property
    def sampling(self) -> Mapping[str, int | None]:
        """Settings that replace the model's."""
        return {"steps": self.steps, "samples": self.samples, "seed": self.seed}

    @property
    def maps(self) -> tuple[str, ...]:
        """Wanted maps."""
        wanted = {"uncertainty": self.save_uncertainty, "error_map": self.save_error_map}
        return tuple(name for name, yes in wanted.items() if yes)
