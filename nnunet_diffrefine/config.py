"""Settings of a refiner: frozen dataclasses, read from and written to the plans' ``"diffrefine"`` block.

nnU-Net rebuilds a network from ``plans.json`` alone and lets a trainer's constructor take no arguments of its own, so
every setting that shapes the network, its training or its sampling lives in the plans and nowhere else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from nnunet_diffrefine.settings_block import ConfigError, between, read_settings, require

__all__ = ["BLOCK", "ConfigError", "RefineConfig"]

BLOCK = "diffrefine"


@dataclass(frozen=True)
class StageOneConfig:
    """Which network is refined. ``auto``: the refiner's own plans and configuration, and the only export there is.

    Attributes:
        trainer: nnU-Net trainer class name of stage one.
        plans: plans identifier of stage one.
        configuration: configuration of stage one.
        mirroring: average stage one over nnU-Net's mirrored copies inside the network (as the export does).
    """

    trainer: str = "auto"
    plans: str = "auto"
    configuration: str = "auto"
    mirroring: bool = True


@dataclass(frozen=True)
class ErrorConfig:
    """What the denoiser learns to generate, and how it is weighted in the loss.

    Attributes:
        target: ``mask`` (the reference), ``absolute`` (|reference - hard prior|, to flip) or ``three_way`` (remove,
            keep or add, the signed error), per class or region.
        dice: weight of the Dice loss of an error target.
        entropy: weight of its cross-entropy.
        squared: weight of the mean squared error of the probabilities, of error and mask targets.
        surface: weight of the surface loss of a mask target.
        threshold: probability from which on an error is mended, where none was calibrated.
        calibration: share of a fold's training cases kept out of training, on which the threshold of each class is
            chosen for the final Dice; 0 keeps ``threshold``.
        nesting: in the decision of an error target, cut regions to the regions that contain them. A mask target is
            decided as nnU-Net decides, whose label map extends the containing regions instead.
    """

    target: Literal["mask", "absolute", "three_way"] = "mask"
    dice: float = 0.0
    entropy: float = 1.0
    squared: float = 0.0
    surface: float = 0.0
    threshold: float = 0.5
    calibration: float = 0.0
    nesting: bool = True

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        for key in ("dice", "entropy", "squared", "surface"):
            require(getattr(self, key) >= 0, f"error.{key}", getattr(self, key), "0 or more")
        require(0 < self.threshold < 1, "error.threshold", self.threshold, "above 0 and below 1")
        require(0 <= self.calibration <= 0.5, "error.calibration", self.calibration, "between 0 and 0.5")


@dataclass(frozen=True)
class ProcessConfig:
    """The diffusion process.

    Attributes:
        kind: ``bridge`` ends at the prior, ``gaussian`` at noise, ``bernoulli`` at coin flips; ``none`` is one pass.
        state: ``deterministic`` (prior + a_t E) or ``discrete`` (its Bernoulli or categorical draw); bridge only.
        timesteps: T, the number of steps of the forward process.
        schedule: ``linear`` or ``cosine``.
        prediction: what the denoiser predicts: ``epsilon`` and ``v`` for Gaussian noise, ``flip`` (x_t XOR x_0) for
            Bernoulli noise, ``x0`` for all.
        input_scale: Gaussian only: factor on the clean variable in [-1, 1]; small values make low noise levels harder.
        truncation: Gaussian only: T'/T; below 1 the reverse process starts from the noised prior at T'.
    """

    kind: Literal["bridge", "gaussian", "bernoulli", "none"] = "bridge"
    state: Literal["deterministic", "discrete"] = "deterministic"
    timesteps: int = 10
    schedule: Literal["linear", "cosine"] = "linear"
    prediction: Literal["x0", "epsilon", "v", "flip"] = "x0"
    input_scale: float = 1.0
    truncation: float = 1.0

    def __post_init__(self) -> None:
        """Refuse values no process can run with."""
        between("process.timesteps", self.timesteps, 1, 100_000)
        require(self.input_scale > 0, "process.input_scale", self.input_scale, "above 0")
        require(0 < self.truncation <= 1, "process.truncation", self.truncation, "above 0 and at most 1")
        known = {"gaussian": ("x0", "epsilon", "v"), "bernoulli": ("x0", "flip")}.get(self.kind, ("x0",))
        wanted = f"{' or '.join(map(repr, known))} for process.kind '{self.kind}'"
        require(self.prediction in known, "process.prediction", self.prediction, wanted)
        if self.kind != "gaussian":
            require(self.truncation == 1, "process.truncation", self.truncation, f"1 for process.kind '{self.kind}'")


@dataclass(frozen=True)
class ConditionConfig:
    """What the denoiser sees beside the state.

    Attributes:
        image: ``plain``, ``masked`` (weighted down outside of the prior) or ``none``.
        prior: ``soft`` (probabilities), ``hard`` (decided) or ``none``.
        outside: weight of a masked image outside of the prior.
        low_pass: cut-off of a Fourier low-pass on the image, as a share of the Nyquist frequency; 0 is none.
        encoder: a second encoder for the condition, its features joined to the denoiser's at every stage.
        fusion: how they are joined: ``add``, or ``dynamic`` (frequency-parsed attention).
        bottleneck: what follows the denoiser's deepest stage: ``channel_attention``, ``self_attention``,
            ``class_tokens`` or ``none``.
        skip: ``prior`` adds the prior's logits to the denoiser's output, whose last layer starts at zero, so that an
            untrained refiner is stage one; ``none`` for outputs that are no masks.
    """

    image: Literal["plain", "masked", "none"] = "plain"
    prior: Literal["soft", "hard", "none"] = "soft"
    outside: float = 0.2
    low_pass: float = 0.0
    encoder: bool = False
    fusion: Literal["add", "dynamic"] = "add"
    bottleneck: Literal["none", "channel_attention", "self_attention", "class_tokens"] = "none"
    skip: Literal["none", "prior"] = "none"

    def __post_init__(self) -> None:
        """Refuse an empty condition and values outside their range."""
        between("condition.outside", self.outside, 0.0, 1.0)
        between("condition.low_pass", self.low_pass, 0.0, 1.0)
        require((self.image, self.prior) != ("none", "none"), "condition.image", self.image, "shown, or the prior")
        require(self.prior != "none" or self.skip == "none", "condition.skip", self.skip, "'none' without a prior")


@dataclass(frozen=True)
class TrainingConfig:
    """How the denoiser is trained; epochs and steps per epoch belong to the trainer class, as in nnU-Net.

    Attributes:
        learning_rate: peak of AdamW's learning rate.
        weight_decay: of AdamW.
        warmup: share of the training during which the learning rate rises linearly; a cosine follows.
        gradient_clip: maximum gradient norm.
        ema_decay: of the exponential moving average whose weights are used for inference.
        recycling: share of training states built from the model's own prediction instead of the reference.
        prior_end: share of draws at t = T, where test time starts; the others are uniform over 1..T.
        deep_supervision: nnU-Net's deep supervision of the denoiser.
        initial_weights: ``random``, or ``stage_one``: start from stage one's weights, new inputs at zero.
        prior_start: for a truncated process, train at t = T' on the noised prior, where sampling starts, instead of on
            the noised reference.
        prior_morphology: share of training priors grown or shrunk.
        prior_removal: share of training priors that lose a component.
        prior_dropping: share of training priors taken away altogether.
    """

    learning_rate: float = 1e-3
    weight_decay: float = 1e-4
    warmup: float = 0.05
    gradient_clip: float = 1.0
    ema_decay: float = 0.999
    recycling: float = 0.8
    prior_end: float = 0.5
    deep_supervision: bool = True
    initial_weights: Literal["random", "stage_one"] = "random"
    prior_start: bool = True
    prior_morphology: float = 0.0
    prior_removal: float = 0.0
    prior_dropping: float = 0.0

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        require(self.learning_rate > 0, "training.learning_rate", self.learning_rate, "above 0")
        require(self.weight_decay >= 0, "training.weight_decay", self.weight_decay, "0 or more")
        require(self.gradient_clip > 0, "training.gradient_clip", self.gradient_clip, "above 0")
        for key in ("warmup", "recycling", "prior_end", "prior_morphology", "prior_removal", "prior_dropping"):
            between(f"training.{key}", getattr(self, key), 0.0, 1.0)
        require(0 <= self.ema_decay < 1, "training.ema_decay", self.ema_decay, "at least 0 and below 1")


@dataclass(frozen=True)
class SamplingConfig:
    """How a refined mask is drawn.

    Attributes:
        steps: denoiser passes per sample; at most ``process.timesteps``.
        samples: K, the number of seeds averaged; 1 suffices for a deterministic state.
        seed: of the noise; the same image and seed give the same bytes.
        eta: Gaussian and Bernoulli: 0 is DDIM, 1 is DDPM.
        mirrored_copies: number of mirrored copies the refiner is averaged over, the window itself being the first.
        min_foreground: windows in which no foreground probability of stage one reaches this pass through unrefined.
        stage_one_weight: share of stage one's logits in the result; 0 is the refiner alone.
    """

    steps: int = 1
    samples: int = 1
    seed: int = 0
    eta: float = 0.0
    mirrored_copies: int = 1
    min_foreground: float = 0.01
    stage_one_weight: float = 0.0

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        require(self.steps >= 1, "sampling.steps", self.steps, "at least 1")
        between("sampling.mirrored_copies", self.mirrored_copies, 1, 8)
        require(self.samples >= 1, "sampling.samples", self.samples, "at least 1")
        for key in ("eta", "min_foreground", "stage_one_weight"):
            between(f"sampling.{key}", getattr(self, key), 0.0, 1.0)


@dataclass(frozen=True)
class GateConfig:
    """What of the refiner's result is used; ``nnUNetv2_diffrefine calibrate`` writes it into a trained model's plans.

    Attributes:
        unchanged: names of the classes or regions that keep stage one's decision.
        offsets: name -> what is added to the refined logit of a class or region before the decision; 0 where missing.
    """

    unchanged: list[str] = field(default_factory=list)
    offsets: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class RefineConfig:
    """All settings of a refiner; ``RefineConfig()`` is the default method, started from random weights.

    Attributes:
        method: name of the method.
        paper_literal: settings as the paper prints them, where they can run, instead of the sound ones.
        stage_one: which network is refined.
        error: what is generated, its loss and its decision.
        condition: what the denoiser sees.
        process: the diffusion process.
        training: how the denoiser is trained.
        sampling: how a mask is drawn.
        gate: what of it is used.
    """

    method: str = "bridge"
    paper_literal: bool = False
    stage_one: StageOneConfig = field(default_factory=StageOneConfig)
    error: ErrorConfig = field(default_factory=ErrorConfig)
    condition: ConditionConfig = field(default_factory=ConditionConfig)
    process: ProcessConfig = field(default_factory=ProcessConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    gate: GateConfig = field(default_factory=GateConfig)

    def __post_init__(self) -> None:
        """Check what concerns two parts at once."""
        steps, timesteps = self.sampling.steps, self.process.timesteps
        truncated = "" if self.process.truncation == 1 else " x process.truncation"
        timesteps = max(int(timesteps * self.process.truncation), 1)
        require(steps <= timesteps, "sampling.steps", steps, f"at most process.timesteps{truncated} ({timesteps})")
        start, image = self.training.initial_weights, self.condition.image
        require(image != "none" or start == "random", "training.initial_weights", start, "'random' without an image")
        masks = self.error.target == "mask" and self.process.prediction == "x0"
        skip = self.condition.skip
        require(masks or skip == "none", "condition.skip", skip, "'none' where no masks are predicted")
        if self.process.prediction in ("epsilon", "v"):
            deep, recycling = self.training.deep_supervision, self.training.recycling
            require(not deep, "training.deep_supervision", deep, "false to predict epsilon or v")
            # The noise would lead to the model's own prediction, not to x_0.
            require(recycling == 0, "training.recycling", recycling, "0 to predict epsilon or v")

    def to_dict(self) -> dict[str, Any]:
        """Return plain dictionaries, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RefineConfig:
        """Read a block; missing keys keep their defaults.

        Raises:
            ConfigError: a key is unknown (the nearest valid one is named), of the wrong type, or out of range.
        """
        return read_settings(cls, values)
