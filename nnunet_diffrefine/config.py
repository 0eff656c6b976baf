"""Settings of a refiner: frozen dataclasses, read from and written to the plans' ``"diffrefine"`` block.

nnU-Net rebuilds a network from ``plans.json`` alone and lets a trainer's constructor take no arguments of its own, so
every setting that shapes the network, its training or its sampling lives in the plans and nowhere else.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Any, Literal, get_type_hints

import dacite

BLOCK = "diffrefine"


class ConfigError(ValueError):
    """A ``diffrefine`` block that cannot be used; the message names the key and what it should be."""


def _require(condition: bool, key: str, value: object, wanted: str) -> None:
    if not condition:
        raise ConfigError(f"diffrefine setting '{key}' is {value!r}; it must be {wanted}.")


def _between(key: str, value: float, low: float, high: float) -> None:
    _require(low <= value <= high, key, value, f"between {low} and {high}")


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
class ProcessConfig:
    """The diffusion process.

    Attributes:
        kind: ``bridge`` ends at the prior, ``gaussian`` ends at noise.
        state: ``deterministic`` (prior + a_t E) or ``discrete`` (its Bernoulli or categorical draw); bridge only.
        timesteps: T, the number of steps of the forward process.
        schedule: ``linear`` or ``cosine``.
        prediction: what the denoiser predicts; the bridge knows ``x0`` alone.
        input_scale: Gaussian only: factor on the mask in [-1, 1]; small values make low noise levels harder.
    """

    kind: Literal["bridge", "gaussian"] = "bridge"
    state: Literal["deterministic", "discrete"] = "deterministic"
    timesteps: int = 10
    schedule: Literal["linear", "cosine"] = "linear"
    prediction: Literal["x0", "epsilon", "v"] = "x0"
    input_scale: float = 1.0

    def __post_init__(self) -> None:
        """Refuse values no process can run with."""
        _between("process.timesteps", self.timesteps, 1, 100_000)
        _require(self.input_scale > 0, "process.input_scale", self.input_scale, "above 0")
        if self.kind == "bridge":
            _require(self.prediction == "x0", "process.prediction", self.prediction, "'x0' for the bridge")


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

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        _require(self.learning_rate > 0, "training.learning_rate", self.learning_rate, "above 0")
        _require(self.weight_decay >= 0, "training.weight_decay", self.weight_decay, "0 or more")
        _require(self.gradient_clip > 0, "training.gradient_clip", self.gradient_clip, "above 0")
        for key in ("warmup", "recycling", "prior_end"):
            _between(f"training.{key}", getattr(self, key), 0.0, 1.0)
        _require(0 <= self.ema_decay < 1, "training.ema_decay", self.ema_decay, "at least 0 and below 1")


@dataclass(frozen=True)
class SamplingConfig:
    """How a refined mask is drawn.

    Attributes:
        steps: denoiser passes per sample; at most ``process.timesteps``.
        samples: K, the number of seeds averaged; 1 suffices for a deterministic state.
        seed: of the noise; the same image and seed give the same bytes.
        eta: Gaussian only: 0 is DDIM, 1 is DDPM.
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
        _require(self.steps >= 1, "sampling.steps", self.steps, "at least 1")
        _between("sampling.mirrored_copies", self.mirrored_copies, 1, 8)
        _require(self.samples >= 1, "sampling.samples", self.samples, "at least 1")
        for key in ("eta", "min_foreground", "stage_one_weight"):
            _between(f"sampling.{key}", getattr(self, key), 0.0, 1.0)


@dataclass(frozen=True)
class RefineConfig:
    """All settings of a refiner; ``RefineConfig()`` is the default method."""

    method: str = "bridge"
    stage_one: StageOneConfig = field(default_factory=StageOneConfig)
    process: ProcessConfig = field(default_factory=ProcessConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)

    def __post_init__(self) -> None:
        """Check what concerns two parts at once."""
        steps, timesteps = self.sampling.steps, self.process.timesteps
        _require(steps <= timesteps, "sampling.steps", steps, f"at most process.timesteps ({timesteps})")

    def to_dict(self) -> dict[str, Any]:
        """Return plain dictionaries, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RefineConfig:
        """Read a block; missing keys keep their defaults.

        Raises:
            ConfigError: a key is unknown (the nearest valid one is named), of the wrong type, or out of range.
        """
        _refuse_unknown_keys(cls, values, prefix="")
        try:
            return dacite.from_dict(cls, values, dacite.Config(strict=True, type_hooks={float: _as_float}))
        except dacite.DaciteFieldError as error:
            raise ConfigError(f"diffrefine setting '{error.field_path}': {error}") from error


def _as_float(value: object) -> object:
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _refuse_unknown_keys(cls: type, values: Mapping[str, Any], prefix: str) -> None:
    if not isinstance(values, Mapping):
        raise ConfigError(f"diffrefine setting '{prefix.rstrip('.')}' is {values!r}; it must be a group of settings.")
    hints = get_type_hints(cls)
    names = [f.name for f in fields(cls)]
    for key, value in values.items():
        if key not in names:
            raise ConfigError(_unknown_key(f"{prefix}{key}", key, names, prefix))
        if isinstance(value, bool) and hints[key] in (int, float):
            raise ConfigError(f"diffrefine setting '{prefix}{key}' is {value}; it must be a number.")
        if is_dataclass(hints[key]):
            _refuse_unknown_keys(hints[key], value, prefix=f"{key}.")


def _unknown_key(path: str, key: str, names: list[str], prefix: str) -> str:
    nearest = difflib.get_close_matches(str(key), names, n=1, cutoff=0.0)[0]
    return f"Unknown diffrefine setting '{path}'. Nearest valid one: '{prefix}{nearest}'. All: {', '.join(names)}."
