"""What trainers start from: stage one's weights, in the denoiser that is trained and in its average."""

import pytest
import torch
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager

from nnunet_diffrefine.networks.planned import planned_unet
from nnunet_diffrefine.training.trainer import DiffRefineTrainer
from nnunet_diffrefine.training.trainer_base import network_weights
from tests.builders import LABELS
from tests.planted import ARCHITECTURE, network_with, shipped_method


def stage_one(seed):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return planned_unet(ConfigurationManager({"architecture": ARCHITECTURE}), 1, LABELS.heads, False)


@pytest.fixture
def checkpoint(tmp_path):
    """Of a stage one that was trained on several GPUs."""
    weights = {f"module.{name}": value for name, value in stage_one(5).state_dict().items()}
    torch.save({"network_weights": weights, "epoch": 1000}, tmp_path / "checkpoint_final.pth")
    return tmp_path / "checkpoint_final.pth"


@pytest.mark.parametrize("warm", [False, True])
def test_the_average_starts_where_the_denoiser_starts(checkpoint, warm):
    wanted = stage_one(5).state_dict()
    trainer = DiffRefineTrainer.__new__(DiffRefineTrainer)  # without folders of nnU-Net
    changes = {"training": {"initial_weights": "stage_one" if warm else "random"}}
    method = shipped_method("bridge", LABELS, **changes)
    trainer.network, trainer.config, trainer.is_ddp = network_with(method, stage_one(6)), method.config, False
    trainer.stage_one_checkpoint, log = checkpoint, []
    trainer.print_to_log_file = log.append
    trainer.prepare_weights()
    network = trainer.network
    for name, value in network.stage_one.state_dict().items():
        assert torch.equal(value, wanted[name])
    ours, average = network.denoiser.state_dict(), trainer.ema.module.state_dict()
    assert all(torch.equal(value, average[name]) for name, value in ours.items())
    matrices = [value for value in wanted.values() if value.ndim > 1]
    copied = sum(any(a.shape == b.shape and torch.equal(a, b) for b in ours.values()) for a in matrices)
    assert copied > len(matrices) / 2 if warm else copied == 0
    assert bool(log) == warm


def test_weights_are_named_as_without_several_gpus(checkpoint):
    assert network_weights(checkpoint).keys() == stage_one(5).state_dict().keys()
