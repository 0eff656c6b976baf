"""Refinement methods, one paper a file.

A method is found by being there: every class in a module of this folder that has a ``name`` of its own is one, so that
adding a method changes no list.
"""

from __future__ import annotations

from importlib import import_module
from inspect import getmembers, isclass
from pkgutil import iter_modules

from nnunet_diffrefine.methods.base import AbstractRefineMethod

DEFAULT_METHOD = "bridge"
"""The method of ``DiffRefineTrainer``."""


def _found() -> dict[str, type[AbstractRefineMethod]]:
    modules = [import_module(f"{__name__}.{module.name}") for module in iter_modules(__path__)]
    classes = [c for m in modules for _, c in getmembers(m, isclass) if c.__module__ == m.__name__]
    return {c.name: c for c in classes if issubclass(c, AbstractRefineMethod) and "name" in vars(c)}


METHODS: dict[str, type[AbstractRefineMethod]] = _found()

__all__ = ["DEFAULT_METHOD", "METHODS", "AbstractRefineMethod"]
