"""Learning rate and averaged weights in closed form."""

import copy
import math

import pytest
import torch
from torch import nn

from nnunet_diffrefine.training.optimisation import WarmupCosine, ema_model, swapped_weights

PEAK, EPOCHS, WARMUP = 0.02, 200, 0.1
DECAY = 0.6


def schedule(warmup: float = WARMUP) -> WarmupCosine:
    groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr": 5.0} for _ in range(2)]
    return WarmupCosine(torch.optim.AdamW(groups), PEAK, EPOCHS, warmup)


class TestWarmupCosine:
    @pytest.mark.parametrize(
        ("epoch", "share"),
        [
            (0, 0.01),
            (5, 0.25),
            (10, 0.5),
            (20, 1.0),
            (20 + 180 / 4, 0.5 + math.sqrt(0.125)),
            (110, 0.5),
            (20 + 180 * 3 / 4, 0.5 - math.sqrt(0.125)),
            (200, 0.0),
        ],
    )
    def test_closed_form(self, epoch: float, share: float) -> None:
        assert schedule().rate(epoch) == pytest.approx(PEAK * share, abs=1e-12)

    def test_rises_then_falls_without_a_jump(self) -> None:
        rates = [schedule().rate(epoch / 10) for epoch in range(10 * EPOCHS + 1)]
        top = rates.index(max(rates))
        assert top == 10 * EPOCHS * WARMUP
        assert rates[: top + 1] == sorted(rates[: top + 1])
        assert rates[top:] == sorted(rates[top:], reverse=True)
        assert max(abs(a - b) for a, b in zip(rates, rates[1:], strict=False)) < 0.011 * PEAK

    def test_outside_the_training_it_stays_at_its_ends(self) -> None:
        assert schedule().rate(-1) == schedule().rate(0)
        assert schedule().rate(EPOCHS + 1) == pytest.approx(0.0, abs=1e-12)

    @pytest.mark.parametrize(("warmup", "first", "last"), [(0.0, PEAK, 0.0), (1.0, 0.01 * PEAK, PEAK)])
    def test_extreme_warm_ups(self, warmup: float, first: float, last: float) -> None:
        assert schedule(warmup).rate(0) == pytest.approx(first)
        assert schedule(warmup).rate(EPOCHS) == pytest.approx(last, abs=1e-12)

    def test_a_step_depends_on_the_epoch_alone(self) -> None:
        used, fresh = schedule(), schedule()
        for epoch in (0, 150.5, 3):
            used.step(epoch)
        for one in (used, fresh):
            one.step(42.25)
        rates = [group["lr"] for one in (used, fresh) for group in one.optimizer.param_groups]
        assert rates == [schedule().rate(42.25)] * 4


def numbered(value: float) -> nn.Module:
    module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(value)
    return module


def set_to(module: nn.Module, value: float) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(value)


class TestAverage:
    def test_constant_weights_stay_what_they_are(self) -> None:
        module = numbered(0.37)
        average = ema_model(module, DECAY)
        for _ in range(20):
            average.update_parameters(module)
        assert all(torch.equal(a, b) for a, b in zip(average.module.parameters(), module.parameters(), strict=True))

    def test_weights_of_the_past_in_closed_form(self) -> None:
        """After n updates the k-th counts (1 - d_k) d_{k+1} ... d_{n-1}, with d_k = min(decay, (1 + k) / (10 + k))."""
        module, values = numbered(123.0), [1.0, -2.0, 5.0, 0.5, 3.0, -7.0, 2.0, 4.0, 9.0, -1.0, 6.0, 8.0, 1.5, 2.5]
        average = ema_model(module, DECAY)
        decays = [0.0] + [min(DECAY, (1 + k) / (10 + k)) for k in range(1, len(values))]
        assert decays[1] == pytest.approx(2 / 11)
        assert decays[-1] == DECAY != decays[-3]  # the list covers the warm-up of the decay and its end
        for n, value in enumerate(values, 1):
            set_to(module, value)
            average.update_parameters(module)
            expected = sum(values[k] * (1 - decays[k]) * math.prod(decays[k + 1 : n]) for k in range(n))
            for parameter in average.module.parameters():
                torch.testing.assert_close(parameter, torch.full_like(parameter, expected))

    def test_the_model_is_not_touched(self) -> None:
        module = numbered(1.0)
        average = ema_model(module, DECAY)
        set_to(module, 2.0)
        average.update_parameters(module)
        set_to(module, 3.0)
        average.update_parameters(module)
        assert all((p == 3).all() for p in module.parameters())
        assert all((p != 3).all() for p in average.module.parameters())

    def test_a_restored_average_goes_on_as_if_nothing_had_happened(self) -> None:
        module = numbered(1.0)
        average = ema_model(module, DECAY)
        for value in (1.0, 4.0, 2.0):
            set_to(module, value)
            average.update_parameters(module)
        restored = ema_model(numbered(0.0), DECAY)
        restored.load_state_dict(copy.deepcopy(average.state_dict()))
        for one in (average, restored):
            set_to(module, 7.0)
            one.update_parameters(module)
        assert all(
            torch.equal(a, b) for a, b in zip(average.module.parameters(), restored.module.parameters(), strict=True)
        )


class TestSwap:
    def build(self) -> tuple[nn.Module, torch.optim.swa_utils.AveragedModel, dict]:
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
        average = ema_model(module, DECAY)
        average.update_parameters(module)
        module(torch.randn(5, 3))  # moves the batch norm's buffers
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(torch.randn_like(parameter))
        return module, average, {k: v.clone() for k, v in module.state_dict().items()}

    def test_averaged_inside_own_outside(self) -> None:
        module, average, before = self.build()
        parameters = list(module.parameters())
        with swapped_weights(module, average):
            inside = module.state_dict()
            assert all(torch.equal(inside[k], v) for k, v in average.module.state_dict().items())
            assert not all(torch.equal(inside[k], v) for k, v in before.items())
        assert all(torch.equal(module.state_dict()[k], v) for k, v in before.items())
        assert all(a is b for a, b in zip(parameters, module.parameters(), strict=True))  # the optimiser's own

    def test_own_weights_come_back_after_an_error(self) -> None:
        module, average, before = self.build()
        averaged = {k: v.clone() for k, v in average.state_dict().items()}
        with pytest.raises(KeyError, match="planted"), swapped_weights(module, average):
            set_to(module, 0.0)
            raise KeyError("planted")
        assert all(torch.equal(module.state_dict()[k], v) for k, v in before.items())
        assert all(torch.equal(average.state_dict()[k], v) for k, v in averaged.items())
