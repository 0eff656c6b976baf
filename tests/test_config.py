"""Settings survive their way through JSON, and every mistake in them is named."""

import json
from typing import Any

import pytest

from nnunet_diffrefine.config import ConfigError, ProcessConfig, RefineConfig

CHANGED: dict[str, Any] = {
    "method": "mask_diffusion",
    "paper_literal": True,
    "error": {
        "target": "absolute",
        "dice": 0.1,
        "entropy": 0.2,
        "squared": 0.3,
        "surface": 0.4,
        "threshold": 0.6,
        "calibration": 0.1,
        "nesting": False,
    },
    "condition": {
        "image": "masked",
        "prior": "hard",
        "outside": 0.3,
        "low_pass": 0.4,
        "encoder": True,
        "fusion": "dynamic",
        "bottleneck": "class_tokens",
        "skip": "none",
    },
    "stage_one": {"trainer": "T", "plans": "P", "configuration": "3d_lowres", "mirroring": False},
    "process": {
        "kind": "gaussian",
        "state": "discrete",
        "timesteps": 7,
        "schedule": "cosine",
        "prediction": "v",
        "input_scale": 0.3,
        "truncation": 0.5,
    },
    "training": {
        "learning_rate": 0.1,
        "weight_decay": 0.2,
        "warmup": 0.3,
        "gradient_clip": 0.4,
        "ema_decay": 0.5,
        "recycling": 0.0,
        "prior_end": 0.7,
        "deep_supervision": False,
        "initial_weights": "stage_one",
        "prior_start": False,
        "prior_morphology": 0.1,
        "prior_removal": 0.2,
        "prior_dropping": 0.3,
    },
    "sampling": {
        "steps": 2,
        "samples": 3,
        "seed": 4,
        "eta": 0.1,
        "mirrored_copies": 4,
        "min_foreground": 0.2,
        "stage_one_weight": 0.3,
    },
    "gate": {"unchanged": ["edema"], "offsets": {"core": 0.5}},
}


NOT_BESIDE_THE_OTHERS = ("condition.skip",)  # needs masks and x0


def through_json(config: RefineConfig) -> RefineConfig:
    return RefineConfig.from_dict(json.loads(json.dumps(config.to_dict())))


def nested(key: str, value: object) -> dict[str, Any]:
    group, _, name = key.rpartition(".")
    return {group: {name: value}} if group else {name: value}


def test_defaults_survive_json() -> None:
    assert through_json(RefineConfig()) == RefineConfig()
    assert RefineConfig.from_dict({}) == RefineConfig()


def test_every_setting_survives_json() -> None:
    changed = RefineConfig.from_dict(CHANGED)
    default = RefineConfig().to_dict()
    for group, values in CHANGED.items():
        for name, value in values.items() if isinstance(values, dict) else ():
            if f"{group}.{name}" not in NOT_BESIDE_THE_OTHERS:
                assert default[group][name] != value, f"{group}.{name} is not changed by this test"
    assert changed.to_dict() == CHANGED
    assert through_json(changed) == changed


def test_the_skip_survives_json_and_is_for_masks_of_a_prior() -> None:
    config = RefineConfig.from_dict({"condition": {"skip": "prior"}})
    assert config != RefineConfig()
    assert through_json(config) == config
    for others in ({"error": {"target": "absolute"}}, {"condition": {"prior": "none"}}):
        with pytest.raises(ConfigError, match="condition.skip"):
            RefineConfig.from_dict({**others, "condition": {"skip": "prior", **others.get("condition", {})}})


