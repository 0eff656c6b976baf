"""What readers of images let pass without a word is refused: truncated NIfTI files, NaN and infinity in them."""

import gzip
import json
import struct

import numpy as np
import pytest
import SimpleITK as sitk
from nnunetv2.imageio.tif_reader_writer import Tiff3DIO

from nnunet_diffrefine import image_files
from nnunet_diffrefine.image_files import read_array, read_header, read_labels, refuse_damaged

ENDINGS = (".nii", ".nii.gz")
NOISE = np.random.default_rng(0).normal(size=(5, 6, 7)).astype(np.float32)


def write(file, array):
    sitk.WriteImage(sitk.GetImageFromArray(array), str(file))
    return file


@pytest.mark.parametrize("ending", [*ENDINGS, ".mha", ".nrrd"])
@pytest.mark.parametrize("kind", [np.uint8, np.int16, np.float32, np.float64])
def test_whole_files_are_read_as_they_are(tmp_path, ending, kind):
    array = np.arange(-60, 150).reshape(5, 6, 7).astype(kind)
    file = write(tmp_path / f"case{ending}", array)
    np.testing.assert_array_equal(read_array(file), array)
    np.testing.assert_array_equal(read_labels(file), array.astype(np.int32))
    assert read_header(file).size == (7, 6, 5)


@pytest.mark.parametrize("ending", [*ENDINGS, ".mha", ".nrrd"])
@pytest.mark.parametrize("lost", [1, 400, 800])
def test_a_truncated_file_is_refused_by_name(tmp_path, ending, lost):
    file = write(tmp_path / f"case{ending}", NOISE)
    content = file.read_bytes()
    assert len(content) > lost
    file.write_bytes(content[:-lost])
    with pytest.raises(ValueError, match=f"case{ending} cannot be read"):
        read_array(file)


def test_a_file_that_was_compressed_when_it_was_truncated_already_is_refused(tmp_path):
    whole = write(tmp_path / "case.nii", NOISE).read_bytes()
    (tmp_path / "case.nii.gz").write_bytes(gzip.compress(whole[:-12]))
    with pytest.raises(ValueError, match=r"case\.nii\.gz .* its last 12 bytes are missing"):
        read_array(tmp_path / "case.nii.gz")


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("kind", [np.float32, np.float64])
@pytest.mark.parametrize("chunk", [8, 1 << 20])
def test_values_that_would_be_read_as_zero_are_refused(tmp_path, monkeypatch, ending, kind, chunk):
    monkeypatch.setattr(image_files, "CHUNK", chunk)
    array = NOISE.astype(kind)
    array[0, 0, 0], array[2, 3, 4], array[-1, -1, -1] = np.nan, -np.inf, np.inf
    file = write(tmp_path / f"case{ending}", array)
    assert (sitk.GetArrayFromImage(sitk.ReadImage(str(file))) == 0).sum() == 3  # the reason for all this
    with pytest.raises(ValueError, match=f"case{ending} holds 3 NaN or infinite values"):
        read_array(file)


@pytest.mark.parametrize("order", "<>")
def test_both_byte_orders_are_understood_and_what_follows_the_data_is_not_looked_at(tmp_path, order):
    header = bytearray(352)
    for place, kind, values in (
        (0, "i", [348]),
        (40, "8h", [3, 2, 1, 1, 1, 1, 1, 1]),
        (70, "2h", [16, 32]),
        (108, "f", [352]),
    ):
        struct.pack_into(f"{order}{kind}", header, place, *values)
    header[344:347] = b"n+1"
    file = tmp_path / "case.nii"
    rest = np.array([np.nan], f"{order}f4").tobytes()
    file.write_bytes(header + np.array([1, 2], f"{order}f4").tobytes() + rest)
    refuse_damaged(file)
    file.write_bytes(header + np.array([1, np.nan], f"{order}f4").tobytes() + rest)
    with pytest.raises(ValueError, match="holds 1 NaN"):
        refuse_damaged(file)
    file.write_bytes(header + bytes(3))
    with pytest.raises(ValueError, match="its last 5 bytes are missing"):
        refuse_damaged(file)


TIFF_SPACING = [3.0, 1.0, 0.5]  # z, y, x, as nnU-Net keeps it


def write_tiff(file, **properties):
    """A label map as nnU-Net writes it, with CASE.json beside it if it has properties."""
    labels = np.arange(5 * 6 * 7).reshape(5, 6, 7) % 4
    Tiff3DIO().write_seg(labels, str(file), {"spacing": None, **properties})
    if not properties:
        file.with_suffix(".json").unlink()
    return labels


@pytest.mark.parametrize("ending", [".tif", ".tiff"])
def test_tiff_files_have_the_spacing_and_the_axes_that_nnunet_gives_them(tmp_path, ending):
    file = tmp_path / f"case{ending}"
    labels = write_tiff(file, spacing=TIFF_SPACING)
    theirs, properties = Tiff3DIO().read_seg(str(file))
    header = read_header(file)
    assert list(header.spacing[::-1]) == properties["spacing"] == TIFF_SPACING
    assert header.size == (7, 6, 5)
    np.testing.assert_array_equal(read_labels(file), theirs[0])
    np.testing.assert_array_equal(read_labels(file), labels)


def test_channels_of_a_tiff_image_share_the_spacing_of_their_case(tmp_path):
    for channel in ("case_0000.tif", "case_0001.tif"):
        write_tiff(tmp_path / channel)
    (tmp_path / "case.json").write_text(json.dumps({"spacing": TIFF_SPACING}))
    assert Tiff3DIO().read_images([str(tmp_path / "case_0001.tif")])[1]["spacing"] == TIFF_SPACING
    assert read_header(tmp_path / "case_0001.tif").spacing == tuple(TIFF_SPACING[::-1])


def test_a_tiff_file_without_spacing_is_refused_unless_its_twin_has_one(tmp_path):
    """SimpleITK would say 1 mm, or what the resolution meant for printers says."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    alone, twin = tmp_path / "a" / "case.tif", tmp_path / "b" / "case.tif"
    write_tiff(alone)
    write_tiff(twin, spacing=TIFF_SPACING)
    with pytest.raises(ValueError, match=r"a.case\.tif has no spacing.* there is no .*a.case\.json beside it; wanted"):
        read_header(alone)
    assert read_header(alone, twin) == read_header(twin)
    (alone.with_suffix(".json")).write_text('{"spacing": [2, 2, 2]}')
    assert read_header(alone, twin).spacing == (2, 2, 2)  # its own counts


@pytest.mark.parametrize(
    "content",
    [
        "no json",
        "{}",
        "[]",
        '{"spacing": 1}',
        '{"spacing": [1, 1]}',
        '{"spacing": [1, 1, 0]}',
        '{"spacing": [1, 1, NaN]}',
    ],
)
def test_what_is_no_spacing_is_refused_by_name(tmp_path, content):
    write_tiff(tmp_path / "case.tif")
    (tmp_path / "case.json").write_text(content)
    with pytest.raises(ValueError, match=r'case\.json .*wanted {"spacing": \[z, y, x\]} in mm'):
        read_header(tmp_path / "case.tif")


@pytest.mark.parametrize("ending", [".png", ".bmp", ".tif"])
def test_natural_images_are_refused_as_2d(tmp_path, ending):
    file = write(tmp_path / f"case{ending}", np.zeros((8, 9), np.uint8))
    with pytest.raises(ValueError, match=f"case{ending} has 2 axes.*2D and 4D images cannot be used"):
        read_header(file)
