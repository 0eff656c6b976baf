"""Stage one and refiner behave as one nnU-Net network: what passes through, what is refined, and that it replays."""

import io
import pickle

import pytest
import torch
from torch import Tensor, nn

from nnunet_diffrefine.batch import Foreground
from nnunet_diffrefine.networks.refinement import RefinementNetwork, mirrored_mean
from tests.builders import LABELS, REGIONS, SPACE, generator, network_of

BOTH = pytest.mark.parametrize("foreground", [LABELS, REGIONS], ids=["labels", "regions"])
ALWAYS = {"min_foreground": 0.0}
DISCRETE = {"state": "discrete", "timesteps": 4}
NOISE = {"kind": "gaussian", "timesteps": 4, "schedule": "cosine"}
PROCESSES = {
    "deterministic": ("bridge", {"timesteps": 4}),
    "discrete": ("bridge", DISCRETE),
    "gaussian": ("mask_diffusion", NOISE),
}
each_process = pytest.mark.parametrize(("name", "process"), PROCESSES.values(), ids=list(PROCESSES))


def images(size: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(size, 1, *SPACE, generator=generator(seed))


class EmptyAtZero(nn.Module):
    """Stage one that sees foreground wherever the image is not zero, and is sure of background elsewhere."""

    def __init__(self, foreground: Foreground, sure: float = 9.0) -> None:
        super().__init__()
        self.foreground, self.sure = foreground, sure

    def forward(self, image: Tensor) -> Tensor:
        logits = (image != 0).float() * self.sure - 0.5 * self.sure + 0.1 * image
        channels = [logits * (0.5**i) for i in range(self.foreground.channels)]
        return torch.cat(([torch.full_like(logits, 2.0)] if self.foreground.exclusive else []) + channels, 1)


def with_stage_one(network: RefinementNetwork, stage_one: nn.Module) -> RefinementNetwork:
    network.stage_one = stage_one
    return network


class TestMirroring:
    def test_mean_over_all_mirrored_copies(self) -> None:
        convolution, x = nn.Conv3d(1, 2, 3, padding=1), images()
        copies = []
        for axes in ((), (0,), (2,), (0, 2)):
            flips = [axis + 2 for axis in axes]
            copies.append(convolution(x.flip(flips)).flip(flips))
        torch.testing.assert_close(mirrored_mean(convolution, (0, 2), x), torch.stack(copies).mean(0))

    def test_copies_start_with_the_window_and_its_opposite(self) -> None:
        x, seen = images(), []
        mirrored_mean(lambda y: seen.append(y) or y, (0, 1, 2), x, copies=2)
        assert len(seen) == 2
        assert torch.equal(seen[0], x)
        assert torch.equal(seen[1], x.flip((2, 3, 4)))

    @pytest.mark.parametrize("copies", [1, 3, 8])
    def test_the_refiner_runs_once_a_copy(self, copies: int) -> None:
        network = network_of(LABELS, axes=(0, 1, 2), sampling={**ALWAYS, "mirrored_copies": copies})
        calls = []
        network.denoiser.register_forward_hook(lambda *_: calls.append(1))
        network(images(1))
        assert len(calls) == copies

    def test_without_axes_nothing_is_mirrored(self) -> None:
        seen: list[Tensor] = []
        x = images()
        assert torch.equal(mirrored_mean(lambda y: seen.append(y) or y, (), x), x)
        assert len(seen) == 1
        assert seen[0] is x

    def test_inputs_are_mirrored_together(self) -> None:
        x, y = images(seed=1), images(seed=2)
        weight = torch.arange(float(SPACE[2]))
        mean = mirrored_mean(lambda a, b: a * b * weight, (2,), x, y)
        torch.testing.assert_close(mean, x * y * (weight + weight.flip(0)) / 2)

    @BOTH
    @pytest.mark.parametrize("axes", [(0,), (1, 2), (0, 1, 2)])
    def test_network_is_equivariant_over_its_axes(self, foreground: Foreground, axes: tuple[int, ...]) -> None:
        network, x = network_of(foreground, axes=axes, sampling={**ALWAYS, "steps": 2, "mirrored_copies": 8}), images()
        result = network(x)
        for axis in range(3):
            mirrored = network(x.flip(axis + 2)).flip(axis + 2)
            assert torch.allclose(mirrored, result, atol=1e-5) == (axis in axes)

    @BOTH
    def test_stage_one_is_averaged_in_logits_before_the_refiner_sees_it(self, foreground: Foreground) -> None:
        network, x = network_of(foreground, axes=(0, 1, 2), sampling=ALWAYS), images()
        mean = mirrored_mean(network.stage_one, (0, 1, 2), x)
        torch.testing.assert_close(network.stage_one_logits(x), mean)
        expected = network.refine_window(x, foreground.probabilities(mean))
        torch.testing.assert_close(network(x), expected)


class TestWindows:
    @BOTH
    @each_process
    def test_empty_windows_pass_through_and_the_others_are_refined(
        self, foreground: Foreground, name: str, process: dict
    ) -> None:
        network = network_of(foreground, name, process=process, sampling={"min_foreground": 0.5})
        with_stage_one(network, EmptyAtZero(foreground))
        x = images(3)
        x[1] = 0
        result, stage_one = network(x), network.stage_one_logits(x)
        assert torch.equal(result[1], stage_one[1])
        for seen in (0, 2):
            assert not torch.allclose(result[seen], stage_one[seen], atol=1e-2)

    @BOTH
    def test_one_voxel_of_one_channel_is_enough(self, foreground: Foreground) -> None:
        network = with_stage_one(network_of(foreground, sampling={"min_foreground": 0.5}), EmptyAtZero(foreground))
        x = torch.zeros(1, 1, *SPACE)
        assert torch.equal(network(x), network.stage_one_logits(x))
        x[0, 0, 1, 2, 3] = 1
        assert not torch.allclose(network(x), network.stage_one_logits(x), atol=1e-2)

    @BOTH
    def test_thresholds_that_allow_no_flip_give_stage_ones_own_logits(self, foreground: Foreground) -> None:
        error = {"error": {"target": "absolute"}, "process": {"kind": "none"}}
        network, image = network_of(foreground, "discrepancy_unet", **error), images()
        calls: list[int] = []
        network.denoiser.register_forward_hook(lambda *_: calls.append(1))
        for first, passes in ((0.0, True), (torch.inf, False)):
            network.thresholds.copy_(torch.tensor([first, torch.inf]))
            calls.clear()
            result = network(image)
            assert bool(calls) == passes
            assert torch.equal(result, network.stage_one_logits(image)) != passes

    def test_the_threshold_is_that_of_the_settings(self) -> None:
        for threshold, refined in ((0.99, False), (0.4, True)):
            network = network_of(REGIONS, sampling={"min_foreground": threshold})
            with_stage_one(network, EmptyAtZero(REGIONS, sure=2.0))
            x = torch.ones(1, 1, *SPACE)
            highest = REGIONS.probabilities(network.stage_one_logits(x)).max()
            assert 0.4 < highest < 0.99
            assert torch.equal(network(x), network.stage_one_logits(x)) != refined

    @BOTH
    @each_process
    def test_a_window_does_not_depend_on_its_neighbours_in_the_batch(
        self, foreground: Foreground, name: str, process: dict
    ) -> None:
        """Otherwise the result would change with the batch size, and with which other windows are empty."""
        network = network_of(foreground, name, process=process, sampling={**ALWAYS, "steps": 2, "samples": 2})
        x = images(3)
        together = network(x)
        for i in range(3):
            torch.testing.assert_close(together[i : i + 1], network(x[i : i + 1]), atol=1e-5, rtol=1e-5)


class TestDraws:
    @BOTH
    @each_process
    def test_the_same_seed_gives_the_same_bytes_and_another_other_ones(
        self, foreground: Foreground, name: str, process: dict
    ) -> None:
        def network(seed: int) -> RefinementNetwork:
            return network_of(foreground, name, process=process, sampling={**ALWAYS, "steps": 2, "seed": seed})

        x, first = images(), network(1)
        with torch.no_grad():
            result = first(x)
            torch.manual_seed(99)
            assert torch.equal(first(x), result)
            assert torch.equal(network(1)(x), result)
            assert torch.equal(network(2)(x), result) == (process == PROCESSES["deterministic"][1])

    @each_process
    def test_global_randomness_is_left_alone(self, name: str, process: dict) -> None:
        state = torch.get_rng_state()
        network_of(LABELS, name, process=process, sampling=ALWAYS)(images())
        assert torch.equal(torch.get_rng_state(), state)


class TestStageOne:
    @pytest.mark.parametrize("broken", [float("nan"), float("inf")])
    def test_broken_images_are_refused(self, broken: float) -> None:
        x = images()
        x[1, 0, 2, 3, 4] = broken
        with pytest.raises(ValueError, match="not finite.*NaN or infinity"):
            network_of(LABELS)(x)

    def test_stays_frozen_in_evaluation_mode(self) -> None:
        network = network_of(LABELS)
        network.stage_one = nn.Sequential(network.stage_one, nn.Dropout(0.5), nn.BatchNorm3d(LABELS.heads))
        network = RefinementNetwork(network.stage_one, network.denoiser, network.method, LABELS, network.sampling)
        for mode in (True, False, True):
            network.train(mode)
            assert network.training == network.denoiser.training == network.denoiser.convolution.training == mode
            assert not any(module.training for module in network.stage_one.modules())
        assert not any(p.requires_grad for p in network.stage_one.parameters())
        assert all(p.requires_grad for p in network.denoiser.parameters())
        x, before = images(), [b.clone() for b in network.stage_one.buffers()]
        assert torch.equal(network.stage_one_logits(x), network.stage_one_logits(x))
        assert all(torch.equal(a, b) for a, b in zip(before, network.stage_one.buffers(), strict=True))

    def test_belongs_to_the_state_dict(self) -> None:
        network, other = network_of(LABELS, seed=1, sampling=ALWAYS), network_of(LABELS, seed=2, sampling=ALWAYS)
        other.load_state_dict(network.state_dict())
        assert torch.equal(network(images()), other(images()))
        assert any(name.startswith("stage_one.") for name in network.state_dict())

    @BOTH
    def test_its_share_of_the_result(self, foreground: Foreground) -> None:
        x = images()
        results = {
            weight: network_of(foreground, sampling={**ALWAYS, "stage_one_weight": weight})(x)
            for weight in (0, 0.25, 1)
        }
        stage_one = network_of(foreground).stage_one_logits(x)
        assert torch.equal(results[1], stage_one)
        torch.testing.assert_close(results[0.25], 0.75 * results[0] + 0.25 * stage_one)
        assert not torch.allclose(results[0], stage_one, atol=1e-2)


class TestModule:
    def test_with_a_time_it_is_the_denoiser(self) -> None:
        network, t = network_of(LABELS), torch.tensor([1, 4])
        x = torch.randn(2, 5, *SPACE)
        assert torch.equal(network(x, t), network.denoiser(x, t))

    @BOTH
    @each_process
    def test_works_in_inference_mode(self, foreground: Foreground, name: str, process: dict) -> None:
        network = network_of(foreground, name, axes=(0,), process=process, sampling=ALWAYS)
        x = images()
        with torch.inference_mode():
            inferred = network(x)
        assert torch.equal(inferred, network(x))
        assert inferred.shape == (2, foreground.heads, *SPACE)
        assert inferred.dtype == torch.float32

    @each_process
    def test_can_be_pickled_and_saved(self, name: str, process: dict) -> None:
        network, x = network_of(LABELS, name, process=process, sampling={**ALWAYS, "steps": 2}), images()
        assert torch.equal(pickle.loads(pickle.dumps(network))(x), network(x))
        file = io.BytesIO()
        torch.save(network, file)
        file.seek(0)
        assert torch.equal(torch.load(file, weights_only=False)(x), network(x))

    def test_the_image_is_left_alone(self) -> None:
        x = images()
        copy = x.clone()
        network_of(LABELS, axes=(0, 1, 2), sampling=ALWAYS)(x)
        assert torch.equal(x, copy)

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    @pytest.mark.gpu
    @each_process
    def test_runs_on_a_gpu_under_mixed_precision(self, name: str, process: dict) -> None:
        network = network_of(LABELS, name, process=process, sampling=ALWAYS).cuda()
        with torch.autocast("cuda"), torch.inference_mode():
            first, second = network(images().cuda()), network(images().cuda())
        assert torch.isfinite(first).all()
        assert torch.equal(first, second)
