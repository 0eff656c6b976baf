"""One state for the whole volume: agreement with the window-wise network, no seams, folds, samples and maps."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import nn

from nnunet_diffrefine.inference import refine
from nnunet_diffrefine.inference.refine import RefineOptions, refine_volume
from nnunet_diffrefine.inference.windows import WindowedDenoiser, all_windows, gaussian, windows_over
from nnunet_diffrefine.networks.condition_encoder import ConditionEncoder
from nnunet_diffrefine.networks.denoiser import TimeConditionedUNet
from nnunet_diffrefine.networks.precision import mixed_precision
from tests.builders import LABELS, REGIONS, SPACE, TinyDenoiser, generator, method_of, network_of, unet
from tests.inference.small import Everywhere, Identity, NeverFlips, network_with

BOTH = pytest.mark.parametrize("foreground", [LABELS, REGIONS], ids=["labels", "regions"])
CPU = torch.device("cpu")
OPTIONS = RefineOptions(CPU)
T = 4
NOISE = {"kind": "gaussian", "timesteps": T, "schedule": "cosine"}
PLAIN = {"training": {"deep_supervision": False}}
STEPS = {"min_foreground": 0.0, "steps": 3, "samples": 2}
METHODS = {
    "bridge": {"process": {"timesteps": T}},
    "discrete bridge": {"process": {"timesteps": T, "state": "discrete"}},
    "gaussian": {"name": "mask_diffusion", "process": NOISE},
    "epsilon": {"name": "mask_diffusion", "process": {**NOISE, "prediction": "epsilon"}, **PLAIN},
    "absolute error": {
        "name": "rediffinet",
        "process": NOISE,
        "error": {"target": "absolute"},
        "condition": {"encoder": True},
    },
    "three-way error": {"name": "dmcie", "process": NOISE, "error": {"target": "three_way"}},
    "one pass": {"name": "discrepancy_unet", "process": {"kind": "none"}, "error": {"target": "absolute"}},
}
EACH = pytest.mark.parametrize("settings", METHODS.values(), ids=list(METHODS))
LARGE = (20, 16, 24)
PATCH = (8, 8, 8)


def volume(foreground, shape=LARGE, seed=0):
    """Image (1, *S) and prior (R, *S)."""
    image = torch.randn(1, *shape, generator=generator(seed))
    logits = nn.functional.avg_pool3d(torch.randn(1, foreground.heads, *shape, generator=generator(seed + 1)), 3, 1, 1)
    return image, foreground.probabilities(8 * logits)[0]


def whole(prior):
    return torch.ones(prior.shape[1:], dtype=torch.bool)


def sampled(foreground, settings, **sampling):
    steps = {"steps": 1} if settings["process"].get("kind") == "none" else {}
    settings = {key: value for key, value in settings.items() if key != "name"} | {
        "sampling": {**STEPS, **steps, **sampling}
    }
    return settings


def network(foreground, settings, axes=(), **sampling):
    return network_of(
        foreground, settings.get("name", "bridge"), axes=axes, **sampled(foreground, settings, **sampling)
    )


@pytest.fixture(autouse=True)
def float32(monkeypatch):
    """On the CPU, so that tolerances speak of the algorithm and not of bf16."""
    monkeypatch.setattr(refine, "mixed_precision", lambda d: nullcontext() if d.type == "cpu" else mixed_precision(d))


class TestPrecision:
    @BOTH
    def test_bf16_changes_probabilities_by_its_rounding_alone(self, foreground, monkeypatch):
        net = network(foreground, METHODS["bridge"])
        image, prior = volume(foreground)
        exact = refine_volume([net], image, prior, whole(prior), PATCH, OPTIONS)
        monkeypatch.setattr(refine, "mixed_precision", lambda d: torch.autocast(d.type, torch.bfloat16))
        rounded = refine_volume([net], image, prior, whole(prior), PATCH, OPTIONS)
        found, wanted = (foreground.probabilities(x.logits[None]) for x in (rounded, exact))
        assert rounded.logits.dtype == torch.float32
        assert not torch.equal(found, wanted)
        torch.testing.assert_close(found, wanted, atol=0.03, rtol=0)
        different = foreground.decide(rounded.logits[None]) != foreground.decide(exact.logits[None])
        assert different.float().mean() < 0.01


class TestOneWindow:
    @EACH
    @BOTH
    def test_agrees_with_the_network_that_nnunet_runs(self, foreground, settings):
        """Also with mirrored copies and a share of stage one."""
        net = network(foreground, settings, axes=(0, 2), mirrored_copies=3, stage_one_weight=0.25)
        image, prior = volume(foreground, SPACE)
        result = refine_volume([net], image, prior, whole(prior), SPACE, OPTIONS)
        with torch.inference_mode():
            logits = foreground.logits(prior[None])
            wanted = net.refined(image[None], logits)
        found = foreground.probabilities(result.logits[None])
        torch.testing.assert_close(found, foreground.probabilities(wanted), atol=5e-4, rtol=0)
        assert result.windows == 1
        assert result.changed.any()

    @BOTH
    def test_windows_without_foreground_pass_through(self, foreground):
        net = network(foreground, METHODS["bridge"], min_foreground=0.01)
        image, prior = volume(foreground, SPACE)
        result = refine_volume([net], image, prior * 0.001, whole(prior), SPACE, OPTIONS)
        assert result.windows == 0
        assert torch.equal(result.logits, foreground.logits(prior[None] * 0.001)[0])


def offset_windows(region, seen, patch):
    """Windows of the same volume with other borders than nnU-Net's."""
    starts = [sorted({0, n - p, *range(3, n - p, 3)}) for n, p in zip(region.shape, patch, strict=True)]
    return [
        tuple(slice(a, a + p) for a, p in zip((z, y, x), patch, strict=True))
        for z in starts[0] for y in starts[1] for x in starts[2]
    ]  # fmt: skip


