"""What the tests of every module on features (B, C, *S) need: inputs, teaching, gradients, half precision."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tests.builders import generator

SPACES = pytest.mark.parametrize("space", [(11,), (6, 7), (4, 5, 6), (1, 1, 1), (1, 5, 4)], ids=str)


def features(channels: int, space: tuple[int, ...] = (4, 5, 6), seed: int = 0, size: int = 2) -> Tensor:
    return torch.randn(size, channels, *space, generator=generator(seed))


def taught(module: nn.Module, seed: int = 5) -> nn.Module:
    """Give every parameter a value away from zero, as training would; the same ones whatever was drawn at first."""
    draws = generator(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            around = 1.0 if name.endswith("norm.weight") else 0.0
            parameter.copy_(around + 0.5 * torch.randn(parameter.shape, generator=draws))
    return module


def without_gradient(build: Callable[[], nn.Module], *inputs: Tensor) -> tuple[set[str], set[str]]:
    """Parameters outside the graph of the first step, and those whose gradient in the second step is zero.

    Distributed training waits for ever for the former; the latter would never learn.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = build()
    wanted = torch.randn(module(*inputs).shape, generator=generator(77))
    optimiser = torch.optim.SGD(module.parameters(), lr=0.1)
    unused: set[str] = set()
    for step in range(2):
        optimiser.zero_grad()
        (module(*inputs) * wanted).sum().backward()
        if step == 0:
            unused = {name for name, p in module.named_parameters() if p.grad is None}
            optimiser.step()
    return unused, {name for name, p in module.named_parameters() if p.grad is None or p.grad.abs().max() < 1e-6}


def under_autocast(module: nn.Module, *inputs: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Output for bfloat16 features under autocast, and the gradients of all parameters."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = module(*(x.bfloat16() for x in inputs))
    output.float().square().sum().backward()
    return output, [p.grad for p in module.parameters()]
