"""PD-DDPM (Guo et al. 2022): a conditional DDPM of the mask that starts from the noised pre-segmentation.

    x_T' = sqrt(alpha_bar_T') (2 p - 1) + sqrt(1 - alpha_bar_T') epsilon,    T' < T,    p stage one's probabilities

Steps from T to T' are saved, since p noised to T' is close to what they would have led to. Close, not equal: the paper
trains on the noised reference at all t, so at T' it meets errors it never saw in training. Here the prior is noised
at T' in training as well (``training.prior_start``), out-of-fold, and earlier states come from the denoiser's own
predictions (``training.recycling``). The prior enters by the start alone; ``condition.prior`` would show it besides.

Guo et al. 2022, https://arxiv.org/abs/2210.17408
"""

from __future__ import annotations

from nnunet_diffrefine.batch import Foreground
from nnunet_diffrefine.config import ConfigError, RefineConfig
from nnunet_diffrefine.methods.composition import ComposedMethod


class PDDDPM(ComposedMethod):
    """Gaussian diffusion of the reference mask, reversed from the noised prior.

    Raises:
        ConfigError: nothing is truncated.
    """

    name = "pdddpm"
    trainer = "DiffRefineTrainer_PDDDPM"
    needs = {"process.kind": ("gaussian",), "error.target": ("mask",)}

    def __init__(self, config: RefineConfig, foreground: Foreground) -> None:
        super().__init__(config, foreground)
        if config.process.truncation == 1:
            raise ConfigError(
                "diffrefine setting 'process.truncation' is 1.0; method pdddpm needs a value below 1, T'/T. "
                "For a start from pure noise use method mask_diffusion or plain_ddpm."
            )
