"""The learning rate halves once the validation error stops falling, down to its minimum, across resumed trainings."""

import pytest
import torch

from nnunet_diffrefine.training.plateau import HalvedOnPlateau


def build(minimum=1.5e-4, patience=2):
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))], 3e-4)
    return optimizer, HalvedOnPlateau(optimizer, minimum, patience)


def rates(optimizer, scheduler, errors):
    seen = []
    for epoch, error in enumerate(errors):
        scheduler.step(epoch)
        scheduler.observe(error)
        seen.append(optimizer.param_groups[0]["lr"])
    return seen


def test_the_papers_rates_after_the_patience_is_over():
    wanted = [3e-4, 3e-4, 3e-4, 1.5e-4]
    assert rates(*build(), [1.0, 1.0, 1.0, 1.0]) == pytest.approx(wanted)


def test_a_falling_error_keeps_the_rate_and_the_minimum_holds():
    assert rates(*build(), [1 / (k + 1) for k in range(20)]) == pytest.approx([3e-4] * 20)
    assert min(rates(*build(), [1.0] * 40)) == pytest.approx(1.5e-4)
    assert min(rates(*build(minimum=0.0), [1.0] * 40)) < 1e-5


def test_a_resumed_training_remembers_how_long_it_has_waited():
    optimizer, scheduler = build()
    rates(optimizer, scheduler, [1.0, 1.0, 1.0])
    again, resumed = build()
    resumed.load_state_dict(scheduler.state_dict())
    assert rates(again, resumed, [1.0]) == pytest.approx([1.5e-4])