class TestNoSeams:
    """The tolerances: a window's outermost voxels see its padding, with 1/2000 of the weight of its centre.

    Hard states are drawn, so that a small difference may turn a voxel over.
    """

    PROBABILITY = 0.02
    VOXELS, VOXELS_DRAWN = 0.002, 0.008

    def refined(self, net, foreground, layout):
        image, prior = volume(foreground)
        options = RefineOptions(CPU, layout=layout)
        logits = refine_volume([net], image, prior, whole(prior), PATCH, options).logits[None]
        return foreground.probabilities(logits), foreground.decide(logits)

    @pytest.mark.parametrize("kind", ["bridge", "gaussian", "discrete bridge", "absolute error"])
    @BOTH
    def test_windows_at_another_offset_give_the_same_mask(self, foreground, kind):
        net = network(foreground, METHODS[kind], samples=1)
        p, mask = self.refined(net, foreground, windows_over)
        other_p, other_mask = self.refined(net, foreground, offset_windows)
        differing = float((mask != other_mask).float().mean())
        assert differing < (self.VOXELS_DRAWN if kind == "discrete bridge" else self.VOXELS)
        if kind != "discrete bridge":
            assert float((p - other_p).abs().quantile(0.999)) < self.PROBABILITY

    def test_noise_of_its_own_in_each_window_would_not(self):
        """The control: what nnU-Net's sliding window makes of a stochastic method."""
        net = network(LABELS, METHODS["gaussian"], samples=1)
        image, prior = volume(LABELS)
        masks = []
        for windows in (all_windows(LARGE, PATCH), offset_windows(prior[0], None, PATCH)):
            total = torch.zeros(1, LABELS.heads, *LARGE)
            for window in windows:
                part = (..., *window)
                with torch.inference_mode():
                    total[part] += gaussian(PATCH, CPU) * net.refine_window(image[None][part], prior[None][part])
            masks.append(LABELS.decide(total))
        assert float((masks[0] != masks[1]).float().mean()) > 5 * self.VOXELS

    @BOTH
    def test_a_volume_cut_elsewhere_gives_the_same_bytes_around_the_same_region(self, foreground):
        net = network(foreground, METHODS["gaussian"])
        image, prior = volume(foreground)
        region = torch.zeros(LARGE, dtype=torch.bool)
        region[8:15, 6:12, 9:20] = True
        full = refine_volume([net], image, prior, region, PATCH, OPTIONS)
        cut = (slice(3, None), slice(2, None), slice(0, -2))
        less = refine_volume([net], image[(..., *cut)], prior[(..., *cut)], region[cut], PATCH, OPTIONS)
        assert torch.equal(full.logits[(..., *cut)], less.logits)
        assert full.changed.any()

    def test_one_pass_over_all_windows_is_nnunets_sliding_window(self):
        """Gaussian-weighted mean of the denoiser's outputs, computed here by hand."""
        denoiser, x = TinyDenoiser(3, 2), torch.randn(1, 3, *LARGE, generator=generator())
        t = torch.ones(1, dtype=torch.long)
        windows = all_windows(LARGE, PATCH)
        with torch.inference_mode():
            found = WindowedDenoiser(denoiser, windows, CPU)(x, t)
            total, weights = torch.zeros(1, 2, *LARGE, dtype=torch.float64), torch.zeros(LARGE, dtype=torch.float64)
            for window in windows:
                total[(..., *window)] += gaussian(PATCH, CPU) * denoiser(x[(..., *window)], t).double()
                weights[window] += gaussian(PATCH, CPU)
        torch.testing.assert_close(found.double(), total / weights, atol=1e-5, rtol=1e-5)


