"""Settings of ReCoSeg's two trainings, read from the plans' ``diffrefine`` block; presets and sources: docs/methods.

They share nothing with :class:`RefineConfig`: there is no stage one, no prior and no error map.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from nnunet_diffrefine.settings_block import ConfigError, between, require

SYNTHESIS, RECOSEG = "recoseg_synthesis", "recoseg"
ALIASES = (("t1ce", "t1gd", "t1c", "t1wce", "t1wgd", "t1post"), ("t2f", "flair", "t2flair"))
"""Names of the same MRI sequence, as data sets spell them, without case and punctuation."""


@dataclass(frozen=True)
class NoiseConfig:
    """The diffusion of the synthesised channel, in standard deviations of its intensities.

    Attributes:
        timesteps: T.
        schedule: ``linear`` or ``cosine``.
        prediction: what the denoiser predicts, ``x0`` or ``epsilon``.
        input_scale: factor on the clean channel in the noised state.
    """

    timesteps: int = 1000
    schedule: Literal["linear", "cosine"] = "cosine"
    prediction: Literal["x0", "epsilon"] = "x0"
    input_scale: float = 1.0

    def __post_init__(self) -> None:
        """Refuse values no process can run with."""
        between("process.timesteps", self.timesteps, 1, 100_000)
        require(self.input_scale > 0, "process.input_scale", self.input_scale, "above 0")


@dataclass(frozen=True)
class SynthesisTrainingConfig:
    """How the denoiser is trained.

    Attributes:
        loss: ``l1`` or ``l2`` of the predicted channel or noise.
        noise_end: share of draws at t = T, where sampling starts; the others are uniform over 1..T.
        learning_rate: Adam's, at the start.
        minimum_rate: halving stops there.
        patience: epochs without a lower validation error before the rate is halved.
        weight_decay: decoupled (AdamW); 0 is Adam.
        gradient_clip: maximum gradient norm.
        ema_decay: of the averaged weights, which are the ones used for inference.
    """

    loss: Literal["l1", "l2"] = "l1"
    noise_end: float = 0.25
    learning_rate: float = 3e-4
    minimum_rate: float = 1.5e-4
    patience: int = 30
    weight_decay: float = 0.0
    gradient_clip: float = 1.0
    ema_decay: float = 0.999

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        between("training.noise_end", self.noise_end, 0.0, 1.0)
        require(self.learning_rate > 0, "training.learning_rate", self.learning_rate, "above 0")
        between("training.minimum_rate", self.minimum_rate, 0.0, self.learning_rate)
        require(self.patience >= 0, "training.patience", self.patience, "0 or more")
        require(self.weight_decay >= 0, "training.weight_decay", self.weight_decay, "0 or more")
        require(self.gradient_clip > 0, "training.gradient_clip", self.gradient_clip, "above 0")
        require(0 <= self.ema_decay < 1, "training.ema_decay", self.ema_decay, "at least 0 and below 1")


@dataclass(frozen=True)
class DrawConfig:
    """How a channel is drawn.

    Attributes:
        steps: denoiser passes, 1 to T; 1 is regression.
        samples: number of seeds averaged.
        seed: of the noise; the same window and seed give the same bytes.
        eta: 0 is DDIM, 1 is DDPM.
        clip: predicted intensities are kept within this many standard deviations.
    """

    steps: int = 4
    samples: int = 1
    seed: int = 0
    eta: float = 0.0
    clip: float = 10.0

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        require(self.steps >= 1, "sampling.steps", self.steps, "at least 1")
        require(self.samples >= 1, "sampling.samples", self.samples, "at least 1")
        between("sampling.eta", self.eta, 0.0, 1.0)
        require(self.clip > 0, "sampling.clip", self.clip, "above 0")


@dataclass(frozen=True)
class SynthesisConfig:
    """All settings of ``ReCoSegSynthesisTrainer``.

    Attributes:
        method: ``recoseg_synthesis``.
        paper_literal: settings as the paper prints them, where they can run.
        channel: name of the synthesised channel in ``dataset.json``; case, punctuation and spelling do not matter.
        attention_heads: of the self-attention at the bottleneck; 0 is none.
        maximum: largest stored residual in standard deviations; larger ones are clipped.
        process: the diffusion.
        training: how the denoiser is trained.
        sampling: how a channel is drawn.
    """

    method: str = SYNTHESIS
    paper_literal: bool = False
    channel: str = "T1ce"
    attention_heads: int = 4
    maximum: float = 8.0
    process: NoiseConfig = field(default_factory=NoiseConfig)
    training: SynthesisTrainingConfig = field(default_factory=SynthesisTrainingConfig)
    sampling: DrawConfig = field(default_factory=DrawConfig)

    def __post_init__(self) -> None:
        """Check ranges, and what concerns two parts at once."""
        require(self.attention_heads >= 0, "attention_heads", self.attention_heads, "0 or more")
        require(self.maximum > 0, "maximum", self.maximum, "above 0")
        wanted = f"at most process.timesteps, {self.process.timesteps}"
        require(self.sampling.steps <= self.process.timesteps, "sampling.steps", self.sampling.steps, wanted)


@dataclass(frozen=True)
class SourceConfig:
    """Which synthesis model; ``auto``: the only one exported, those of the same plans and configuration first."""

    trainer: str = "auto"
    plans: str = "auto"
    configuration: str = "auto"


@dataclass(frozen=True)
class ResidualConfig:
    """From the absolute difference to a network input in [0, 1].

    Attributes:
        normalisation: ``training``: from 0 to one maximum that is kept with the model, taken from the out-of-fold
            residuals of the fold's training cases; ``window``: from minimum to maximum of each window.
        saturation: the quantile within a case that counts as its maximum; ``training`` only.
        threshold: share of the range below which the residual is 0; the rest is stretched to [0, 1].
    """

    normalisation: Literal["training", "window"] = "training"
    saturation: float = 0.995
    threshold: float = 0.1

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        require(0 < self.saturation <= 1, "residual.saturation", self.saturation, "above 0 and at most 1")
        require(0 <= self.threshold < 1, "residual.threshold", self.threshold, "at least 0 and below 1")


@dataclass(frozen=True)
class DecisionConfig:
    """From which probability on a voxel is foreground.

    Attributes:
        calibration: share of a fold's training cases kept out of training, at least one case, on which the threshold
            is chosen; 0 keeps ``threshold``.
        candidates: thresholds that are tried.
        threshold: used where none was chosen.
    """

    calibration: float = 0.1
    candidates: list[float] = field(default_factory=lambda: [k / 20 for k in range(1, 20)])
    threshold: float = 0.5

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        between("decision.calibration", self.calibration, 0.0, 0.5)
        inside = bool(self.candidates) and all(0 < tau < 1 for tau in self.candidates)
        require(inside, "decision.candidates", self.candidates, "a list of numbers above 0 and below 1")
        require(0 < self.threshold < 1, "decision.threshold", self.threshold, "above 0 and below 1")


@dataclass(frozen=True)
class ReCoSegConfig:
    """All settings of ``ReCoSegTrainer``.

    Attributes:
        method: ``recoseg``.
        paper_literal: settings as the paper prints them, where they can run.
        synthesis: which exported synthesis model.
        channel: the additional input: the ``residual``, or the ``synthesis`` itself (DDMM-Synth).
        keep_target: whether the real channel stays among the inputs.
        mirroring: average the segmentation over mirrored copies at prediction.
        residual: thresholding and normalisation.
        decision: thresholds on probabilities.
    """

    method: str = RECOSEG
    paper_literal: bool = False
    synthesis: SourceConfig = field(default_factory=SourceConfig)
    channel: Literal["residual", "synthesis"] = "residual"
    keep_target: bool = True
    mirroring: bool = True
    residual: ResidualConfig = field(default_factory=ResidualConfig)
    decision: DecisionConfig = field(default_factory=DecisionConfig)


def find_channel(name: str, dataset_json: Mapping[str, Any]) -> int:
    """Index of the channel to synthesise among nnU-Net's image channels.

    Raises:
        ConfigError: no channel has this name, several have, or it is the only one.
    """
    names = channel_names(dataset_json)
    there = f"dataset.json has {', '.join(names.values()) or 'no channel_names'}"
    if len(names) < 2:
        raise ConfigError(
            f"diffrefine setting 'channel' is {name!r}: one image channel is synthesised from the others, but {there}. "
            "Use a data set with two channels or more, or another method."
        )
    found = [index for index, other in names.items() if same_sequence(name, other)]
    if len(found) != 1:
        which = "no channel of that name" if not found else "several"
        raise ConfigError(
            f"diffrefine setting 'channel' is {name!r}: {which}; {there}. Set it to exactly one of these."
        )
    return found[0]


def channel_names(dataset_json: Mapping[str, Any]) -> dict[int, str]:
    """Names of nnU-Net's image channels by index."""
    named = dataset_json.get("channel_names", dataset_json.get("modality", {}))
    return {int(index): str(name) for index, name in named.items()}


def same_sequence(first: str, second: str) -> bool:
    """Whether two channel names mean the same sequence: T1ce, T1-Gd and t1c do."""
    a, b = (re.sub(r"[\W_]", "", name.lower()) for name in (first, second))
    return a == b or any(a in group and b in group for group in ALIASES)


def to_dict(config: SynthesisConfig | ReCoSegConfig) -> dict[str, Any]:
    """Plain dictionaries, ready for JSON."""
    return asdict(config)
