"""Filters in k-space: a fixed low-pass for images and a learned one for features.

Frequencies are shares of the Nyquist frequency of their axis: 0 is the mean, 1 is half a cycle a voxel. They count
voxels, not millimetres. The discrete Fourier transform wraps around, so a structure at one face reaches the opposite
one, as far as the filter is wide. Everything is computed in float32, also under autocast: half precision has
neither the range of a sum over all voxels nor, on CUDA, transforms of sides that are no powers of 2.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def low_pass(image: Tensor, cutoff: float) -> Tensor:
    """Gaussian low-pass: multiply the spectrum by exp(-½ Σₐ (fₐ / cutoff)²), fₐ the frequency along axis a.

    In space this is, but for sampling, a Gaussian of standard deviation 1 / (π cutoff) voxels. It keeps the mean and
    is equivariant to mirroring.

    CMDiff (https://doi.org/10.1038/s41598-025-25137-7) filters its images in Fourier space before segmentation
    without naming filter or cut-off; the Gaussian is chosen because it does not ring.

    Args:
        image: floating point, (B, C, *S) of any spatial rank.
        cutoff: share of the Nyquist frequency at which an axis has the gain exp(-½) = 0.61, in (0, 1]; 0 for no
            filter, which returns ``image`` itself.

    Returns:
        The filtered image, shape and type of ``image``.

    Raises:
        ValueError: ``cutoff`` is outside [0, 1], or ``image`` is no floating point tensor with spatial axes.
    """
    if not 0 <= cutoff <= 1:
        raise ValueError(f"cutoff={cutoff}: must be a share of the Nyquist frequency in (0, 1], or 0 for no filter.")
    if image.ndim < 3 or not image.is_floating_point():
        raise ValueError(
            f"image has shape {tuple(image.shape)} and type {image.dtype}; low_pass takes floating point (B, C, *S)."
        )
    if cutoff == 0:
        return image
    gain = torch.exp(-0.5 * _squared_frequency(image.shape[2:], image.device) / cutoff**2)
    return _filtered(image, gain).to(image.dtype)


class FrequencyParser(nn.Module):
    """Learned real gain of each channel and radial frequency: h (B, channels, *S) -> same shape, at first h itself.

    MedSegDiff's FF-Parser (https://arxiv.org/abs/2211.00611) multiplies the spectrum by a learned complex map of the
    very size of the features. Such a map ties the network to one patch size, and in 3D would hold more weights than
    the convolutions around it; its phases also shift features in space, in a direction that mirroring reverses.
    Here the gain is a function of the radial frequency √(Σ fₐ²) alone: linear between ``bands`` knots evenly spaced
    from 0 (the mean) to 1 (Nyquist), constant beyond (towards the corners of k-space). Any spatial rank and size;
    equivariant to mirroring and cyclic shifts. A knot that no frequency of a small map comes near gets zero gradient.

    Args:
        channels: channels of h.
        bands: knots of the gain; at least 2.

    Attributes:
        offset: learned gain minus 1, (channels, bands); kept as difference so that weight decay pulls to the identity
            and the initial output is h to the last bit.

    Raises:
        ValueError: ``channels`` is below 1 or ``bands`` below 2.
    """

    def __init__(self, channels: int, bands: int = 8) -> None:
        super().__init__()
        if channels < 1 or bands < 2:
            raise ValueError(f"channels={channels}, bands={bands}: wanted at least 1 channel and 2 bands.")
        self.offset = nn.Parameter(torch.zeros(channels, bands))

    def forward(self, h: Tensor) -> Tensor:
        """Filter ``h``; ValueError if it has another number of channels."""
        channels, bands = self.offset.shape
        if h.ndim < 3 or h.shape[1] != channels:
            raise ValueError(f"h has shape {tuple(h.shape)}; this FrequencyParser takes (B, {channels}, *S).")
        with torch.autocast(h.device.type, enabled=False):
            hats = _hats(_squared_frequency(h.shape[2:], h.device).sqrt(), bands)
            offset = (self.offset.float() @ hats.flatten(1)).view(channels, *hats.shape[1:])
            change = _filtered(h, offset)
        return h + change.to(h.dtype)


def _squared_frequency(sides: Sequence[int], device: torch.device) -> Tensor:
    """Σ fₐ² over the half spectrum of a real signal, fₐ in [0, 1] on every axis."""
    axes = [torch.fft.fftfreq(n, device=device) for n in sides[:-1]] + [torch.fft.rfftfreq(sides[-1], device=device)]
    total = torch.zeros((), device=device)
    for remaining, f in zip(range(len(axes) - 1, -1, -1), axes, strict=True):
        total = total + ((2 * f) ** 2).view(-1, *([1] * remaining))
    return total


def _hats(frequency: Tensor, bands: int) -> Tensor:
    """Share of each band in the gain at ``frequency``: (bands, *half spectrum), sums to 1 over the bands."""
    knots = torch.arange(bands, device=frequency.device).view(-1, *([1] * frequency.ndim))
    return (1 - (frequency.clamp(max=1) * (bands - 1) - knots).abs()).clamp(min=0)


def _filtered(x: Tensor, gain: Tensor) -> Tensor:
    """Float32 ``x`` (B, C, *S) with its half spectrum times ``gain``, which is even along every axis."""
    axes = tuple(range(2, x.ndim))
    spectrum = torch.fft.rfftn(x.float(), dim=axes)
    return torch.fft.irfftn(spectrum * gain, s=x.shape[2:], dim=axes)