class TestRegion:
    @BOTH
    def test_outside_of_the_region_every_bit_is_the_priors(self, foreground):
        net = network_with(Everywhere(foreground), foreground)
        image, prior = volume(foreground)
        region = torch.zeros(LARGE, dtype=torch.bool)
        region[3:6, 3:6, 3:6] = True
        result = refine_volume([net], image, prior, region, PATCH, OPTIONS)
        before = foreground.logits(prior[None])[0]
        assert torch.equal(result.logits[:, ~region], before[:, ~region])
        assert result.changed[region].all()
        assert not result.changed[~region].any()
        assert result.windows == 1

    @BOTH
    def test_volumes_smaller_than_a_window(self, foreground):
        net = network_with(Everywhere(foreground), foreground)
        image, prior = volume(foreground, (5, 9, 6))
        result = refine_volume([net], image, prior, whole(prior), PATCH, OPTIONS)
        assert result.logits.shape == (foreground.heads, 5, 9, 6)
        assert result.changed.all()

    @BOTH
    def test_a_refiner_that_returns_the_prior_changes_no_bit(self, foreground):
        net = network_with(Identity(foreground), foreground)
        image, prior = volume(foreground)
        result = refine_volume([net], image, prior, whole(prior), PATCH, OPTIONS)
        assert torch.equal(result.logits, foreground.logits(prior[None])[0])
        assert result.windows > 1

    @BOTH
    def test_thresholds_that_allow_no_flip_change_no_bit(self, foreground):
        """Over folds and samples too; that the errors are seen shows in their map."""
        net = network_with(NeverFlips(foreground), foreground, **NeverFlips.settings)
        image, prior = volume(foreground)
        options = RefineOptions(CPU, error_map=True, uncertainty=True, probabilities=True)
        result = refine_volume([net] * 3, image, prior, whole(prior), PATCH, options)
        assert torch.equal(result.logits, foreground.logits(prior[None])[0])
        assert not result.changed.any()
        assert result.spread.max() < 1e-6
        assert result.error.min() > 0.9
        torch.testing.assert_close(result.probabilities, prior, atol=2e-4, rtol=0)

    def test_windows_lie_inside_and_hold_all_of_the_region(self):
        region = torch.zeros(LARGE, dtype=torch.bool)
        region[0, 0, 0] = region[19, 15, 23] = True
        windows = windows_over(region, whole(region[None]), PATCH)
        covered = torch.zeros_like(region)
        for window in windows:
            assert all(0 <= s.start and s.stop <= n for s, n in zip(window, LARGE, strict=True))
            covered[window] = True
        assert (covered | ~region).all()
        assert len(windows) == 2 < len(all_windows(LARGE, PATCH))
        assert windows_over(region & False, region, PATCH) == []


