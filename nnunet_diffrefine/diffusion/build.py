"""From settings to a process."""

from __future__ import annotations

from nnunet_diffrefine.config import ProcessConfig
from nnunet_diffrefine.diffusion.bridge import DeterministicBridge, DiscreteBridge
from nnunet_diffrefine.diffusion.gaussian import GaussianProcess
from nnunet_diffrefine.diffusion.process import Process


def from_config(config: ProcessConfig, exclusive: bool, eta: float) -> Process:
    """Build the process of a plans' ``diffrefine`` block.

    Args:
        config: the block's ``process``.
        exclusive: True for label datasets, False for region datasets; matters to the discrete bridge.
        eta: the block's ``sampling.eta``; matters to the Gaussian process.
    """
    if config.kind == "gaussian":
        return GaussianProcess(config.timesteps, config.schedule, config.input_scale, eta)
    if config.state == "discrete":
        return DiscreteBridge(config.timesteps, config.schedule, exclusive)
    return DeterministicBridge(config.timesteps, config.schedule)
