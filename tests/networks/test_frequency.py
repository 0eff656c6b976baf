"""Filters in k-space against closed forms, SciPy and NumPy."""

import math

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor

from nnunet_diffrefine.networks.frequency import FrequencyParser, low_pass
from tests.networks.feature_modules import SPACES, features, taught, under_autocast, without_gradient


def wave(space: tuple[int, ...], *periods: int, phase: float = 0.3) -> Tensor:
    """Plane wave (1, 1, *space) with a whole number of periods along each axis."""
    grids = torch.meshgrid(*(torch.arange(n) / n for n in space), indexing="ij")
    angle = sum(2 * math.pi * p * g for p, g in zip(periods, grids, strict=True))
    return torch.cos(torch.as_tensor(angle) + phase)[None, None]


class TestLowPass:
    @pytest.mark.parametrize(("n", "periods", "cutoff"), [(32, 8, 0.5), (32, 4, 0.25), (21, 7, 2 / 3), (8, 3, 0.75)])
    def test_a_sine_at_the_cutoff_keeps_exp_minus_half(self, n: int, periods: int, cutoff: float) -> None:
        sine = wave((n,), periods)
        torch.testing.assert_close(low_pass(sine, cutoff), math.exp(-0.5) * sine)

    def test_the_nyquist_frequency_is_cutoff_1(self) -> None:
        alternating = wave((10,), 5, phase=0)
        assert torch.equal(alternating.sign()[0, 0, :3], torch.tensor([1.0, -1.0, 1.0]))
        torch.testing.assert_close(low_pass(alternating, 1), math.exp(-0.5) * alternating)

    def test_the_gains_of_the_axes_multiply(self) -> None:
        space, periods, cutoff = (8, 10, 12), (2, -3, 1), 0.6
        exponent = sum((2 * p / n / cutoff) ** 2 for p, n in zip(periods, space, strict=True))
        oblique = wave(space, *periods)
        torch.testing.assert_close(low_pass(oblique, cutoff), math.exp(-exponent / 2) * oblique)

    @pytest.mark.parametrize("space", [(40,), (24, 17), (12, 16, 15)], ids=str)
    @pytest.mark.parametrize("cutoff", [0.15, 0.25])
    def test_it_is_scipys_gaussian_on_a_torus(self, space: tuple[int, ...], cutoff: float) -> None:
        """Sigma is 1 / (pi cutoff) voxels; both are wide enough that sampling the Gaussian hardly matters."""
        image, sigma = features(2, space), 1 / (math.pi * cutoff)
        axes = tuple(range(2, image.ndim))
        expected = gaussian_filter(image.double().numpy(), sigma, mode="wrap", truncate=8, axes=axes)
        torch.testing.assert_close(low_pass(image, cutoff), torch.from_numpy(expected).float(), atol=2e-3, rtol=0)
        assert not torch.allclose(low_pass(image, 1.1 * cutoff), torch.from_numpy(expected).float(), atol=2e-3)

    @SPACES
    def test_mean_shape_and_type_are_kept(self, space: tuple[int, ...]) -> None:
        image = features(3, space) + 100
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            result = low_pass(image.to(dtype), 0.3)
            assert result.dtype == dtype
            assert result.shape == image.shape
        axes = tuple(range(2, image.ndim))
        torch.testing.assert_close(low_pass(image, 0.3).mean(axes), image.mean(axes))

    def test_mirroring_and_exchanging_axes_commute_with_it(self) -> None:
        image = features(2, (5, 6, 7))
        for axis in (2, 3, 4):
            torch.testing.assert_close(low_pass(image.flip(axis), 0.4), low_pass(image, 0.4).flip(axis))
        torch.testing.assert_close(low_pass(image.transpose(2, 4), 0.4), low_pass(image, 0.4).transpose(2, 4))

    def test_twice_is_once_with_the_narrower_cutoff(self) -> None:
        image = features(1, (9, 8))
        torch.testing.assert_close(low_pass(low_pass(image, 0.6), 0.6), low_pass(image, 0.6 / math.sqrt(2)))

    def test_a_non_negative_image_stays_so_but_for_ringing_of_the_sampled_gaussian(self) -> None:
        point = torch.zeros(1, 1, 17, 17)
        point[..., 8, 8] = 1
        blurred = low_pass(point, 0.25)
        assert blurred.min() > -1e-4
        assert blurred.argmax() == point.argmax()

    def test_channels_and_samples_do_not_mix(self) -> None:
        image = features(3)
        torch.testing.assert_close(low_pass(image, 0.4)[1:, 2:], low_pass(image[1:, 2:], 0.4))

    def test_off_returns_the_image_itself(self) -> None:
        image = features(2)
        assert low_pass(image, 0) is image
        assert low_pass(image, 0.0) is image

    @pytest.mark.parametrize("cutoff", [-0.1, 1.01, math.nan, math.inf])
    def test_other_cutoffs_are_refused(self, cutoff: float) -> None:
        with pytest.raises(ValueError, match="cutoff="):
            low_pass(features(2), cutoff)

    @pytest.mark.parametrize("image", [torch.zeros(1, 1, 4, dtype=torch.int16), torch.zeros(4, 4)], ids=["int", "2"])
    def test_what_is_no_image_is_refused(self, image: Tensor) -> None:
        with pytest.raises(ValueError, match=r"\(B, C, \*S\)"):
            low_pass(image, 0.5)


