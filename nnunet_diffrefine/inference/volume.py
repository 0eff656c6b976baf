"""A refiner over a whole volume whose prior is given with the image, by nnU-Net's sliding window."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from torch import Tensor, nn

from nnunet_diffrefine.networks.refinement import RefinementNetwork

NO_ERROR = -20.0
"""Evidence of a window in which stage one sees no foreground: nnU-Net adds logits up in half precision."""


class GivenPrior(nn.Module):
    """A refinement network whose prior comes with the image, as its last R channels: (B, C + R, *S) -> (B, H, *S).

    Args:
        network: stage one and refiner; stage one is not run.
        evidence: return the evidence of errors, one channel for each foreground channel and, for exclusive classes, an
            empty one in front, instead of the logits of the corrected mask.
    """

    def __init__(self, network: RefinementNetwork, evidence: bool = False) -> None:
        super().__init__()
        self.network = network
        self.evidence = evidence

    def forward(self, x: Tensor) -> Tensor:
        """Refine windows."""
        foreground = self.network.foreground
        image, prior = x[:, : -foreground.channels], x[:, -foreground.channels :]
        if not self.evidence:
            return self.network.refined(image, foreground.logits(prior))
        found = torch.cat([self._evidence(i, p) for i, p in zip(image.split(1), prior.split(1), strict=True)])
        return torch.cat((torch.zeros_like(found[:, :1]), found), 1) if foreground.exclusive else found

    def _evidence(self, image: Tensor, prior: Tensor) -> Tensor:
        if prior.amax() < self.network.sampling.min_foreground:
            return torch.full_like(prior, NO_ERROR)
        return self.network.evidence(image, prior).clamp(NO_ERROR, -NO_ERROR)


def volume_predictor(
    module: nn.Module,
    plans: Any,  # noqa: ANN401 (nnU-Net's PlansManager)
    configuration: Any,  # noqa: ANN401 (nnU-Net's ConfigurationManager)
    dataset_json: dict[str, Any],
    trainer: str,
    device: torch.device,
) -> nnUNetPredictor:
    """nnU-Net's predictor for a module, with its usual windows (half overlapping, Gaussian weights), not mirrored."""
    predictor = nnUNetPredictor(use_mirroring=False, device=device, allow_tqdm=False)
    predictor.manual_initialization(module, plans, configuration, None, dataset_json, trainer, None)
    return predictor


def whole(data: Any) -> Tensor:  # noqa: ANN401 (lazy arrays)
    """All of a lazy array (C, D, H, W) as a tensor."""
    return torch.from_numpy(data[(slice(None),) * 4])


def references(segmentation: np.ndarray, labels: LabelManager) -> tuple[Tensor, Tensor]:
    """Reference (R, D, H, W) and valid mask (1, D, H, W), both bool, of a preprocessed label map (1, D, H, W)."""
    groups = labels.foreground_regions if labels.has_regions else labels.foreground_labels
    reference = np.stack([np.isin(segmentation[0], group) for group in groups])
    valid = segmentation != labels.ignore_label if labels.has_ignore_label else np.ones_like(segmentation, bool)
    return torch.from_numpy(reference), torch.from_numpy(valid)
