"""There and back again: what is not refined comes out as it went in, whatever nnU-Net does to the image."""

from __future__ import annotations

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from nnunet_diffrefine.inference.case_work import write_map
from nnunet_diffrefine.inference.geometry import corrected
from tests.inference.small import ENDING, FOREGROUNDS, Folders, geometry_of, probabilities_of, read_volume, write_volume

KINDS = pytest.mark.parametrize("kind", ["labels", "regions"])
SPACES = {
    "same grid": {},
    "finer": {"spacing": (0.7, 0.7, 0.7)},
    "anisotropic": {"spacing": (1.0, 1.3, 1.9)},
    "thick slices, transposed": {"spacing": (4.0, 1.1, 0.9), "transpose": (1, 2, 0)},
}
EACH = pytest.mark.parametrize("plans", SPACES.values(), ids=list(SPACES))
IMAGE_SPACING = (0.9, 1.0, 1.2)  # x, y, z


@EACH
@KINDS
def test_probabilities_take_the_way_of_the_image(tmp_path, kind, plans):
    """An image that is a probability and is resampled as probabilities are must come out as that probability does."""
    geometry = geometry_of(kind, **plans)
    p = probabilities_of(kind)[-1:]
    p[:, :2] = p[:, :, :, -3:] = 0  # cropped off
    file = tmp_path / f"case_0000{ENDING}"
    write_volume(file, p[0], IMAGE_SPACING)
    image, properties = geometry.preprocessed([file])
    found = geometry.forward(p, properties, image.shape[1:])
    assert found.shape == image.shape
    assert properties["shape_before_cropping"] != properties["shape_after_cropping_and_before_resampling"]
    np.testing.assert_allclose(found, image, atol=1e-6)


@EACH
def test_maps_come_back_to_the_image(tmp_path, plans):
    """A smooth map of the image's own grid, there and back, is itself up to interpolation; 0 where cropped."""
    geometry = geometry_of("labels", **plans)
    z, y, x = np.mgrid[:14, :18, :16].astype(np.float32)
    smooth = (z + 2 * y + 3 * x)[None] / 100
    smooth[:, :2] = 0
    file = tmp_path / f"case_0000{ENDING}"
    write_volume(file, smooth[0], IMAGE_SPACING)
    image, properties = geometry.preprocessed([file])
    back = geometry.backward(geometry.forward(smooth, properties, image.shape[1:])[0], properties)
    assert (back[:2] == 0).all()
    inside = (slice(4, -2), slice(4, -4), slice(4, -4))
    assert np.abs(back - smooth[0])[inside].mean() < 0.03  # of 1; thick slices take the nearest


@pytest.mark.parametrize("spacing", [(0.7, 0.7, 0.7), (1.0, 1.3, 1.9)], ids=["finer", "coarser"])
def test_maps_stay_in_their_range_where_splines_overshoot(tmp_path, spacing):
    """Both ways: a map of 0 and 1, resampled by splines of order 3 along the axis that nnU-Net takes by itself."""
    geometry = geometry_of("labels", spacing=spacing)
    kwargs = geometry.plans["configurations"]["3d_fullres"]["resampling_fn_probabilities_kwargs"]
    kwargs |= {"order_z": 3, "force_separate_z": True}
    file = tmp_path / f"case_0000{ENDING}"
    write_volume(file, np.ones((14, 18, 16), np.float32), IMAGE_SPACING)
    image, properties = geometry.preprocessed([file])
    there = geometry.forward(np.indices((14, 18, 16)).sum(0, keepdims=True) // 4 % 2.0, properties, image.shape[1:])
    back = geometry.backward((np.indices(image.shape[1:]).sum(0) // 4 % 2).astype(np.float32), properties)
    for values in (there, back):
        assert (values.min(), values.max()) == (0, 1)


@EACH
@KINDS
class TestCorrected:
    def parts(self, tmp_path, kind, plans):
        folders = Folders(tmp_path, kind, IMAGE_SPACING, border=2)
        labels = folders.add("case")
        geometry = geometry_of(kind, **plans)
        image, properties = geometry.preprocessed([folders.images / f"case_0000{ENDING}"])
        p = folders.probabilities("case")
        foreground = p if kind == "regions" else p[1:]
        prior = torch.from_numpy(geometry.forward(foreground, properties, image.shape[1:]))
        before = FOREGROUNDS[kind].logits(prior[None])[0].numpy()
        return geometry, properties, before, labels, p

    def test_nothing_changed_nothing_differs(self, tmp_path, kind, plans):
        geometry, properties, before, labels, p = self.parts(tmp_path, kind, plans)
        found, soft = corrected(geometry, properties, before, before.copy(), labels, p)
        assert np.array_equal(found, labels)
        assert np.array_equal(soft, p)
        plain, none = corrected(geometry, properties, before, before.copy(), labels, None)
        assert np.array_equal(plain, labels)
        assert none is None

    def test_a_change_stays_where_it_is_made_and_is_nnunets_export_there(self, tmp_path, kind, plans):
        geometry, properties, before, labels, p = self.parts(tmp_path, kind, plans)
        after = before.copy()
        part = tuple(slice(n // 3, n // 3 + max(n // 3, 1)) for n in before.shape[1:])
        after[(slice(None), *part)] = -6.0
        after[(-1, *part)] = 6.0
        if kind == "regions":
            after[(0, *part)] = 6.0
        found, soft = corrected(geometry, properties, before, after, labels, p)
        changed = found != labels
        assert (found[changed] == 2).mean() > 0.5
        exported, exported_p = geometry.exported(after, properties, True)
        unchanged_p = geometry.exported(before, properties, True)[1]
        moved = np.abs(exported_p - unchanged_p).max(0) > 0
        assert not (changed & ~moved).any()
        assert np.array_equal(found[changed], exported[changed])
        assert np.array_equal(soft[:, changed], exported_p[:, changed])
        assert np.array_equal(soft[:, ~moved], p[:, ~moved])
        decided = geometry.labels.convert_probabilities_to_segmentation(soft)
        assert np.array_equal(decided, found)


def test_headers_are_those_of_the_image(tmp_path):
    write_volume(tmp_path / f"image{ENDING}", np.ones((3, 4, 5), np.float32), (0.5, 0.7, 2.0))
    values = np.random.default_rng(0).random((3, 4, 5)).astype(np.float32)
    write_map(values, [tmp_path / f"image{ENDING}"], tmp_path / f"map{ENDING}")
    image, written = (sitk.ReadImage(str(tmp_path / f"{name}{ENDING}")) for name in ("image", "map"))
    assert np.array_equal(read_volume(tmp_path / f"map{ENDING}"), values)
    for of in ("GetSpacing", "GetOrigin", "GetDirection", "GetSize"):
        assert getattr(image, of)() == getattr(written, of)()