class TestFrequencyParser:
    @SPACES
    def test_untaught_it_is_the_identity_bit_for_bit(self, space: tuple[int, ...]) -> None:
        h = features(3, space)
        assert torch.equal(FrequencyParser(3)(h), h)

    @SPACES
    def test_it_agrees_with_numpys_full_transform(self, space: tuple[int, ...]) -> None:
        parser, h = taught(FrequencyParser(3, bands=5)), features(3, space)
        grids = np.meshgrid(*(2 * np.fft.fftfreq(n) for n in space), indexing="ij")
        radius = np.sqrt(sum(grid**2 for grid in grids))
        expected = np.empty(h.shape)
        for channel, offset in enumerate(parser.offset.detach().numpy()):
            gain = 1 + np.interp(radius, np.linspace(0, 1, 5), offset)  # interp is constant beyond its ends
            for sample in range(len(h)):
                expected[sample, channel] = np.fft.ifftn(np.fft.fftn(h[sample, channel].numpy()) * gain).real
        torch.testing.assert_close(parser(h), torch.from_numpy(expected).float(), atol=1e-5, rtol=1e-4)

    @pytest.mark.parametrize("n", [16, 32, 48])
    def test_a_wave_is_scaled_alike_whatever_the_size(self, n: int) -> None:
        parser = FrequencyParser(1, bands=5)
        with torch.no_grad():
            parser.offset.copy_(torch.tensor([[0.0, 1.0, -0.5, 2.0, -1.0]]))
        for share, gain in ((0, 1.0), (0.25, 2.0), (0.375, 1.25), (0.5, 0.5), (0.75, 3.0), (1, 0.0)):
            for sides in ((n, 3), (4, n)):
                periods = [round(share * n / 2) if side == n else 0 for side in sides]
                h = wave(sides, *periods)
                torch.testing.assert_close(parser(h), gain * h, msg=f"{share} of Nyquist along {sides}")

    def test_corners_of_k_space_have_the_gain_of_nyquist(self) -> None:
        parser = FrequencyParser(1, bands=3)
        with torch.no_grad():
            parser.offset.copy_(torch.tensor([[0.0, 0.0, 4.0]]))
        chequered = wave((8, 8), 4, 4, phase=0)
        torch.testing.assert_close(parser(chequered), 5 * chequered)

    def test_one_gain_in_all_bands_scales(self) -> None:
        parser, h = FrequencyParser(2), features(2, (5, 6, 7))
        with torch.no_grad():
            parser.offset[0] = 1.5
        torch.testing.assert_close(parser(h)[:, 0], 2.5 * h[:, 0])
        assert torch.equal(parser(h)[:, 1], h[:, 1])

    def test_it_is_equivariant_to_mirroring_and_cyclic_shifts(self) -> None:
        parser, h = taught(FrequencyParser(3)), features(3, (5, 6, 7))
        for axis in (2, 3, 4):
            torch.testing.assert_close(parser(h.flip(axis)), parser(h).flip(axis))
            torch.testing.assert_close(parser(h.roll(2, axis)), parser(h).roll(2, axis))

    def test_every_parameter_learns(self) -> None:
        assert without_gradient(lambda: FrequencyParser(3, bands=4), features(3, (6, 7, 8))) == (set(), set())
        parser = FrequencyParser(2, bands=4)
        (parser(features(2, (6, 7, 8))) ** 2).sum().backward()
        assert (parser.offset.grad != 0).all()

    def test_a_knot_no_frequency_comes_near_has_zero_gradient_not_none(self) -> None:
        parser = FrequencyParser(2)
        (parser(features(2, (1, 1, 1))) ** 2).sum().backward()
        assert (parser.offset.grad[:, 0] != 0).all()
        assert not parser.offset.grad[:, 1:].any()

    def test_autocast_leaves_the_filter_in_float32(self) -> None:
        parser, h = taught(FrequencyParser(3)), features(3).bfloat16()
        output, gradients = under_autocast(parser, h)
        assert output.dtype == torch.bfloat16
        change = parser(h.float()) - h.float()  # by hand in float32; rounded to bfloat16 before and after the sum
        torch.testing.assert_close(output.float(), h.float() + change, atol=0.02, rtol=0.01)
        assert not torch.equal(output, h)
        assert all(gradient.isfinite().all() for gradient in gradients)
        assert list(parser.buffers()) == []

    @pytest.mark.parametrize(("channels", "bands"), [(0, 8), (4, 1)])
    def test_bad_arguments_are_refused(self, channels: int, bands: int) -> None:
        with pytest.raises(ValueError, match=f"channels={channels}, bands={bands}"):
            FrequencyParser(channels, bands)

    @pytest.mark.parametrize(("channels", "given"), [(3, 1), (1, 3)])
    def test_other_numbers_of_channels_are_refused_not_broadcast(self, channels: int, given: int) -> None:
        with pytest.raises(ValueError, match=rf"takes \(B, {channels}, \*S\)"):
            FrequencyParser(channels)(features(given))
