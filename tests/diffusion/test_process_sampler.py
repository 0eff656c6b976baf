"""The loop: which times it visits, that a perfect network gives the truth, and that seeds replay."""

import pytest
import torch
from torch import Tensor

from nnunet_diffrefine.config import ProcessConfig
from nnunet_diffrefine.diffusion import (
    DeterministicBridge,
    DiscreteBridge,
    GaussianProcess,
    Process,
    from_config,
    sample,
    timestep_sequence,
)

T = 8
PROCESSES: dict[str, Process] = {
    "deterministic": DeterministicBridge(T, "linear"),
    "classes": DiscreteBridge(T, "cosine", exclusive=True),
    "regions": DiscreteBridge(T, "linear", exclusive=False),
    "ddim": GaussianProcess(T, "cosine", input_scale=0.5),
    "ddpm": GaussianProcess(T, "linear", eta=1.0),
}
each_process = pytest.mark.parametrize("process", PROCESSES.values(), ids=list(PROCESSES))


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def prior_and_truth() -> tuple[Tensor, Tensor]:
    logits = torch.randn(2, 4, 3, 4, 5, generator=generator(0))
    truth = torch.nn.functional.one_hot(logits.argmax(1), 4).movedim(-1, 1)[:, 1:].float()
    return torch.softmax(logits, 1)[:, 1:], truth


@pytest.mark.parametrize("timesteps", [1, 2, 7, 10, 1000])
def test_sequences_start_at_the_end_fall_strictly_and_stop_at_zero(timesteps: int) -> None:
    for steps in range(1, timesteps + 1):
        sequence = timestep_sequence(timesteps, steps)
        gaps = [a - b for a, b in zip(sequence, sequence[1:], strict=False)]
        assert len(sequence) == steps + 1
        assert (sequence[0], sequence[-1]) == (timesteps, 0)
        assert min(gaps) >= 1
        assert max(gaps) - min(gaps) <= 1
    assert timestep_sequence(timesteps, timesteps) == list(range(timesteps, -1, -1))


def test_uneven_sequences_are_rounded_down() -> None:
    assert timestep_sequence(10, 3) == [10, 6, 3, 0]


@pytest.mark.parametrize("steps", [0, 11])
def test_refuses_impossible_step_counts(steps: int) -> None:
    with pytest.raises(ValueError, match=f"steps is {steps}; it must be in 1..10"):
        timestep_sequence(10, steps)


@each_process
@pytest.mark.parametrize("steps", [1, 2, T])
def test_a_perfect_network_gives_the_truth_exactly(process: Process, steps: int) -> None:
    prior, truth = prior_and_truth()
    visited: list[int] = []

    def oracle(x_t: Tensor, t: Tensor) -> Tensor:
        assert x_t.shape == prior.shape
        assert t.shape == (2,)
        visited.extend(t[:1].tolist())
        return truth

    assert torch.equal(sample(process, oracle, prior, steps, generator(1)), truth)
    assert visited == timestep_sequence(T, steps)[:-1]


@each_process
def test_same_seed_same_bytes(process: Process) -> None:
    prior, truth = prior_and_truth()

    def network(x_t: Tensor, t: Tensor) -> Tensor:
        return (0.5 * x_t + 0.5 * prior).clamp(0, 1)

    draws = [sample(process, network, prior, 5, generator(seed)) for seed in (3, 3, 4)]
    assert torch.equal(draws[0], draws[1])
    assert torch.equal(draws[0], draws[2]) == isinstance(process, DeterministicBridge)
    states = [process.marginal(truth, prior, torch.tensor([3, 5]), generator(6)) for _ in range(2)]
    assert torch.equal(*states)


@each_process
def test_inputs_are_left_alone_and_types_kept(process: Process) -> None:
    prior, truth = prior_and_truth()
    copies = prior.clone(), truth.clone()
    t, s = torch.tensor([T, 3]), torch.tensor([2, 0])
    x_t = process.marginal(truth, prior, t, generator(1))
    x_s = process.reverse(x_t, truth, prior, t, s, generator(2))
    assert x_t.dtype == x_s.dtype == torch.float32
    assert x_t.shape == x_s.shape == prior.shape
    assert torch.equal(x_s[1], truth[1])
    assert torch.equal(prior, copies[0])
    assert torch.equal(truth, copies[1])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@each_process
def test_runs_on_the_device_of_its_tensors(process: Process) -> None:
    prior, truth = (x.cuda() for x in prior_and_truth())
    draws = [
        sample(process, lambda x_t, t: (0.5 * x_t + 0.5 * truth).clamp(0, 1), prior, 5, torch.Generator("cuda"))
        for _ in range(2)
    ]
    assert draws[0].device == prior.device
    assert torch.equal(*draws)


@pytest.mark.parametrize("exclusive", [True, False])
def test_settings_reach_the_process(exclusive: bool) -> None:
    bridge = from_config(ProcessConfig(timesteps=7), exclusive, eta=0.0)
    assert isinstance(bridge, DeterministicBridge)
    assert bridge.timesteps == 7
    discrete = from_config(ProcessConfig(state="discrete"), exclusive, eta=0.0)
    assert isinstance(discrete, DiscreteBridge)
    assert discrete.exclusive == exclusive
    settings = ProcessConfig(kind="gaussian", timesteps=50, schedule="cosine", input_scale=0.2)
    gaussian = from_config(settings, exclusive, eta=0.3)
    assert isinstance(gaussian, GaussianProcess)
    assert (gaussian.timesteps, gaussian.input_scale, gaussian.eta) == (50, 0.2, 0.3)
    assert torch.equal(gaussian.alpha_bar(torch.arange(51)), GaussianProcess(50, "cosine").alpha_bar(torch.arange(51)))
