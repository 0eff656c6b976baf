"""PD-DDPM: the reverse process starts from the noised prior, and training knows it."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from nnunet_diffrefine.batch import Foreground, RefineBatch
from nnunet_diffrefine.config import ConfigError, RefineConfig
from nnunet_diffrefine.diffusion.schedule import gaussian_schedule
from nnunet_diffrefine.methods.pdddpm import PDDDPM
from nnunet_diffrefine.plans import merge, shipped_settings
from tests.builders import LABELS, REGIONS, TinyDenoiser, batch_of, generator, nnunet_loss

T, T_PRIME = 20, 6
BOTH = pytest.mark.parametrize("foreground", [LABELS, REGIONS], ids=["labels", "regions"])
EVERY = pytest.mark.parametrize("literal", [False, True], ids=["sound", "literal"])
SIGNAL = gaussian_schedule(T, "linear").sqrt().float()
SIGMA = (1 - gaussian_schedule(T, "linear")).sqrt().float()


def pdddpm(foreground: Foreground, literal: bool = False, **changes: dict) -> PDDDPM:
    few = {"process": {"timesteps": T}, "sampling": {"steps": T_PRIME if literal else 2}, "paper_literal": literal}
    flat = {"training": {"deep_supervision": False, "recycling": 0.0}}
    values = merge(merge(shipped_settings("pdddpm", {"paper_literal": literal}), {**few, **flat}), changes)
    return PDDDPM(RefineConfig.from_dict(values), foreground)


def states(method: PDDDPM, batch: RefineBatch) -> tuple[Tensor, Tensor]:
    """x_t and t of the training pass."""
    network, seen = TinyDenoiser(*method.channels(1)), []
    method.loss(lambda x, t: seen.append((x, t)) or network(x, t), batch, nnunet_loss(method.foreground), generator())
    x, t = seen[-1]
    assert torch.equal(x[:, :1], batch.image)
    assert x.shape[1] == 1 + method.foreground.channels  # the prior enters by the start alone
    return x[:, 1:].detach(), t


def is_standard_noise(noise: Tensor) -> bool:
    error = noise.numel() ** -0.5
    return bool(abs(noise.mean()) < 5 * error and abs(noise.std() - 1) < 5 * error)


def noise_in(x_t: Tensor, clean: Tensor, t: int) -> Tensor:
    return (x_t - SIGNAL[t] * (2 * clean - 1)) / SIGMA[t]


@BOTH
@EVERY
def test_sampling_starts_from_the_noised_prior(foreground: Foreground, literal: bool) -> None:
    method, batch, seen = pdddpm(foreground, literal), batch_of(foreground, size=16), []
    network = TinyDenoiser(*method.channels(1))
    method.refine(lambda x, t: seen.append((x, int(t[0]))) or network(x, t), batch.image, batch.prior, generator())
    assert [t for _, t in seen] == (list(range(T_PRIME, 0, -1)) if literal else [T_PRIME, T_PRIME // 2])
    first = seen[0][0][:16, 1:]
    assert is_standard_noise(noise_in(first, batch.prior, T_PRIME))
    assert not is_standard_noise(noise_in(first, batch.reference, T_PRIME)[batch.reference > 0])


@BOTH
@EVERY
def test_training_at_the_end_noises_the_prior_and_in_the_printed_form_the_reference(
    foreground: Foreground, literal: bool
) -> None:
    method, batch = pdddpm(foreground, literal, training={"prior_end": 1.0}), batch_of(foreground, size=16)
    x_t, t = states(method, batch)
    assert (t == T_PRIME).all()
    assert is_standard_noise(noise_in(x_t, batch.reference if literal else batch.prior, T_PRIME))
    other, _ = states(method, replace(batch, reference=batch.reference.flip(2)))
    assert torch.equal(x_t, other) != literal


@BOTH
@EVERY
def test_training_before_the_end_noises_the_reference(foreground: Foreground, literal: bool) -> None:
    method, batch = pdddpm(foreground, literal, training={"prior_end": 0.0}), batch_of(foreground, size=32)
    x_t, t = states(method, batch)
    before = t < T_PRIME
    assert before.sum() > 16
    shaped = t.view(-1, 1, 1, 1, 1)
    noise = (x_t - SIGNAL[shaped] * (2 * batch.reference - 1)) / SIGMA[shaped]
    assert is_standard_noise(noise[before])
    assert t.max() == T_PRIME  # no capacity spent on what sampling never visits


@BOTH
def test_recycling_predicts_from_the_noised_prior(foreground: Foreground) -> None:
    method = pdddpm(foreground, training={"recycling": 1.0, "prior_end": 0.0})
    batch, seen = batch_of(foreground, size=8), []
    network = TinyDenoiser(*method.channels(1))
    method.loss(lambda x, t: seen.append((x, t)) or network(x, t), batch, nnunet_loss(foreground), generator())
    (first, times), (_, t) = seen
    rows = t < T_PRIME
    assert len(first) == rows.sum() > 4
    assert (times == T_PRIME).all()
    assert is_standard_noise(noise_in(first[:, 1:].detach(), batch.prior[rows], T_PRIME))


@BOTH
@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_predicted_noise_leads_from_the_noised_prior_to_the_reference(foreground: Foreground, prediction: str) -> None:
    """The noise that was drawn would lead back to the prior, and a denoiser that corrects nothing would be perfect."""
    method = pdddpm(foreground, process={"prediction": prediction}, training={"prior_end": 1.0})
    batch, network = batch_of(foreground, size=4), nnunet_loss(foreground)

    def leads_to(clean: Tensor) -> Tensor:
        def denoiser(x: Tensor, t: Tensor) -> Tensor:
            noise = noise_in(x[:, 1:], clean, T_PRIME)
            return noise if prediction == "epsilon" else SIGNAL[T_PRIME] * noise - SIGMA[T_PRIME] * (2 * clean - 1)

        return method.loss(denoiser, batch, network, generator())

    assert leads_to(batch.reference) < 1e-8
    assert leads_to(batch.prior) > 0.1


def test_a_process_that_is_not_truncated_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"process.truncation.*below 1"):
        pdddpm(LABELS, process={"truncation": 1.0})
