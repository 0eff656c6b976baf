"""The plain DDPM: nothing of stage one reaches it, and its literal form is Ho et al.'s."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from nnunet_diffrefine.batch import Foreground
from nnunet_diffrefine.config import ConfigError, RefineConfig
from nnunet_diffrefine.diffusion.schedule import gaussian_schedule
from nnunet_diffrefine.methods.plain_ddpm import PlainDDPM
from nnunet_diffrefine.networks.refinement import RefinementNetwork
from nnunet_diffrefine.plans import merge, shipped_settings
from tests.builders import LABELS, REGIONS, TinyDenoiser, batch_of, generator, nnunet_loss

T = 8
BOTH = pytest.mark.parametrize("foreground", [LABELS, REGIONS], ids=["labels", "regions"])
EVERY = pytest.mark.parametrize("literal", [False, True], ids=["sound", "literal"])


def plain(foreground: Foreground, literal: bool = False, **changes: dict) -> PlainDDPM:
    few = {"process": {"timesteps": T}, "sampling": {"steps": T if literal else 2}, "paper_literal": literal}
    flat = {"training": {"deep_supervision": False}}
    values = merge(merge(shipped_settings("plain_ddpm", {"paper_literal": literal}), {**few, **flat}), changes)
    return PlainDDPM(RefineConfig.from_dict(values), foreground)


@BOTH
@EVERY
def test_the_prior_is_not_read(foreground: Foreground, literal: bool) -> None:
    method, batch = plain(foreground, literal), batch_of(foreground, size=4)
    other = replace(batch, prior=batch.prior.flip(2, 3))
    network = TinyDenoiser(*method.channels(1))
    assert method.channels(1)[0] == 1 + foreground.channels
    losses = [method.loss(network, one, nnunet_loss(foreground), generator()) for one in (batch, other)]
    assert torch.equal(*losses)
    refined = [method.refine(network, one.image, one.prior, generator()) for one in (batch, other)]
    assert torch.equal(*refined)


def test_windows_that_stage_one_finds_empty_are_segmented_as_well() -> None:
    method = plain(LABELS)
    stage_one = torch.nn.Conv3d(1, LABELS.heads, 1)
    torch.nn.init.zeros_(stage_one.weight)
    stage_one.bias.data = torch.tensor([20.0, -20.0, -20.0])  # background, surely
    denoiser = TinyDenoiser(*method.channels(1))
    network = RefinementNetwork(stage_one, denoiser, method, LABELS, method.config.sampling)
    image = batch_of(LABELS).image
    with torch.no_grad():
        assert LABELS.decide(stage_one(image)).sum() == 0
        assert LABELS.decide(network(image)).sum() > 0


@BOTH
def test_the_literal_loss_is_that_of_ho_et_al(foreground: Foreground) -> None:
    """Their Eq. 14 on masks in {-1, 1}: a constant error c of the noise costs c squared."""
    method, batch = plain(foreground, literal=True), batch_of(foreground, size=4)

    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        alpha_bar = gaussian_schedule(T, "linear")[t].view(-1, 1, 1, 1, 1).float()
        assert torch.equal(x[:, :1], batch.image)
        return (x[:, 1:] - alpha_bar.sqrt() * (2 * batch.reference - 1)) / (1 - alpha_bar).sqrt() + 0.3

    loss = method.loss(denoiser, batch, nnunet_loss(foreground), generator())
    torch.testing.assert_close(loss, torch.tensor(0.09), atol=1e-4, rtol=0)


def test_the_literal_sampler_takes_every_step_with_noise() -> None:
    method, batch, times = plain(LABELS, literal=True), batch_of(LABELS), []
    network = TinyDenoiser(*method.channels(1))
    method.refine(lambda x, t: times.append(int(t[0])) or network(x, t), batch.image, batch.prior, generator())
    assert times == list(range(T, 0, -1))
    assert method.process.eta == 1


@pytest.mark.parametrize(
    "changes", [{"condition": {"prior": "soft"}}, {"process": {"truncation": 0.5}}, {"error": {"target": "absolute"}}]
)
def test_anything_of_the_prior_is_refused(changes: dict) -> None:
    with pytest.raises(ConfigError, match="method plain_ddpm needs"):
        plain(LABELS, **changes)
