"""``apply``'s command line: every argument arrives in the request under its own meaning."""

from __future__ import annotations

from pathlib import Path

import pytest

from nnunet_diffrefine import cli
from nnunet_diffrefine.inference import apply as module
from nnunet_diffrefine.inference.request import Request
from nnunet_diffrefine.paths import StageOneId

NEEDED = ["-i", "images", "-s", "predictions", "-o", "out", "-d", "4"]
PATHS = (Path("images"), Path("predictions"), Path("out"), "4")


@pytest.fixture
def parsed(monkeypatch):
    """The request that a command line makes."""
    monkeypatch.setenv("nnUNet_extTrainer", "")

    def parse(line: str) -> Request:
        requests = []
        monkeypatch.setattr(module, "apply", requests.append)
        args = cli.parser().parse_args(["apply", *NEEDED, *line.split()])
        args.func(args)
        (request,) = requests
        return request

    return parse


def test_without_options_everything_is_the_default(parsed):
    refiner = StageOneId("DiffRefineTrainer", "nnUNetPlans", "3d_fullres")
    assert parsed("") == Request(*PATHS, refiner, region={})


def test_all_options_together(parsed):
    line = (
        "-c 3d_lowres -tr Other -p Plans -f 1 3 -chk checkpoint_best.pth --steps 7 --samples 5 --seed 11 --soften 1.5 "
        "--margin 6 --entropy 0.3 --candidates 0.2 --everywhere --no_gate --not_on_device -num_parts 8 -part_id 2 "
        "-npp 1 -nps 4 -device cpu --save_probabilities --save_uncertainty --save_error_map --continue_prediction "
        "--disable_progress_bar"
    )
    assert parsed(line) == Request(
        *PATHS, StageOneId("Other", "Plans", "3d_lowres"), (1, 3), "checkpoint_best.pth",
        steps=7, samples=5, seed=11, soften=1.5,
        region={"margin": 6, "entropy": 0.3, "candidates": 0.2, "everywhere": True},
        gate=False, on_device=False, num_parts=8, part_id=2, npp=1, nps=4, device="cpu",
        save_probabilities=True, save_uncertainty=True, save_error_map=True, continue_prediction=True, progress=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("option", "changes"),
    [
        ("--steps 3", {"steps": 3}),
        ("--samples 3", {"samples": 3}),
        ("--seed 3", {"seed": 3}),
        ("--soften 3", {"soften": 3.0}),
        ("--margin 0", {"region": {"margin": 0}}),
        ("--entropy 0", {"region": {"entropy": 0.0}}),
        ("--candidates 0.3", {"region": {"candidates": 0.3}}),
        ("--everywhere", {"region": {"everywhere": True}}),
        ("--no_gate", {"gate": False}),
        ("--not_on_device", {"on_device": False}),
        ("-num_parts 3", {"num_parts": 3}),
        ("-part_id 3", {"part_id": 3}),
        ("-npp 0", {"npp": 0}),
        ("-nps 0", {"nps": 0}),
        ("--save_probabilities", {"save_probabilities": True}),
        ("--save_uncertainty", {"save_uncertainty": True}),
        ("--save_error_map", {"save_error_map": True}),
        ("--continue_prediction", {"continue_prediction": True}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_each_option_changes_its_own_field_alone(parsed, option, changes):
    found, default = vars(parsed(option)), vars(parsed(""))
    assert {key: value for key, value in found.items() if value != default[key]} == changes
