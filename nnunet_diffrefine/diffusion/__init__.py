"""Diffusion over tensors: schedules, processes, parametrisations and the sampler. Nothing medical."""

from nnunet_diffrefine.diffusion.bernoulli import BernoulliProcess
from nnunet_diffrefine.diffusion.bridge import DeterministicBridge, DiscreteBridge
from nnunet_diffrefine.diffusion.build import from_config
from nnunet_diffrefine.diffusion.gaussian import GaussianProcess, TruncatedGaussianProcess
from nnunet_diffrefine.diffusion.process import Process
from nnunet_diffrefine.diffusion.sampler import sample, timestep_sequence

__all__ = [
    "BernoulliProcess",
    "DeterministicBridge",
    "DiscreteBridge",
    "GaussianProcess",
    "Process",
    "TruncatedGaussianProcess",
    "from_config",
    "sample",
    "timestep_sequence",
]