class TestSamplesAndFolds:
    @BOTH
    def test_folds_are_averaged_as_nnunet_averages_logits(self, foreground):
        image, prior = volume(foreground)
        nets = [network_of(foreground, seed=seed, sampling={"min_foreground": 0.0}) for seed in (0, 5)]
        single = [refine_volume([net], image, prior, whole(prior), PATCH, OPTIONS) for net in nets]
        both = refine_volume(nets, image, prior, whole(prior), PATCH, OPTIONS)
        changed = single[0].changed & single[1].changed & both.changed
        assert changed.float().mean() > 0.9
        mean = (single[0].logits + single[1].logits) / 2
        torch.testing.assert_close(both.logits[:, changed], mean[:, changed], atol=1e-4, rtol=1e-4)

    def test_same_seed_same_bytes_another_seed_others(self):
        image, prior = volume(LABELS)
        results = [
            refine_volume([network(LABELS, METHODS["gaussian"], seed=seed)], image, prior, whole(prior), PATCH, OPTIONS)
            for seed in (3, 3, 4)
        ]
        assert torch.equal(results[0].logits, results[1].logits)
        assert not torch.equal(results[0].logits, results[2].logits)

    def test_spread_over_folds_is_their_standard_deviation(self):
        """Two folds that disagree everywhere, p and 1 - p: the deviation is |p - 1/2|."""
        image, prior = volume(REGIONS)

        class Opposite(Everywhere):
            def forward(self, x, t):
                return -super().forward(x, t)

        nets = [network_with(kind(REGIONS), REGIONS) for kind in (Everywhere, Opposite)]
        options = RefineOptions(CPU, uncertainty=True)
        spread = refine_volume(nets, image, prior, whole(prior), PATCH, options).spread
        wanted = torch.full(LARGE, float(torch.sigmoid(torch.tensor(5.0)) - 0.5))
        torch.testing.assert_close(spread, wanted, atol=1e-5, rtol=0)

    def test_spread_over_samples(self):
        """None where nothing is random, some where noise is; 0 outside of the region."""
        image, prior = volume(LABELS)
        region = whole(prior)
        region[:, :, 12:] = False
        options = RefineOptions(CPU, uncertainty=True)
        noisy = network(LABELS, METHODS["gaussian"], samples=3)
        spread = refine_volume([noisy], image, prior, region, PATCH, options).spread
        assert spread[region].mean() > 1e-3
        assert (spread[~region] == 0).all()
        same = network(LABELS, METHODS["bridge"])
        assert refine_volume([same, same], image, prior, region, PATCH, options).spread.max() < 1e-3


