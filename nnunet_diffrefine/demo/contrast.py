"""From tissue fractions to the four MR channels of the phantom.

    channel = | bias(x) * (1 + texture(x)) * sum_t fraction_t(x) * mean_t + n | inside the brain, 0 outside,

with n complex Gaussian: the magnitude is Rician (Gudbjartsson and Patz, The Rician distribution of noisy MRI data,
1995, https://doi.org/10.1002/mrm.1910340618). The means are chosen for the order of brightness that radiology
describes, not measured on a scanner.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from nnunet_diffrefine.demo.anatomy import Field, Grid, Tissue, smooth_noise

CHANNELS = ("T1", "T1ce", "T2", "FLAIR")
PSF = 0.45  # point spread: standard deviation in voxels

# Mean intensity of each tissue in each of CHANNELS; arbitrary units, white matter on T1 is 100.
CONTRAST: dict[Tissue, tuple[float, float, float, float]] = {
    Tissue.CSF: (25, 25, 190, 20),
    Tissue.GRAY: (68, 73, 112, 88),
    Tissue.DEEP_GRAY: (80, 85, 100, 82),
    Tissue.WHITE: (100, 104, 82, 68),
    Tissue.HYPERINTENSITY: (84, 88, 122, 120),
    Tissue.CHOROID: (58, 135, 150, 60),
    Tissue.VESSEL: (65, 150, 50, 42),
    Tissue.EDEMA: (74, 78, 145, 144),
    Tissue.NON_ENHANCING: (52, 57, 170, 110),
    Tissue.NECROSIS: (42, 40, 172, 74),
    Tissue.ENHANCING: (72, 195, 132, 116),
}
MEANS: NDArray[np.float32] = np.array([CONTRAST[t] for t in Tissue], np.float32)  # (T, channel)


def tumor_share(fractions: Field) -> Field:
    """Share of each voxel that is tumour or oedema, (z, y, x), of tissue fractions (T, z, y, x)."""
    return fractions[Tissue.EDEMA :].sum(0)


def render(
    rng: np.random.Generator,
    grid: Grid,
    fractions: Field,
    brain: NDArray[np.bool_],
    *,
    noise: float,
    bias: float,
    variation: float,
) -> Field:
    """Draw the four channels, (4, z, y, x), 0 outside of ``brain`` and above 0 inside.

    Args:
        rng: source of randomness.
        grid: voxel grid.
        fractions: (T, z, y, x), sum 1 everywhere.
        brain: (z, y, x).
        noise: standard deviation of each part of the complex noise, as a share of the channel's white matter.
        bias: standard deviation of the log of the coil sensitivity.
        variation: relative standard deviation of a tissue's mean between cases, and of the texture within it
            (twice as much in tumours).
    """
    means = MEANS * np.exp(variation * rng.standard_normal(MEANS.shape, dtype=np.float32))
    roughness = variation * (1 + tumor_share(fractions))
    image = np.empty((len(CHANNELS), *grid.shape), np.float32)
    for c in range(len(CHANNELS)):
        clean = np.tensordot(means[:, c], fractions, 1)
        clean *= 1 + roughness * smooth_noise(rng, grid, 0.3 * grid.radius)
        clean = ndimage.gaussian_filter(clean, PSF) * _coil(rng, grid, bias)
        sigma = noise * MEANS[Tissue.WHITE, c]
        parts = sigma * rng.standard_normal((2, *grid.shape), dtype=np.float32)
        image[c] = np.hypot(clean + parts[0], parts[1])
    return image * brain


def _coil(rng: np.random.Generator, grid: Grid, bias: float) -> Field:
    """Smooth positive gain of mean log 0, wavelength twice the field of view and more, as a sum of cosines."""
    log_gain = np.zeros(grid.shape, np.float32)
    lines = [np.linspace(0, 1, n, dtype=np.float32) for n in grid.shape]
    z, y, x = np.meshgrid(*lines, indexing="ij", sparse=True)
    for _ in range(4):
        k = rng.uniform(-0.6, 0.6, 3).astype(np.float32)
        log_gain += np.cos(2 * np.pi * (k[0] * z + k[1] * y + k[2] * x + np.float32(rng.uniform())))
    log_gain -= log_gain.mean()
    return np.exp(bias * log_gain / max(float(log_gain.std()), 1e-6))
