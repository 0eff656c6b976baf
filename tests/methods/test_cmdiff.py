"""CMDiff: a filtered image and nothing of stage one, gates at the bottleneck, DDIM."""

import pytest
import torch
from torch import Tensor

from nnunet_diffrefine.batch import Foreground
from nnunet_diffrefine.config import ConfigError
from nnunet_diffrefine.methods.cmdiff import CMDiff
from nnunet_diffrefine.networks.attention import ChannelAttention
from nnunet_diffrefine.networks.frequency import low_pass
from nnunet_diffrefine.plans import merge, preset, shipped_settings
from tests.builders import LABELS, REGIONS, TinyDenoiser, batch_of, generator, method_of, nnunet_loss
from tests.methods.learning import mean_loss, train
from tests.networks.planned_networks import denoiser_of

BOTH = pytest.mark.parametrize("foreground", [LABELS, REGIONS], ids=["labels", "regions"])


def cmdiff(foreground: Foreground, **changes: dict) -> CMDiff:
    values = merge(preset("cmdiff"), {"training": {"deep_supervision": False}, **changes})
    return method_of(foreground, **{k: v for k, v in values.items() if k != "method"}, name="cmdiff")


@BOTH
@pytest.mark.parametrize("cutoff", [0.25, 0.5])
def test_every_pass_sees_the_filtered_image_and_the_state(foreground: Foreground, cutoff: float) -> None:
    method, batch, seen = cmdiff(foreground, condition={"low_pass": cutoff}), batch_of(foreground, image_channels=4), []
    network = TinyDenoiser(*method.channels(4))

    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        seen.append(x)
        return network(x, t)

    method.refine(denoiser, batch.image, batch.prior, generator())
    method.loss(denoiser, batch, nnunet_loss(foreground), generator())
    filtered = low_pass(batch.image, cutoff)
    assert len(seen) >= 4
    for x in seen:
        assert x.shape[1] == 4 + 2
        rows = [int((filtered == one[None, :4]).flatten(1).all(1).nonzero()) for one in x]  # recycling takes some
        assert torch.equal(x[:, :4], filtered[rows])


@BOTH
def test_stage_one_has_no_part_in_it(foreground: Foreground) -> None:
    method, batch = cmdiff(foreground), batch_of(foreground)
    network = TinyDenoiser(*method.channels(1))
    ours, other = (method.refine(network, batch.image, p, generator()) for p in (batch.prior, 1 - batch.prior))
    assert torch.equal(ours, other)
    assert method.config.sampling.min_foreground == 0  # nor does it decide which windows are looked at


@BOTH
def test_noise_as_fine_as_the_grid_hardly_reaches_the_mask(foreground: Foreground) -> None:
    method, batch = cmdiff(foreground), batch_of(foreground)
    x, y, z = (torch.arange(n) for n in batch.image.shape[2:])
    board = (-1.0) ** (x.view(-1, 1, 1) + y.view(1, -1, 1) + z)
    denoiser = denoiser_of(method)
    with torch.no_grad():
        clean, noisy, bare = (
            method.refine(denoiser, image, batch.prior, generator())
            for image in (batch.image, batch.image + 0.1 * board, 0 * batch.image)
        )
    assert (noisy - clean).abs().max() < 0.05 * (bare - clean).abs().max()


def test_ddim_draws_its_start_and_nothing_more() -> None:
    method, batch, draws = cmdiff(LABELS, sampling={"steps": 5}), batch_of(LABELS), generator()
    method.evidence(TinyDenoiser(*method.channels(1)), batch.image, batch.prior, draws)
    start = generator()
    torch.randn(batch.prior.shape, generator=start)
    assert torch.equal(torch.rand(4, generator=draws), torch.rand(4, generator=start))


@BOTH
def test_it_learns(foreground: Foreground) -> None:
    method, batch = cmdiff(foreground), batch_of(foreground)
    denoiser = denoiser_of(method)
    assert isinstance(denoiser.bottleneck, ChannelAttention)
    before = mean_loss(method, denoiser, batch)
    train(method, denoiser, batch)
    assert mean_loss(method, denoiser, batch) < before - 0.3


def test_what_it_is_not_is_refused() -> None:
    for change in (
        {"process": {"kind": "bridge", "input_scale": 1.0}},
        {"condition": {"bottleneck": "self_attention"}},
        {"condition": {"image": "masked"}},
        {"error": {"target": "absolute"}},
    ):
        with pytest.raises(ConfigError, match="method cmdiff needs"):
            cmdiff(LABELS, **change)


def test_there_is_nothing_to_take_literally() -> None:
    """No number of the method is known."""
    with pytest.raises(ConfigError, match="no such form"):
        shipped_settings("cmdiff", {"paper_literal": True})
