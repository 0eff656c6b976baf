"""Geometry of the phantom: a brain and its tumours as soft tissue fractions.

Every structure is the region where a level function f is positive. f is built from distances in mm and band-limited
noise, so that outlines are smooth yet irregular. A voxel straddling f = 0 is covered in part (:func:`coverage`).
Axes are (z, y, x) = (to superior, to posterior, to left), as SimpleITK returns them with identity direction.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray
from scipy import fft, ndimage

Field = NDArray[np.float32]  # (z, y, x)
Labels = NDArray[np.uint8]  # (z, y, x)
Mask = NDArray[np.bool_]  # (z, y, x)

HEAD_SHARE = 0.44  # semi-axes of the brain, as a share of the field of view
CSF_HALF_WIDTH, RIBBON = 0.045, 0.19  # of a sulcus and of cortex plus sulcus, as shares of the brain radius


class Tissue(IntEnum):
    """Channel order of the tissue fractions."""

    CSF = 0
    GRAY = 1
    DEEP_GRAY = 2
    WHITE = 3
    HYPERINTENSITY = 4
    CHOROID = 5
    VESSEL = 6
    EDEMA = 7
    NON_ENHANCING = 8
    NECROSIS = 9
    ENHANCING = 10


class Label(IntEnum):
    """Values of the label map, as in BraTS since 2023."""

    BACKGROUND = 0
    CORE = 1
    EDEMA = 2
    ENHANCING = 3


@dataclass(frozen=True)
class Grid:
    """Voxel grid centred on the head.

    Attributes:
        shape: voxels along z, y, x.
        spacing: voxel size in mm along z, y, x.
    """

    shape: tuple[int, int, int]
    spacing: tuple[float, float, float]

    @property
    def semi_axes(self) -> NDArray[np.float64]:
        """Semi-axes of the brain in mm, (3,)."""
        return HEAD_SHARE * np.array(self.shape) * np.array(self.spacing)

    @property
    def radius(self) -> float:
        """Smallest semi-axis of the brain in mm: the unit in which all sizes are given."""
        return float(self.semi_axes.min())

    def positions(self) -> Field:
        """Voxel centres in mm from the centre of the head, (3, z, y, x)."""
        axes = [(np.arange(n) - (n - 1) / 2) * h for n, h in zip(self.shape, self.spacing, strict=True)]
        return np.stack(np.meshgrid(*axes, indexing="ij")).astype(np.float32)


@dataclass(frozen=True)
class Lesion:
    """Where a tumour sits and how large it is; lengths in mm.

    Attributes:
        center: (3,), from the centre of the head.
        axes: (3, 3), rotation and stretching into the frame in which the tumour is a ball.
        outer: radius of the whole tumour.
        core: radius of its core.
    """

    center: Field
    axes: Field
    outer: float
    core: float


def smooth_noise(rng: np.random.Generator, grid: Grid, wavelength: float) -> Field:
    """Draw isotropic band-limited noise, (z, y, x), of mean 0 and standard deviation 1.

    Args:
        rng: source of randomness.
        grid: voxel grid.
        wavelength: centre of the band in mm; its standard deviation is half the centre frequency.
    """
    frequencies = [fft.fftfreq(n, h) for n, h in zip(grid.shape[:2], grid.spacing[:2], strict=True)]
    frequencies.append(fft.rfftfreq(grid.shape[2], grid.spacing[2]))
    squares = np.add.outer(np.add.outer(frequencies[0] ** 2, frequencies[1] ** 2), frequencies[2] ** 2)
    band = np.exp(-0.5 * ((np.sqrt(squares) * wavelength - 1) / 0.5) ** 2).astype(np.float32)
    band[0, 0, 0] = 0
    spectrum = fft.rfftn(rng.standard_normal(grid.shape, dtype=np.float32)) * band
    noise: Field = fft.irfftn(spectrum, s=grid.shape)
    return noise / noise.std()


def coverage(level: Field, width: float = 1e-6) -> Field:
    """Share of each voxel in which ``level`` (z, y, x) is positive, in [0, 1]: first-order partial volume.

    A plane with gradient g (per voxel) leaves a unit voxel at |f| = sum_i |g_i| / 2. ``width``, in the unit of
    ``level``, widens the ramp where tissues mix over more than a voxel.
    """
    extent = sum(np.abs(g) for g in np.gradient(level))
    return np.clip(0.5 + level / np.maximum(extent, width), 0, 1)


def sheet_distance(field: Field, grid: Grid) -> Field:
    """Distance in mm to the zero surface of ``field``, first order: |f| / |grad f|."""
    slope = np.sqrt(sum(g * g for g in np.gradient(field, *grid.spacing)))
    return np.abs(field) / np.maximum(slope, 1e-3 * slope.max())


def paint(fractions: Field, tissue: Tissue, alpha: Field | float) -> None:
    """Cover the tissues painted so far, (T, z, y, x), with a share ``alpha`` (z, y, x) in [0, 1] of another."""
    fractions *= 1 - alpha
    fractions[tissue] += alpha


def ellipsoid(position: Field, center: tuple[float, float, float], radii: tuple[float, float, float]) -> Field:
    """Level function that is 1 at the centre and 0 on the surface, for positions (3, z, y, x)."""
    scaled = [(p - c) / r for p, c, r in zip(position, center, radii, strict=True)]
    return 1 - np.sqrt(sum(s * s for s in scaled))


def place_lesions(rng: np.random.Generator, grid: Grid, count: int) -> list[Lesion]:
    """Draw ``count`` tumours inside the hemispheres; each further one is smaller and lies away from the others."""
    lesions: list[Lesion] = []
    for index in range(count):
        outer = grid.radius * (rng.uniform(0.26, 0.56) if index == 0 else rng.uniform(0.18, 0.28))
        core = outer * rng.uniform(0.5, 0.75)
        lesions.append(Lesion(_draw_center(rng, grid, lesions), _draw_axes(rng), outer, core))
    return lesions


def _draw_center(rng: np.random.Generator, grid: Grid, others: list[Lesion]) -> Field:
    """Draw a centre in one hemisphere, between 30 % and 65 % of the way out; farthest of 20 draws from the others."""
    direction = rng.standard_normal((20, 3))
    direction /= np.linalg.norm(direction, axis=1, keepdims=True)
    direction[:, 2] = np.where(direction[:, 2] < 0, -1, 1) * np.maximum(np.abs(direction[:, 2]), 0.5)
    centers = direction * rng.uniform(0.3, 0.65, (20, 1)) * grid.semi_axes
    if not others:
        return centers[0].astype(np.float32)
    gaps = [np.linalg.norm(centers - o.center, axis=1) - o.outer for o in others]
    return centers[np.min(gaps, axis=0).argmax()].astype(np.float32)


def _draw_axes(rng: np.random.Generator) -> Field:
    """Draw a rotation (QR of Gaussian noise) times a stretching of up to 25 % that keeps the volume, (3, 3)."""
    rotation, _ = np.linalg.qr(rng.standard_normal((3, 3)))
    stretch = rng.uniform(0.8, 1.25, 3)
    return (rotation * (stretch / stretch.prod() ** (1 / 3))).astype(np.float32)


def displace(position: Field, lesions: list[Lesion]) -> Field:
    """Mass effect: where the tissue now at ``position`` (3, z, y, x), in mm, was before the tumours pushed it away."""
    origin = position.copy()
    for lesion in lesions:
        offset = position - lesion.center[:, None, None, None]
        distance = np.sqrt((offset**2).sum(0))
        push = 0.35 * lesion.outer * np.exp(-0.5 * (distance / (1.2 * lesion.outer)) ** 2)
        origin -= offset * (push / np.maximum(distance, push))
    return origin


@dataclass(frozen=True)
class Head:
    """A brain without tumours.

    Attributes:
        fractions: (T, z, y, x) tissue fractions, sum 1 in every voxel (outside of the brain, CSF).
        brain: (z, y, x) bool, the skull-stripped head.
    """

    fractions: Field
    brain: Mask


def make_head(rng: np.random.Generator, grid: Grid, lesions: list[Lesion], distractors: bool) -> Head:
    """Draw a brain: folded cortex, white matter, deep grey nuclei, ventricles and, if wanted, distractors."""
    position, radius = grid.positions(), grid.radius
    semi_axes = grid.semi_axes[:, None, None, None].astype(np.float32)
    unit = position / semi_axes
    depth = radius * (1 - np.sqrt((unit**2).sum(0)) + 0.03 * smooth_noise(rng, grid, 1.1 * radius))
    inner = displace(position, lesions)
    inner /= semi_axes
    inner += 0.015 * smooth_noise(rng, grid, 0.5 * radius)
    cortex = _distance_to_folds(rng, grid, depth, inner[2])

    fractions = np.zeros((len(Tissue), *grid.shape), np.float32)
    fractions[Tissue.CSF] = 1
    paint(fractions, Tissue.GRAY, coverage(cortex - CSF_HALF_WIDTH * radius))
    white = cortex - RIBBON * radius
    paint(fractions, Tissue.WHITE, coverage(white))
    _paint_nuclei(fractions, inner, radius)
    ventricle_level = _ventricles(inner, radius, rng.uniform(0.8, 1.25))
    if distractors:
        alpha = _hyperintensities(rng, grid, ventricle_level)
        paint(fractions, Tissue.HYPERINTENSITY, alpha * fractions[Tissue.WHITE])
    paint(fractions, Tissue.CSF, coverage(ventricle_level))
    if distractors:
        plexus = coverage(smooth_noise(rng, grid, 0.3 * radius) - 0.9)
        paint(fractions, Tissue.CHOROID, plexus * coverage(ventricle_level - 0.03 * radius))
        paint(fractions, Tissue.VESSEL, _vessels(rng, grid))
    return Head(fractions, depth > 0)


def _distance_to_folds(rng: np.random.Generator, grid: Grid, depth: Field, across: Field) -> Field:
    """Distance in mm to the nearest pial surface: outer surface, sulci, or the fissure between the hemispheres.

    Sulci are the zero surfaces of a noise field: sheets that wind and branch as folds do. Below their depth the
    distance rises, so that white matter is whole there.
    """
    radius = grid.radius
    sulci = sheet_distance(smooth_noise(rng, grid, 0.75 * radius), grid) + 1.5 * np.maximum(0, depth - 0.22 * radius)
    fissure = radius * np.abs(across) + np.maximum(0, depth - 0.4 * radius)
    return np.minimum(np.minimum(depth, sulci), fissure)


def _paint_nuclei(fractions: Field, inner: Field, radius: float) -> None:
    """Thalamus and lentiform nucleus of both sides; ``inner`` is in semi-axes."""
    for side in (-1, 1):
        for center, radii in (((-0.05, 0.12, 0.15), (0.15, 0.17, 0.10)), ((-0.08, -0.10, 0.36), (0.16, 0.24, 0.09))):
            level = ellipsoid(inner, (center[0], center[1], side * center[2]), radii)
            paint(fractions, Tissue.DEEP_GRAY, coverage(radius * min(radii) * level))


def _ventricles(inner: Field, radius: float, size: float) -> Field:
    """Level function in mm of both lateral ventricles (bent bodies, horns turned outwards) and the third."""
    z, y, x = inner
    width = 0.095 * size * (1 - (np.abs(y) / 0.55) ** 3)
    lateral = width - np.sqrt((np.abs(x) - 0.09 - 0.55 * y * y) ** 2 + (0.6 * (z - 0.16 + 0.5 * y * y)) ** 2)
    third = 0.035 * size * ellipsoid(inner, (-0.06, 0.05, 0.0), (0.16, 0.16, 0.035 * size))
    return radius * np.maximum(lateral, third)


def _hyperintensities(rng: np.random.Generator, grid: Grid, ventricle_level: Field) -> Field:
    """White-matter hyperintensities of presumed vascular origin: punctate foci and caps around the ventricles."""
    radius = grid.radius
    foci = coverage(smooth_noise(rng, grid, 0.45 * radius) - rng.uniform(2.0, 2.8))
    thickness = radius * (0.05 * smooth_noise(rng, grid, 0.6 * radius) + rng.uniform(-0.02, 0.06))
    return np.maximum(foci, coverage(ventricle_level + thickness) * (thickness > 0))


def _vessels(rng: np.random.Generator, grid: Grid, count: int = 9) -> Field:
    """Share of each voxel inside a vessel: sagittal sinus and ``count`` bent veins that dive in from the surface."""
    t = np.linspace(0, 1, 200)[:, None]
    ends = rng.standard_normal((count, 3, 3))
    ends /= np.linalg.norm(ends, axis=-1, keepdims=True)
    ends[:, 2] = ends[:, 0] + 0.9 * (ends[:, 2] - ends[:, 0]) * rng.uniform(0.3, 1, (count, 1))
    ends *= np.array([0.97, 0.85, 0.7])[None, :, None] * rng.uniform(0.85, 1, (count, 3, 1))
    paths = [(1 - t) ** 2 * a + 2 * t * (1 - t) * b + t**2 * c for a, b, c in ends]
    angle = np.pi * (1.15 * t - 0.25)
    paths += [np.hstack([0.97 * np.cos(angle), 0.97 * np.sin(angle), 0 * t + shift]) for shift in (-0.02, 0.02)]
    index = np.concatenate(paths) * grid.semi_axes / grid.spacing + (np.array(grid.shape) - 1) / 2
    mask = np.zeros(grid.shape, np.float32)
    mask[tuple(np.rint(index).astype(int).clip(0, np.array(grid.shape) - 1).T)] = 1
    return np.clip(2.2 * ndimage.gaussian_filter(mask, 0.03 * grid.radius / np.array(grid.spacing)), 0, 1)
