"""The column ``note`` of ``qc.csv``: where calibrated numbers are used otherwise than they were measured."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from nnunet_diffrefine.batch import Foreground
from nnunet_diffrefine.inference.apply import judge_of
from nnunet_diffrefine.inference.calibrate import calibrate
from nnunet_diffrefine.inference.decided import other_decisions, override, put_down, with_record
from nnunet_diffrefine.inference.request import Request
from nnunet_diffrefine.networks.gate import Gate
from tests.inference.calibrated import REFINER, REGION
from tests.inference.test_calibrate import folders, model, paper  # noqa: F401 (fixtures)
from tests.stage_one.tiny import DATASET

FOUND = Foreground(("core", "rim"), exclusive=True)


@pytest.fixture(scope="module")
def records():
    return []


@pytest.fixture
def record(model, records):  # noqa: F811
    """What calibration makes of the model, computed once: core is refined, rim keeps stage one's."""
    if not records:
        records.append(calibrate(model.request()))
    put_down(records[0], model.folder, "3d_fullres")
    return records[0]


@pytest.fixture
def note(model, record, tmp_path):  # noqa: F811
    """The note of a request on predictions with probabilities; ``change`` is done to the calibrated model first."""
    predictions = tmp_path / "predictions"
    predictions.mkdir()
    np.savez(predictions / "case.npz", probabilities=np.zeros(1))

    def of(change=lambda m: m, **options):
        request = Request(Path("images"), predictions, Path("out"), DATASET, REFINER, **{"region": REGION, **options})
        loaded = with_record(model.load(DATASET, REFINER, (0, 1)), REFINER, (0, 1), request.checkpoint, request.gate)
        return judge_of(request, change(loaded)).note

    return of


def with_steps(model):  # noqa: F811
    model.network.sampling = replace(model.network.sampling, steps=model.network.sampling.steps + 1)
    return model


def test_none_where_all_is_as_calibrated(note):
    assert note() == ""


def test_other_sampling_and_other_region_are_both_named(note):
    sampling, region = "calibrated with other sampling settings", "calibrated with another region"
    assert note(with_steps) == sampling
    assert note(region={"margin": 7}) == region
    assert note(with_steps, region={"margin": 7}) == f"{sampling}; {region}"


def test_not_calibrated(note, tmp_path):
    assert note(lambda m: replace(m, record=None)) == "not calibrated"
    (tmp_path / "predictions" / "case.npz").unlink()
    assert note(lambda m: replace(m, record=None)) == "not calibrated: the input has no probabilities"


def test_decisions_of_a_user_are_named_until_they_are_taken_back(note):
    other = "calibrated with another gate or offset of"
    for pairs, wanted in (
        (["rim=refine"], f"{other} rim"),
        (["core=keep"], f"{other} core, rim"),
        (["all=measured"], ""),
        (["core=refine", "rim=keep"], ""),
    ):
        override(DATASET, REFINER, pairs)
        assert note() == wanted, pairs


def test_without_gate_what_was_kept_is_named(note):
    assert note(gate=False) == "calibrated with another gate or offset of rim"


def test_offsets_count_where_a_class_is_refined(record):
    core, rim = record.classes["core"], record.classes["rim"]
    shifted = replace(record, classes={"core": replace(core, offset=0.5), "rim": replace(rim, offset=0.25)})
    for gate, wanted in (
        (Gate(FOUND, frozenset({1}), (0.5, 0.25)), []),
        (Gate(FOUND, frozenset({1}), (0.5, 0.0)), []),
        (Gate(FOUND, frozenset({1})), ["core"]),
        (Gate(FOUND), ["core", "rim"]),
        (Gate(FOUND, frozenset(), (0.5, 0.25)), ["rim"]),
    ):
        assert other_decisions(shifted, gate) == wanted