def test_missing_settings_keep_their_defaults() -> None:
    config = RefineConfig.from_dict({"process": {"timesteps": 20}, "sampling": {"steps": 20}})
    assert config.process == ProcessConfig(timesteps=20)
    assert config.training == RefineConfig().training


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("sampling.step", "sampling.steps"),
        ("process.timestep", "process.timesteps"),
        ("stage_one.trainner", "stage_one.trainer"),
        ("training.recycle", "training.recycling"),
        ("sampeling", "sampling"),
        ("qqq", None),
    ],
)
def test_unknown_settings_are_named_with_the_nearest_valid_one(key: str, nearest: str | None) -> None:
    with pytest.raises(ConfigError) as error:
        RefineConfig.from_dict(nested(key, 1))
    assert f"'{key}'" in str(error.value)
    if nearest:
        assert f"Nearest valid one: '{nearest}'." in str(error.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("sampling.steps", "3"),
        ("sampling.steps", 1.0),
        ("sampling.steps", True),
        ("sampling.steps", None),
        ("stage_one.mirroring", 1),
        ("stage_one.mirroring", "false"),
        ("training.learning_rate", "1e-3"),
        ("training.learning_rate", True),
        ("training.warmup", [0.1]),
        ("training.initial_weights", "imagenet"),
        ("process.kind", "ddpm"),
        ("process.prediction", ["x0"]),
        ("stage_one.trainer", 5),
        ("method", 3),
        ("process", 3),
        ("training", None),
    ],
)
def test_wrong_types_are_named(key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"'{key}'"):
        RefineConfig.from_dict(nested(key, value))


def test_a_whole_number_will_do_for_a_real_one() -> None:
    value = RefineConfig.from_dict({"training": {"gradient_clip": 12}}).training.gradient_clip
    assert (value, type(value)) == (12.0, float)


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("process.timesteps", (0, -1, 100_001)),
        ("process.input_scale", (0.0, -1.0, float("nan"))),
        ("training.learning_rate", (0.0, -1e-3, float("nan"))),
        ("training.weight_decay", (-1e-9,)),
        ("training.gradient_clip", (0.0, -1.0)),
        ("training.warmup", (-0.1, 1.1, float("nan"))),
        ("training.recycling", (-0.1, 1.1)),
        ("training.prior_end", (-0.1, 1.1)),
        ("training.ema_decay", (-0.1, 1.0)),
        ("sampling.steps", (0, -1)),
        ("sampling.samples", (0, -1)),
        ("sampling.eta", (-0.1, 1.1)),
        ("sampling.min_foreground", (-0.1, 1.1)),
        ("sampling.stage_one_weight", (-0.1, 1.1)),
    ],
)
def test_values_out_of_range_are_named(key: str, values: tuple[float, ...]) -> None:
    for value in values:
        with pytest.raises(ConfigError, match=f"'{key}' is {value}"):
            RefineConfig.from_dict(nested(key, value))


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("process.timesteps", (1, 100_000)),
        ("training.warmup", (0, 1)),
        ("training.recycling", (0, 1)),
        ("training.prior_end", (0, 1)),
        ("training.ema_decay", (0, 0.9999)),
        ("training.weight_decay", (0,)),
        ("sampling.eta", (0, 1)),
        ("sampling.min_foreground", (0, 1)),
        ("sampling.stage_one_weight", (0, 1)),
    ],
)
def test_the_ends_of_each_range_are_allowed(key: str, values: tuple[float, ...]) -> None:
    group, name = key.split(".")
    for value in values:
        assert RefineConfig.from_dict(nested(key, value)).to_dict()[group][name] == value


def test_no_more_steps_than_timesteps() -> None:
    assert RefineConfig.from_dict({"process": {"timesteps": 4}, "sampling": {"steps": 4}}).sampling.steps == 4
    with pytest.raises(ConfigError, match=r"'sampling.steps' is 5; it must be at most process.timesteps \(4\)"):
        RefineConfig.from_dict({"process": {"timesteps": 4}, "sampling": {"steps": 5}})


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_the_bridge_knows_x0_alone(prediction: str) -> None:
    with pytest.raises(ConfigError, match="process.prediction.*'x0' for process.kind 'bridge'"):
        RefineConfig.from_dict({"process": {"prediction": prediction}})
    training = {"recycling": 0.0, "deep_supervision": False}
    assert RefineConfig.from_dict({"process": {"kind": "gaussian", "prediction": prediction}, "training": training})