class TestErrorMap:
    @BOTH
    def test_of_a_refiner_that_is_sure_it_is_where_the_prior_says_otherwise(self, foreground):
        net = network_with(Everywhere(foreground), foreground)
        image, prior = volume(foreground)
        options = RefineOptions(CPU, error_map=True)
        error = refine_volume([net], image, prior, whole(prior), PATCH, options).error
        hard = foreground.decide(foreground.logits(prior[None]))[0]
        right = hard[-1] > 0 if foreground.exclusive else hard.amin(0) > 0
        assert error[right].max() < 0.02
        assert error[~right].min() > 0.98

    @BOTH
    def test_of_the_prior_itself_it_is_its_own_doubt(self, foreground):
        """Also outside of the region."""
        image, prior = volume(foreground)
        region = whole(prior)
        region[:10] = False
        options = RefineOptions(CPU, error_map=True)
        error = refine_volume(
            [network_with(Identity(foreground), foreground)], image, prior, region, PATCH, options
        ).error
        if foreground.exclusive:
            wanted = 1 - torch.maximum(prior.amax(0), 1 - prior.sum(0))
        else:
            wanted = torch.minimum(prior, 1 - prior).amax(0)
        torch.testing.assert_close(error, wanted, atol=1e-3, rtol=0)

    def test_methods_that_predict_errors_say_it_themselves(self):
        net = network(LABELS, METHODS["one pass"])
        image, prior = volume(LABELS, SPACE)
        options = RefineOptions(CPU, error_map=True)
        error = refine_volume([net], image, prior, whole(prior), SPACE, options).error
        with torch.inference_mode():
            evidence = net.evidence(image[None], prior[None])
        torch.testing.assert_close(error, torch.sigmoid(evidence)[0].amax(0), atol=1e-4, rtol=0)


class TestConditionFeatures:
    def network(self):
        """A second encoder of the condition, 8 steps of a window in all: 2 samples, 4 steps."""
        settings = {"process": {"timesteps": T, "state": "discrete"}, "sampling": {**STEPS, "steps": 4}}
        method = method_of(LABELS, condition={"encoder": True}, **settings)
        inputs, outputs = method.channels(1)
        encoder = ConditionEncoder(unet(inputs=3, outputs=outputs, seed=4).encoder, 3, "add")
        return network_with(TimeConditionedUNet(unet(inputs=inputs, outputs=outputs), condition=encoder), LABELS,
                            condition={"encoder": True}, **settings)  # fmt: skip

    @pytest.mark.parametrize("cache", [0, 2**30], ids=["recomputed", "kept"])
    def test_computed_once_a_window_where_memory_allows(self, cache, monkeypatch):
        net, calls = self.network().eval(), []
        net.denoiser.condition.register_forward_hook(lambda _, inputs, __: calls.extend(inputs[0]))
        monkeypatch.setattr("nnunet_diffrefine.inference.refine.cache_size", lambda _: cache)
        image, prior = volume(LABELS)
        result = refine_volume([net], image, prior, whole(prior), PATCH, OPTIONS)
        assert len(calls) == result.windows * (1 if cache else 8)

    def test_kept_or_not_makes_no_difference(self, monkeypatch):
        net = self.network().eval()
        image, prior = volume(LABELS)
        results = []
        for cache in (0, 2**30):
            monkeypatch.setattr("nnunet_diffrefine.inference.refine.cache_size", lambda _, cache=cache: cache)
            results.append(refine_volume([net], image, prior, whole(prior), PATCH, OPTIONS).logits)
        torch.testing.assert_close(*results, atol=1e-5, rtol=0)


class TestNotOnDevice:
    """Volumes in main memory; the windows are where the network is."""

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    @pytest.mark.gpu
    @BOTH
    def test_deterministic_methods_give_the_same_on_a_gpu(self, foreground):
        net = network(foreground, METHODS["bridge"]).cuda()
        image, prior = volume(foreground)
        found = []
        for on_device in (True, False):
            options = RefineOptions(torch.device("cuda"), on_device, True, False, True)
            found.append(refine_volume([net], image, prior, whole(prior), PATCH, options))
            assert found[-1].logits.device == CPU
        for name in ("logits", "error", "probabilities"):
            torch.testing.assert_close(*(getattr(result, name) for result in found), atol=2e-2, rtol=2e-2)
        assert found[0].changed.any()

    @pytest.mark.parametrize("kind", ["bridge", "gaussian"])
    def test_on_the_cpu_it_changes_nothing(self, kind):
        net = network(LABELS, METHODS[kind])
        image, prior = volume(LABELS)
        found = [
            refine_volume([net], image, prior, whole(prior), PATCH, RefineOptions(CPU, on_device)).logits
            for on_device in (True, False)
        ]
        assert torch.equal(*found)
