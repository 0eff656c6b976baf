"""Two processes take the real trainer through an epoch: one model, one set of curves, one writer."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from nnunetv2.run.run_training import get_trainer_from_args
from workspace import CONFIGURATION, TINY, TRAINERS, Workspace

DRIVER = Path(__file__).with_name("ddp_driver.py")
STAGE_ONE, REFINER = "DiffRefineStageOneTrainer_tiny", "DiffRefineTrainerTwoRanks"
LIMIT = 300  # seconds; a rank that waits in vain for the other gives up after 60
pytestmark = [
    pytest.mark.nnunet,
    pytest.mark.skipif(not dist.is_gloo_available(), reason="this PyTorch has no gloo"),
]


def files(folder: Path) -> dict[Path, int]:
    """Files below a folder and when they were written."""
    return {f.relative_to(folder): f.stat().st_mtime_ns for f in folder.rglob("*") if f.is_file()}


def rank_workspace(run: Workspace, folder: Path) -> Workspace:
    """The run's preprocessed data and stage one, with results of its own: what a rank writes lies there."""
    variables = {
        "nnUNet_preprocessed": str(run.folder / "nnUNet_preprocessed"),
        "nnUNet_n_proc_DA": "0",
        "nnUNet_extTrainer": str(DRIVER.parent),
        "PYTHONPATH": os.pathsep.join((str(TRAINERS), str(TRAINERS.parent), os.environ.get("PYTHONPATH", ""))),
    }
    workspace = Workspace(folder, run.dataset, variables)
    shutil.copytree(run.model(STAGE_ONE), workspace.model(STAGE_ONE))
    return workspace


def wait(processes: list[subprocess.Popen]) -> None:
    """Wait for all, but not for ever; all must succeed."""
    end = time.monotonic() + LIMIT
    try:
        outputs = [p.communicate(timeout=max(1, end - time.monotonic()))[0] for p in processes]
    except subprocess.TimeoutExpired:
        pytest.fail(f"the ranks still wait for each other after {LIMIT} s")
    finally:
        for process in processes:
            process.kill()
    assert [p.returncode for p in processes] == [0, 0], "\n".join(output[-4000:] for output in outputs)


@pytest.fixture(scope="module")
def workspaces(region_run, tmp_path_factory) -> list[Workspace]:
    """Both ranks' workspaces after the epoch; the preprocessed data are as before."""
    folder = tmp_path_factory.mktemp("ranks")
    before = files(region_run.preprocessed)
    both = [rank_workspace(region_run, folder / f"rank_{rank}") for rank in range(2)]
    arguments = region_run.dataset, folder / "meeting"
    wait([w.start(sys.executable, DRIVER, rank, *arguments, folder / f"{rank}.pt") for rank, w in enumerate(both)])
    assert files(region_run.preprocessed) == before
    return both


@pytest.fixture(scope="module")
def ranks(workspaces) -> list[dict]:
    """What the ranks saw."""
    return [torch.load(w.folder.with_name(f"{rank}.pt"), weights_only=False) for rank, w in enumerate(workspaces)]


def same(first: dict, second: dict) -> bool:
    assert first.keys() == second.keys()
    return all(torch.equal(value, second[name]) for name, value in first.items())


def dice(counts: list[dict], prefix: str = "") -> float:
    """Mean Dice over the regions, of all counts pooled."""
    tp, fp, fn = (np.sum([step[f"{prefix}{k}_hard"] for step in counts], 0) for k in ("tp", "fp", "fn"))
    return float(np.mean(2 * tp / (2 * tp + fp + fn)))


def test_ranks_share_the_planned_batch_and_draw_differently(ranks):
    for step in range(2):
        assert sum(rank["batch_sizes"][step] for rank in ranks) == ranks[0]["planned_batch_size"]
    assert ranks[0]["draws"] != ranks[1]["draws"]
    assert set(ranks[0]["losses"]).isdisjoint(ranks[1]["losses"])


def test_weights_and_their_average_are_one_models(ranks):
    first, second = (rank["weights"] for rank in ranks)
    for moment in ("start", "trained", "end"):
        for part in ("denoiser", "ema", "stage_one"):
            assert same(first[moment][part], second[moment][part]), (moment, part)
    start, trained = first["start"], first["trained"]
    for name in ranks[0]["trainable"]:
        for part, key in (("denoiser", name), ("ema", f"module.{name}")):
            assert not torch.equal(start[part][key], trained[part][key]), (part, name)
    averaged = trained["ema"] | {f"module.{name}": value for name, value in trained["denoiser"].items()}
    assert not same(averaged, trained["ema"])


def test_validation_with_averaged_weights_gives_the_trained_ones_back(ranks):
    for rank in ranks:
        for part in ("denoiser", "ema"):
            assert same(rank["weights"]["trained"][part], rank["weights"]["end"][part])


def test_stage_one_stays_as_it_was_trained(ranks, region_run):
    file = region_run.model(STAGE_ONE) / "fold_0" / "checkpoint_final.pth"
    trained = torch.load(file, weights_only=False)["network_weights"]
    for rank in ranks:
        assert rank["ddp"]
        assert same(rank["weights"]["end"]["stage_one"], trained)


def test_curves_pool_both_ranks(ranks):
    counts = [rank["counts"] for rank in ranks]
    before, after = dice(sum(counts, []), "stage_one_"), dice(sum(counts, []))
    assert all(before != dice(own, "stage_one_") and after != dice(own) for own in counts)
    for rank in ranks:
        assert rank["curves"] == ([0], [pytest.approx(before)], [pytest.approx(after)])
        logged = rank["logged"]
        assert logged["mean_fg_dice"] == [pytest.approx(after)]
        assert logged["train_losses"] == [pytest.approx(np.mean([r["losses"] for r in ranks]))]
        assert logged["val_losses"] == [pytest.approx(np.mean([c["loss"] for own in counts for c in own]))]
    assert ranks[0]["curves"] == ranks[1]["curves"]


def test_one_process_writes_and_one_can_go_on(ranks, workspaces, monkeypatch):
    first, second = (w.model(REFINER) for w in workspaces)
    wanted = {"checkpoint_best.pth", "progress.png", "refinement.csv", "refinement.png"}
    names = {file.name for file in files(first)}
    assert wanted == {name for name in names if not name.startswith("training_log")}
    assert not files(second)

    for name, value in workspaces[0].env().items():
        if name.startswith("nnUNet_"):
            monkeypatch.setenv(name, value)
    monkeypatch.setenv("nnUNet_extTrainer", str(TRAINERS))
    cpu = torch.device("cpu")
    trainer = get_trainer_from_args(
        workspaces[0].dataset, CONFIGURATION, 0, "DiffRefineTrainer_tiny", TINY, True, device=cpu
    )
    trainer.load_checkpoint(str(first / "fold_0" / "checkpoint_best.pth"))
    assert trainer.current_epoch == 1
    assert trainer.curves.columns == ranks[0]["curves"]
    end = ranks[0]["weights"]["end"]
    assert same(trainer.refinement.denoiser.state_dict(), end["denoiser"])
    assert same(trainer.ema.state_dict(), end["ema"])
    assert same(trainer.refinement.stage_one.state_dict(), end["stage_one"])
