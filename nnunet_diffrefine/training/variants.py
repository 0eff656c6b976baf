"""Variants of the trainer: shorter ones, named as nnU-Net names them, and one for every method."""

from __future__ import annotations

from nnunet_diffrefine.methods import METHODS
from nnunet_diffrefine.training.trainer import DiffRefineTrainer


class DiffRefineTrainer_5epochs(DiffRefineTrainer):
    """Five epochs, to see that it runs."""

    length = {"num_epochs": 5}


class DiffRefineTrainer_50epochs(DiffRefineTrainer):
    """Fifty epochs."""

    length = {"num_epochs": 50}


class DiffRefineTrainer_250epochs(DiffRefineTrainer):
    """A quarter of nnU-Net's default length."""

    length = {"num_epochs": 250}


def _trainer_of(method: str) -> type[DiffRefineTrainer]:
    content = {"method": method, "__module__": __name__, "__doc__": f"Trainer of the method ``{method}``."}
    return type(METHODS[method].trainer, (DiffRefineTrainer,), content)


_OF_METHODS = {METHODS[method].trainer: _trainer_of(method) for method in METHODS}


def __getattr__(name: str) -> type[DiffRefineTrainer]:
    """The trainer of a method by its class name; a module attribute, so that it can be pickled."""
    try:
        return _OF_METHODS[name]
    except KeyError:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None
