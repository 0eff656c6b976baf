"""What every method promises of its sampling: mirroring, no leak, determinism, and what it costs."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nnunet_diffrefine.batch import Foreground, RefineBatch
from nnunet_diffrefine.methods import METHODS, AbstractRefineMethod
from nnunet_diffrefine.networks.refinement import RefinementNetwork
from nnunet_diffrefine.paths import resource_folder
from nnunet_diffrefine.plans import PAPER_LITERAL
from tests.builders import LABELS, REGIONS, SPACE, TinyDenoiser, batch_of, generator, nnunet_loss
from tests.planted import network_with, shipped_method

T = 4
BOTH = pytest.mark.parametrize("foreground", [LABELS, REGIONS], ids=["labels", "regions"])
each_method = pytest.mark.parametrize("name", sorted(METHODS))
PRINTED = [name for name in METHODS if (resource_folder("plans") / f"{name}.{PAPER_LITERAL}.json").is_file()]
FORMS = [(name, False) for name in METHODS] + [(name, True) for name in PRINTED]
each_form = pytest.mark.parametrize(("name", "literal"), FORMS, ids=lambda x: x if isinstance(x, str) else str(int(x)))


def short(name: str, foreground: Foreground, literal: bool = False, **sampling: Any) -> AbstractRefineMethod:
    """A method as shipped, of four time steps, two of them sampled, that refines every window."""
    truncation = shipped_method(name, foreground, literal, process={"timesteps": 10_000}).config.process.truncation
    timesteps = T if truncation == 1 else int(T / truncation) + 1
    sampling = {"steps": 2, "min_foreground": 0.0, **sampling}
    return shipped_method(name, foreground, literal, process={"timesteps": timesteps}, sampling=sampling)


def network_of(name: str, foreground: Foreground) -> RefinementNetwork:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        stage_one = nn.Conv3d(1, foreground.heads, 3, padding=1)
    return network_with(short(name, foreground), stage_one).eval()


def images(size: int = 3) -> Tensor:
    return torch.randn(size, 1, *SPACE, generator=generator(7))


@BOTH
@each_form
@torch.no_grad()
def test_mirrored_input_and_noise_give_the_mirrored_result(
    name: str, literal: bool, foreground: Foreground, monkeypatch: pytest.MonkeyPatch
) -> None:
    method, batch, axes = short(name, foreground, literal), batch_of(foreground), (2, 4)
    pointwise = TinyDenoiser(*method.channels(1), kernel=1)

    def symmetric(x: Tensor, t: Tensor) -> Tensor:
        return pointwise(x + F.avg_pool3d(x, 3, 1, 1), t)

    def refine(image: Tensor, prior: Tensor) -> Tensor:
        return foreground.probabilities(method.refine(symmetric, image, prior, generator()))

    result = refine(batch.image, batch.prior)
    unmirrored_noise = refine(batch.image.flip(axes), batch.prior.flip(axes)).flip(axes)
    draws = [mirror_draws(monkeypatch, draw, axes) for draw in ("rand", "randn")]
    mirrored = refine(batch.image.flip(axes), batch.prior.flip(axes)).flip(axes)
    torch.testing.assert_close(mirrored, result, atol=1e-4, rtol=0)
    assert torch.allclose(unmirrored_noise, result, atol=1e-4) == (not any(draws[0] + draws[1]))


def mirror_draws(monkeypatch: pytest.MonkeyPatch, name: str, axes: tuple[int, ...]) -> list[bool]:
    """Mirror what a function of torch draws from now on; each draw is noted."""
    draw: Callable[..., Tensor] = getattr(torch, name)
    noted: list[bool] = []

    def mirrored(*arguments: Any, **options: Any) -> Tensor:
        noted.append(True)
        return draw(*arguments, **options).flip(axes)

    monkeypatch.setattr(torch, name, mirrored)
    return noted


@BOTH
@each_method
def test_nothing_but_the_image_is_read(name: str, foreground: Foreground, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does a reference that the method was trained with stay in it."""
    network, x = network_of(name, foreground), images(1)
    network.method.loss(network, batch_of(foreground), nnunet_loss(foreground), generator()).backward()

    def refuse(*_: Any) -> None:
        raise AssertionError("a reference was asked for")

    for owner, reader in (
        (RefineBatch, "__init__"),
        (Foreground, "from_target"),
        (type(network.method.target), "clean"),
    ):
        monkeypatch.setattr(owner, reader, refuse)
    with torch.no_grad():
        result = network(x)
        assert torch.isfinite(result).all()
        assert not torch.allclose(result, network.stage_one_logits(x), atol=1e-2)
        assert torch.equal(result, network_of(name, foreground)(x))


@BOTH
@each_method
@torch.no_grad()
def test_the_same_image_gives_the_same_bytes_in_any_order(name: str, foreground: Foreground) -> None:
    network, x, order = network_of(name, foreground), images(), [2, 0, 1]
    result = network(x)
    torch.manual_seed(99)
    assert torch.equal(network(x), result)
    assert torch.equal(network(x[order]), result[order])
    assert not torch.equal(result[0], result[1])


@BOTH
@each_method
@torch.no_grad()
def test_a_window_costs_steps_times_seeds_and_one_pass_of_the_condition(name: str, foreground: Foreground) -> None:
    network, windows = network_of(name, foreground), 2
    method, passes = network.method, {"denoiser": 0, "condition": 0}

    def count(part: str) -> Callable[..., None]:
        return lambda _, inputs, __: passes.update({part: passes[part] + len(inputs[0])})

    network.denoiser.register_forward_hook(count("denoiser"))
    if network.denoiser.condition is not None:
        network.denoiser.condition.register_forward_hook(count("condition"))
    network(images(windows))
    sampling = method.config.sampling
    assert passes["denoiser"] == windows * (1 if method.process is None else sampling.steps * method.seeds)
    assert passes["condition"] == windows * method.config.condition.encoder
