"""Read a block of settings into frozen dataclasses; every mistake in it is named."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar, get_type_hints

import dacite

T = TypeVar("T")


class ConfigError(ValueError):
    """A ``diffrefine`` block that cannot be used; the message names the key and what it should be."""


def require(condition: bool, key: str, value: object, wanted: str) -> None:
    """Refuse a value.

    Raises:
        ConfigError: ``condition`` does not hold.
    """
    if not condition:
        raise ConfigError(f"diffrefine setting '{key}' is {value!r}; it must be {wanted}.")


def between(key: str, value: float, low: float, high: float) -> None:
    """Refuse a value outside of [low, high].

    Raises:
        ConfigError: it is outside.
    """
    require(low <= value <= high, key, value, f"between {low} and {high}")


def read_settings(cls: type[T], values: Mapping[str, Any]) -> T:
    """Read a block into the dataclass ``cls``; missing keys keep their defaults.

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
