"""Two processes train one refiner: as one would on both batches, and without waiting for each other for ever."""

import socket
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from torch import Tensor, nn
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException
from torch.nn.parallel import DistributedDataParallel

from nnunet_diffrefine.batch import RefineBatch
from nnunet_diffrefine.networks.denoiser import TimeConditionedUNet
from nnunet_diffrefine.networks.refinement import RefinementNetwork
from nnunet_diffrefine.training.trainer_base import BaseTrainer
from nnunet_diffrefine.training.trainer_calibration import hand_to_best_checkpoint
from tests.builders import LABELS, batch_of, generator, method_of, nnunet_loss, unet

RANKS, STEPS = 2, 3
HANGING, LIMIT = 60, 180  # seconds a collective may wait, and all of it may take with its start
CASES = {
    "deep supervision": {"deep": True, "batch_norm": False},
    "one output": {"deep": False, "batch_norm": False},
    "stage one with batch norm": {"deep": True, "batch_norm": True},
}


def build(deep: bool, batch_norm: bool) -> RefinementNetwork:
    torch.manual_seed(0)
    method = method_of(LABELS, training={"recycling": 0.5, "prior_end": 0.3})
    norm = nn.BatchNorm3d(LABELS.heads) if batch_norm else nn.Identity()
    stage_one = nn.Sequential(nn.Conv3d(1, LABELS.heads, 3, padding=1), norm)
    inputs, outputs = method.channels(1)
    denoiser = TimeConditionedUNet(unet(inputs=inputs, outputs=outputs, deep_supervision=deep), embedding_size=8)
    return RefinementNetwork(stage_one, denoiser, method, LABELS, method.config.sampling).train()


def loss_of(network: RefinementNetwork, wrapped: nn.Module, batch: RefineBatch, draws: torch.Generator) -> Tensor:
    if not network.denoiser.deep_supervision:
        return network.method.loss(wrapped, batch, nnunet_loss(LABELS), draws)
    half = nn.functional.interpolate(batch.target, scale_factor=0.5)
    deep = RefineBatch(batch.image, batch.prior, batch.reference, batch.valid, [batch.target, half])
    return network.method.loss(wrapped, deep, DeepSupervisionWrapper(nnunet_loss(LABELS), (0.6, 0.4)), draws)


def sgd(network: RefinementNetwork) -> torch.optim.Optimizer:
    """Not AdamW: it would blow up the rounding of gradients that are zero (biases before a normalisation)."""
    return torch.optim.SGD(network.denoiser.parameters(), 0.1)


def train(rank: int, case: dict[str, bool]) -> dict:
    """One rank's weights and numbers of denoiser passes after a few steps on its own batches."""
    network, passes, counts = build(**case), [], []
    network.denoiser.register_forward_hook(lambda *_: passes.append(None))
    wrapped, optimizer, draws = DistributedDataParallel(network), sgd(network), generator(rank)
    for step in range(STEPS):
        passes.clear()
        optimizer.zero_grad()
        loss_of(network, wrapped, batch_of(LABELS, seed=10 * step + rank), draws).backward()
        optimizer.step()
        counts.append(len(passes))
    return {"weights": network.state_dict(), "counts": counts}


def end(rank: int, folder: Path) -> dict:
    """The end of a training whose first rank is slow to write: its thresholds, and whether a rank sees the file."""
    trainer, final = BaseTrainer.__new__(BaseTrainer), folder / "checkpoint_final.pth"  # without folders of nnU-Net
    trainer.is_ddp, trainer.local_rank, trainer.disable_checkpointing, trainer.current_epoch = True, rank, False, 1
    trainer.network = SimpleNamespace(module=SimpleNamespace(thresholds=torch.tensor([0.25, torch.inf]) + rank))
    trainer.output_folder, trainer.device = str(folder), torch.device("cpu")
    trainer.dataloader_train = trainer.dataloader_val = None
    trainer.print_to_log_file = lambda *_: None
    trainer.save_checkpoint = lambda _: None if rank else (time.sleep(1), final.touch())
    hand_to_best_checkpoint(trainer)
    trainer.on_train_end()
    return {"thresholds": trainer.network.module.thresholds, "written": final.is_file()}


def work(rank: int, port: int, folder: Path) -> None:
    """One of the processes: all cases, one after the other."""
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", address, timedelta(seconds=HANGING), world_size=RANKS, rank=rank)
    for name, case in CASES.items():
        torch.save(train(rank, case), folder / f"{name} {rank}.pt")
    torch.save(end(rank, folder), folder / f"end {rank}.pt")
    dist.destroy_process_group()


def in_one_process(case: dict[str, bool]) -> RefinementNetwork:
    """The same training with the mean of both ranks' gradients."""
    network = build(**case)
    optimizer, draws = sgd(network), [generator(rank) for rank in range(RANKS)]
    for step in range(STEPS):
        optimizer.zero_grad()
        for rank in range(RANKS):
            loss = loss_of(network, network, batch_of(LABELS, seed=10 * step + rank), draws[rank])
            (loss / RANKS).backward()
        optimizer.step()
    return network


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Start the processes once and wait, but not for ever: the folder of their results, and what went wrong."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = torch.multiprocessing.spawn(work, (port, folder), nprocs=RANKS, join=False)
    end, error = time.monotonic() + LIMIT, ""
    try:
        while not started.join(timeout=1):
            if time.monotonic() > end:
                return folder, f"the processes still wait for each other after {LIMIT} s"
    except (ProcessRaisedException, ProcessExitedException) as caught:
        error = str(caught)
    finally:
        for process in started.processes:
            process.kill()
    return folder, error


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_gloo_available(), reason="this PyTorch has no gloo")
@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_as_one(case: str, results: tuple[Path, str]) -> None:
    folder, error = results
    files = [folder / f"{case} {rank}.pt" for rank in range(RANKS)]
    assert all(file.is_file() for file in files), error
    first, second = (torch.load(file) for file in files)
    assert first["counts"] != second["counts"]  # one recycles where the other does not
    assert max(*first["counts"], *second["counts"]) == 2
    start, expected, moved = build(**CASES[case]).state_dict(), in_one_process(CASES[case]).state_dict(), 0.0
    for name, value in expected.items():
        assert torch.equal(first["weights"][name], second["weights"][name]), name
        if name.startswith("stage_one."):
            assert torch.equal(first["weights"][name], start[name]), name
        else:
            torch.testing.assert_close(first["weights"][name], value, atol=1e-6, rtol=0, msg=name)
            moved = max(moved, float((value - start[name]).abs().max()))
    assert moved > 0.01  # ten thousand times what the weights may differ


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_gloo_available(), reason="this PyTorch has no gloo")
def test_all_ranks_end_with_the_first_ones_thresholds_and_files(results: tuple[Path, str]) -> None:
    """Otherwise ``--val_best`` would load a checkpoint that the first rank is about to replace."""
    folder, error = results
    files = [folder / f"end {rank}.pt" for rank in range(RANKS)]
    assert all(file.is_file() for file in files), error
    for found in map(torch.load, files):
        assert found["thresholds"].tolist() == [0.25, float("inf")]
        assert found["written"]
