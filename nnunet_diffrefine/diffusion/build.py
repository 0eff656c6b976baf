"""From settings to a process."""

from __future__ import annotations

from nnunet_diffrefine.config import ProcessConfig
from nnunet_diffrefine.diffusion.bernoulli import BernoulliProcess
from nnunet_diffrefine.diffusion.bridge import DeterministicBridge, DiscreteBridge
from nnunet_diffrefine.diffusion.gaussian import GaussianProcess, TruncatedGaussianProcess
from nnunet_diffrefine.diffusion.process import Process


def from_config(config: ProcessConfig, exclusive: bool, eta: float) -> Process | None:
    """Build the process of a plans' ``diffrefine`` block; None for ``process.kind`` ``none``.

    Args:
        config: the block's ``process``.
        exclusive: True for label datasets, False for region datasets; matters to the discrete bridge.
        eta: the block's ``sampling.eta``; matters to the Gaussian and the Bernoulli process.
    """
    if config.kind == "none":
        return None
    if config.kind == "bernoulli":
        return BernoulliProcess(config.timesteps, config.schedule, eta)
    if config.kind == "gaussian":
        arguments = (config.timesteps, config.schedule, config.input_scale, eta)
        truncated = config.truncation < 1
        return TruncatedGaussianProcess(*arguments, config.truncation) if truncated else GaussianProcess(*arguments)
    if config.state == "discrete":
        return DiscreteBridge(config.timesteps, config.schedule, exclusive)
    return DeterministicBridge(config.timesteps, config.schedule)
