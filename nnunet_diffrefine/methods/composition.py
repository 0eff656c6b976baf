"""A method as composition: error target x process x parametrisation x condition x sampler x decision.

The parts come from the settings; a method says which settings define it (:attr:`ComposedMethod.needs`), and overrides
what its paper does differently. No method inherits from another.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from nnunet_diffrefine.batch import Foreground, RefineBatch
from nnunet_diffrefine.config import ConfigError, RefineConfig
from nnunet_diffrefine.diffusion import GaussianProcess, Process, TruncatedGaussianProcess, from_config, sample
from nnunet_diffrefine.diffusion.parametrisation import epsilon_from
from nnunet_diffrefine.errors.targets import TARGETS, Output, SegmentationLoss, masked_mean
from nnunet_diffrefine.methods.base import AbstractRefineMethod, Denoiser, draw_times, finest, recycle
from nnunet_diffrefine.methods.conditioning import Condition

SEEDS_AT_ONCE = 4
"""Seeds that share a batch: enough to occupy a GPU, few enough for its memory."""


@dataclass(frozen=True)
class Run:
    """What one sampling run leaves behind.

    Attributes:
        estimates: predicted x_0 (B, R, *S) in the range of the target, of the last step or, fused, of every step.
        output: the denoiser's last output (B, ., *S).
    """

    estimates: list[Tensor]
    output: Tensor


class ComposedMethod(AbstractRefineMethod):
    """The training state, the loss and the sampling loop that all methods share.

    Raises:
        ConfigError: a setting that defines the method has another value.
    """

    needs: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    """Settings that define the method, ``group.key``, and the values they may have."""
    fuses_steps: ClassVar[bool] = False
    """Whether :meth:`fused` wants the estimates of all steps."""

    def __init__(self, config: RefineConfig, foreground: Foreground) -> None:
        super().__init__(config, foreground)
        for key, allowed in self.needs.items():
            group, name = key.split(".")
            value = getattr(getattr(config, group), name)
            if value not in allowed:
                wanted = " or ".join(map(repr, allowed))
                raise ConfigError(f"diffrefine setting '{key}' is {value!r}; method {config.method} needs {wanted}.")
        self.prediction = config.process.prediction
        self.target = TARGETS[config.error.target](config.error, foreground, independent=self.prediction != "x0")
        _require_hard_states(config)
        # Errors are not exclusive: a voxel of one class that ought to be of another is wrong in both channels.
        exclusive = foreground.exclusive and not self.target.flips
        self.process = from_config(config.process, exclusive, config.sampling.eta)
        self.condition = Condition(config.condition, foreground)

    @property
    def flips(self) -> bool:
        """As the error target says."""
        return self.target.flips

    def condition_channels(self, image_channels: int) -> int:
        """Image, prior or both."""
        return self.condition.channels(image_channels)

    def channels(self, image_channels: int) -> tuple[int, int]:
        """Condition and state in; what is predicted out."""
        state = 0 if self.process is None else self.foreground.channels
        outputs = self.target.outputs if self.prediction == "x0" else self.foreground.channels
        return self.condition_channels(image_channels) + state, outputs

    # Training

    def loss(
        self, denoiser: Denoiser, batch: RefineBatch, segmentation_loss: SegmentationLoss, generator: torch.Generator
    ) -> Tensor:
        """Loss at a drawn time of a state that is built from the reference or from the model's own prediction."""
        condition, process = self.condition(batch.image, batch.prior), self.process
        if process is None:
            output = denoiser(condition, torch.zeros(len(condition), dtype=torch.long, device=condition.device))
            return self.target.loss(output, batch, segmentation_loss)
        training, timesteps = self.config.training, process.timesteps
        t = draw_times(len(condition), timesteps, training.prior_end, generator)
        anchor = self.to_state(self.target.anchor(batch.prior))

        def own_prediction(rows: Tensor) -> Tensor:
            end = process.start(anchor[rows], generator)
            output = finest(denoiser(torch.cat((condition[rows], end), 1), torch.full_like(t[rows], timesteps)))
            return self.predicted(output, end, t[rows].new_full((len(rows),), timesteps))

        clean = self.to_state(self.target.clean(batch))
        x0 = recycle(clean, t, timesteps, training.recycling, own_prediction, generator)
        x_t, noise = self.noised(x0, anchor, t, generator)
        output = denoiser(torch.cat((condition, x_t), 1), t)
        if self.prediction == "x0":
            return self.target.loss(output, batch, segmentation_loss)
        return self.noise_loss(output, x0, x_t, noise, t, batch)

    def noised(self, x0: Tensor, anchor: Tensor, t: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
        """State x_t (B, R, *S), and the Gaussian noise in it where there is any."""
        process = cast(Process, self.process)
        if not isinstance(process, GaussianProcess):
            return process.marginal(x0, anchor, t, generator), None
        noise = torch.randn(x0.shape, generator=generator, device=x0.device, dtype=x0.dtype)
        if isinstance(process, TruncatedGaussianProcess) and self.config.training.prior_start:
            at_start = (t == process.timesteps).view(-1, *([1] * (x0.ndim - 1)))
            x0 = torch.where(at_start, anchor, x0)
        return process.marginal_with(x0, noise, t), noise

    def noise_loss(
        self, output: Output, x0: Tensor, x_t: Tensor, noise: Tensor | None, t: Tensor, batch: RefineBatch
    ) -> Tensor:
        """Mean squared error of epsilon or v where the reference is valid."""
        process = cast(GaussianProcess, self.process)
        # Not the noise that was drawn: where the state was built from the prior, that would lead back to the prior.
        noise = epsilon_from(process.input_scale * x0, x_t, process.alpha_bar(t))
        wanted = process.training_target(cast(Any, self.prediction), x0, noise, t)
        return masked_mean((finest(output).float() - wanted) ** 2, batch.valid)

    # The process' variable

    def to_state(self, x: Tensor) -> Tensor:
        """The target's variable in the range of the process."""
        return 2 * x - 1 if self._rescaled else x

    def from_state(self, x: Tensor) -> Tensor:
        """The process' variable in the range of the target."""
        return (x + 1) / 2 if self._rescaled else x

    @property
    def _rescaled(self) -> bool:
        return self.process is not None and self.process.signed and not self.target.signed

    def predicted(self, output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Predicted x_0 (B, R, *S), in the range of the process, of a denoiser's output."""
        if self.prediction == "x0":
            return self.to_state(self.target.estimate(output))
        process = cast(GaussianProcess, self.process)
        return process.predicted_x0(cast(Any, self.prediction), output.float(), x_t, t).clamp(-1, 1)

    # Sampling

    def evidence(self, denoiser: Denoiser, image: Tensor, prior: Tensor, generator: torch.Generator) -> Tensor:
        """Evidence of the mean prediction over the seeds; a single prediction's own logits where there is one."""
        return self.evidence_of(self.runs(denoiser, image, prior, generator), prior)

    def runs(self, denoiser: Denoiser, image: Tensor, prior: Tensor, generator: torch.Generator) -> list[Run]:
        """One sampling run a seed, of image (B, C, *S) and prior (B, R, *S); a single pass without a process."""
        condition = self.condition(image, prior)
        network = known_condition(denoiser, condition)
        if self.process is None:
            zeros = torch.zeros(len(condition), dtype=torch.long, device=condition.device)
            return [Run([], finest(network(condition, zeros)))]
        batches = [min(SEEDS_AT_ONCE, self.seeds - first) for first in range(0, self.seeds, SEEDS_AT_ONCE)]
        return [run for seeds in batches for run in self._batch(network, condition, prior, seeds, generator)]

    def _batch(
        self,
        network: Callable[[Tensor, Tensor], Output],
        condition: Tensor,
        prior: Tensor,
        seeds: int,
        generator: torch.Generator,
    ) -> list[Run]:
        """Runs of so many seeds in one batch."""
        condition, prior = (x.repeat(seeds, *([1] * (x.ndim - 1))) for x in (condition, prior))
        anchor = self.to_state(self.target.anchor(prior))
        outputs: list[Tensor] = []  # of the last step
        estimates: list[Tensor] = []  # of every kept step

        def predict_x0(x_t: Tensor, t: Tensor) -> Tensor:
            output = finest(network(torch.cat((condition, x_t), 1), t))
            x0 = self.predicted(output, x_t, t)
            outputs[:] = [output]
            estimates[:] = [*(estimates if self.fuses_steps else []), self.from_state(x0)]
            return x0

        sample(cast(Process, self.process), predict_x0, anchor, self.config.sampling.steps, generator)
        parts = zip(*(x.chunk(seeds) for x in (outputs[0], *estimates)), strict=True)
        return [Run(list(kept), output) for output, *kept in parts]

    def evidence_of(self, runs: list[Run], prior: Tensor) -> Tensor:
        """Evidence (B, H or R, *S) of one run or of several, as :meth:`evidence` gives it of all."""
        single = len(runs) == 1 and self.prediction == "x0" and not self.fuses_steps
        if single or self.process is None:
            return self.target.evidence_of(runs[0].output, prior)
        return self.target.evidence(self.fused([run.estimates for run in runs]), prior)

    def fused(self, estimates: list[list[Tensor]]) -> Tensor:
        """One estimate (B, R, *S) of those of every seed and kept step: the mean over the seeds of the last step's."""
        return torch.stack([steps[-1] for steps in estimates]).mean(0)

    @property
    def seeds(self) -> int:
        """K; without a process, or with one without randomness, there is nothing to average."""
        process = self.config.process
        random = process.kind != "none" and (process.kind, process.state) != ("bridge", "deterministic")
        return self.config.sampling.samples if random else 1

    def decide(self, evidence: Tensor, prior: Tensor, thresholds: Tensor) -> Tensor:
        """As the error target says."""
        return self.target.decide(evidence, prior, thresholds)


def _require_hard_states(config: RefineConfig) -> None:
    process = config.process
    discrete = process.kind == "bernoulli" or (process.kind, process.state) == ("bridge", "discrete")
    if discrete and config.error.target == "three_way":
        key = "process.kind" if process.kind == "bernoulli" else "process.state"
        raise ConfigError(
            f"diffrefine setting '{key}' draws states in {{0, 1}}, but error.target 'three_way' is in {{-1, 0, 1}}; "
            "use error.target 'absolute' or another process."
        )


def known_condition(denoiser: Denoiser, condition: Tensor) -> Callable[[Tensor, Tensor], Output]:
    """The denoiser with the condition's features computed once, where it has any."""
    compute = getattr(denoiser, "condition_features", None)
    features = None if compute is None else compute(condition)
    return denoiser if features is None else lambda x, t: denoiser(x, t, features)
