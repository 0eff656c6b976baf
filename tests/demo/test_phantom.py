"""The promises of the phantom: reproducible, nested, visible, and a dataset that nnU-Net accepts."""

import json
import multiprocessing.dummy
import os
import re
from dataclasses import replace
from pathlib import Path
from time import process_time
from types import SimpleNamespace

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from batchgeneratorsv2.transforms.utils.seg_to_regions import ConvertSegmentationToRegionsTransform
from nnunetv2.experiment_planning import verify_dataset_integrity
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from scipy import ndimage

from nnunet_diffrefine.demo import phantom
from nnunet_diffrefine.demo.anatomy import Grid, Tissue, coverage, displace, make_head, place_lesions, smooth_noise
from nnunet_diffrefine.demo.contrast import CHANNELS, CONTRAST, MEANS, PSF, render
from nnunet_diffrefine.demo.phantom import PhantomSettings, grow_tumors, make_case, write_dataset

SETTINGS = PhantomSettings()
CLEAN = replace(SETTINGS, noise=0.0, bias=0.0, variation=0.0)
SMALL = PhantomSettings(shape=(16, 18, 17), spacing=(3.0, 2.5, 2.0))
THICK = PhantomSettings(shape=(16, 56, 48), spacing=(3.0, 1.0, 1.0))
REPOSITORY = Path(__file__).parents[2]
FLAIR, T1CE = CHANNELS.index("FLAIR"), CHANNELS.index("T1ce")


@pytest.fixture(scope="module")
def cases():
    return [make_case(seed, SETTINGS) for seed in range(20)]


@pytest.fixture(scope="module")
def thick_cases():
    return [make_case(seed, THICK) for seed in range(20)]


def draw_clean(seed, enhancing=True):
    """Tissue fractions, label map and noise-free channels of one head with two tumours."""
    rng, grid = np.random.default_rng(seed), Grid(CLEAN.shape, CLEAN.spacing)
    lesions = place_lesions(rng, grid, 2)
    head = make_head(rng, grid, lesions, distractors=True)
    labels = grow_tumors(rng, grid, head, lesions, enhancing)
    return head, labels, render(rng, grid, head.fractions, head.brain, noise=0, bias=0, variation=0)


def tree(folder):
    """Content and time of every file below a folder."""
    files = (p for p in sorted(folder.rglob("*")) if p.is_file())
    return {str(p.relative_to(folder)): (p.read_bytes(), p.stat().st_mtime_ns) for p in files}


# --- one case -------------------------------------------------------------------------------------------------------


def test_shape_type_and_time():
    seconds = []
    for seed in range(3):
        start = process_time()
        image, labels = make_case(seed)
        seconds.append(process_time() - start)
        assert image.shape == (4, 48, 56, 48)
        assert image.dtype == np.float32
        assert labels.shape == (48, 56, 48)
        assert labels.dtype == np.uint8
    assert min(seconds) < 0.3


def test_the_seed_determines_every_byte(cases):
    image, labels = make_case(3, PhantomSettings())
    assert image.tobytes() == cases[3][0].tobytes()
    assert labels.tobytes() == cases[3][1].tobytes()
    other, other_labels = make_case(4, SETTINGS)
    assert not np.array_equal(image, other)
    assert not np.array_equal(labels, other_labels)


def test_outside_of_the_head_every_channel_is_zero_and_inside_none(cases):
    for image, labels in cases:
        outside = image == 0
        assert (outside == outside[0]).all()
        assert (image[:, ~outside[0]] > 0).all()
        assert not labels[outside[0]].any()
        assert outside[0][0].all()
        assert outside[0][:, 0].all()
        assert outside[0][:, :, -1].all()
        assert ndimage.label(~outside[0])[1] == 1
        assert 0.25 < (~outside[0]).mean() < 0.45  # an ellipsoid with semi-axes 0.44: 0.36


def test_regions_are_nested_and_the_core_lies_in_edema(cases):
    manager = LabelManager({"background": 0, **phantom.REGIONS}, phantom.REGIONS_CLASS_ORDER)
    embedded = []
    for image, labels in cases:
        whole, core, enhancing = (np.isin(labels, region) for region in manager.foreground_regions)
        assert (whole >= core).all()
        assert (core >= enhancing).all()
        assert 0 < core.sum() < whole.sum()
        shell = ndimage.binary_dilation(core) & ~core & (image[0] > 0)
        embedded.append((labels[shell] == 2).mean())
    assert min(embedded) > 0.2
    assert np.median(embedded) > 0.5


def test_every_part_of_a_tumor_holds_core_up_to_islands(cases):
    for _, labels in cases:
        parts, count = ndimage.label(labels > 0)
        with_core = np.unique(parts[np.isin(labels, (1, 3))])
        assert count == len(with_core)


def test_necrosis_is_encased_by_the_rim():
    """Depth below the core's surface: the rim outside, the necrosis inside."""
    for seed in range(4):
        head, labels, _ = draw_clean(seed)
        depth = ndimage.distance_transform_edt(np.isin(labels, (1, 3)))
        assert depth[labels == 3].min() == 1
        necrotic = head.fractions[Tissue.NECROSIS] > 0.5
        assert depth[necrotic].mean() > depth[labels == 3].mean() + 0.5


def test_cases_with_and_without_enhancement_one_and_two_lesions_and_many_sizes(cases):
    enhancing = [bool((labels == 3).any()) for _, labels in cases]
    assert 2 <= sum(enhancing) <= 18
    lesions = [ndimage.label(ndimage.binary_dilation(np.isin(labels, (1, 3))))[1] for _, labels in cases]
    assert {1, 2} <= set(lesions)
    volumes = [(labels > 0).sum() for _, labels in cases]
    assert max(volumes) > 4 * min(volumes)
    for share in (0.0, 1.0):
        found = [(make_case(seed, replace(SMALL, enhancing=share))[1] == 3).any() for seed in range(8)]
        assert all(f == bool(share) for f in found)


@pytest.mark.parametrize("count", [1, 3])
def test_number_and_size_of_lesions(count):
    grid = Grid(SETTINGS.shape, SETTINGS.spacing)
    lesions = place_lesions(np.random.default_rng(0), grid, count)
    assert len(lesions) == count
    for lesion in lesions:
        assert 0.18 <= lesion.outer / grid.radius <= 0.56
        assert 0.5 <= lesion.core / lesion.outer <= 0.75
        assert np.linalg.norm(lesion.center / grid.semi_axes) < 0.95
        assert abs(np.linalg.det(lesion.axes)) == pytest.approx(1, abs=1e-5)


# --- intensities ----------------------------------------------------------------------------------------------------


def test_noise_free_channels_are_the_documented_means_weighted_by_tissue():
    """Least squares of the noise-free channels on the (equally blurred) fractions gives back the table."""
    rows, values = [], []
    for seed in range(3):
        head, _, image = draw_clean(seed)
        blurred = [ndimage.gaussian_filter(f, PSF) for f in head.fractions]
        rows.append(np.stack([b[head.brain] for b in blurred], 1).astype(np.float64))
        values.append(image[:, head.brain].T)
    found, *_ = np.linalg.lstsq(np.concatenate(rows), np.concatenate(values), rcond=None)
    np.testing.assert_allclose(found, MEANS, atol=0.05)


@pytest.mark.parametrize("enhancing", [True, False])
def test_tissues_fill_every_voxel_and_agree_with_the_labels(enhancing):
    head, labels, _ = draw_clean(0, enhancing)
    np.testing.assert_allclose(head.fractions.sum(0), 1, atol=1e-5)
    assert head.fractions.min() > -1e-6
    assert head.fractions[Tissue.EDEMA :].sum(0)[labels > 0].min() > 0.5
    core = head.fractions[Tissue.NON_ENHANCING :].sum(0)
    np.testing.assert_array_equal(core > 0.5, np.isin(labels, (1, 3)))
    inert = head.fractions[Tissue.NON_ENHANCING] + head.fractions[Tissue.NECROSIS]
    assert (inert > 0.5)[labels == 1].mean() > 0.9
    assert head.fractions[Tissue.ENHANCING].any() == enhancing


def test_order_of_brightness_on_noise_free_means():
    means = {t: [] for t in Tissue}
    for seed in range(6):
        head, _, image = draw_clean(seed, enhancing=seed % 2 == 0)
        for tissue in Tissue:
            means[tissue].append(image[:, (head.fractions[tissue] > 0.9) & head.brain].T)
    t1, t1ce, t2, flair = (
        {t: np.concatenate(means[t])[:, c].mean() for t in Tissue if len(np.concatenate(means[t]))} for c in range(4)
    )
    assert t1[Tissue.WHITE] > t1[Tissue.GRAY] > t1[Tissue.NON_ENHANCING] > t1[Tissue.CSF]
    assert t1[Tissue.WHITE] > t1[Tissue.EDEMA] > t1[Tissue.NON_ENHANCING] > t1[Tissue.NECROSIS]
    assert t1ce[Tissue.ENHANCING] == max(t1ce.values())
    assert t1[Tissue.ENHANCING] < t1[Tissue.WHITE]
    assert t1ce[Tissue.NECROSIS] < min(t1ce[Tissue.NON_ENHANCING], t1ce[Tissue.EDEMA], t1ce[Tissue.GRAY])
    assert t2[Tissue.CSF] == max(t2.values())
    assert t2[Tissue.NECROSIS] > t2[Tissue.EDEMA] > t2[Tissue.GRAY] > t2[Tissue.WHITE]
    assert flair[Tissue.EDEMA] == max(flair.values())
    assert (
        flair[Tissue.EDEMA]
        > flair[Tissue.HYPERINTENSITY]
        > flair[Tissue.GRAY]
        > flair[Tissue.WHITE]
        > flair[Tissue.CSF]
    )
    assert flair[Tissue.EDEMA] > flair[Tissue.NON_ENHANCING] > flair[Tissue.NECROSIS]


def test_means_of_the_labels_in_the_finished_images(cases):
    pooled = {(c, k): [] for c in range(4) for k in range(4)}
    for image, labels in cases:
        for c, k in pooled:
            pooled[c, k].append(image[c][(labels == k) & (image[0] > 0)])
    mean = {key: np.concatenate(values).mean() for key, values in pooled.items()}
    assert mean[FLAIR, 2] > 1.4 * mean[FLAIR, 0]
    assert mean[T1CE, 3] == max(mean[T1CE, k] for k in range(4))
    assert mean[T1CE, 1] < min(mean[T1CE, 2], mean[T1CE, 3])


def contrast_to_noise(channel, first, second):
    """(mean difference) / (pooled standard deviation), all variation counted as noise."""
    a, b = channel[first], channel[second]
    return (a.mean() - b.mean()) / np.sqrt((a.var() + b.var()) / 2)


@pytest.mark.parametrize(("grid", "least"), [("cases", 1.5), ("thick_cases", 1.3)])
def test_outlines_are_visible(grid, least, request):
    """Two voxels inside against two outside: whole tumour on FLAIR, enhancing tumour on T1ce."""
    whole, enhancing = [], []
    for image, labels in request.getfixturevalue(grid):
        brain, tumor, rim = image[0] > 0, labels > 0, labels == 3
        inside = tumor & ~ndimage.binary_erosion(tumor, iterations=2)
        outside = ndimage.binary_dilation(tumor, iterations=2) & ~tumor & brain
        whole.append(contrast_to_noise(image[FLAIR], inside, outside))
        if rim.any():
            around = ndimage.binary_dilation(rim, iterations=2) & ~rim & brain
            enhancing.append(contrast_to_noise(image[T1CE], rim, around))
    assert np.median(whole) > 1.8
    assert np.median(enhancing) > 1.8
    assert min(*whole, *enhancing) > least


def test_distractors_look_like_tumor_outside_of_it():
    t1ce, flair = {True: [], False: []}, {True: [], False: []}
    for distractors in (True, False):
        for seed in range(4):
            image, labels = make_case(seed, replace(CLEAN, distractors=distractors))
            far = ~ndimage.binary_dilation(labels > 0, iterations=4)
            t1ce[distractors].append((image[T1CE][far] > 1.1 * CONTRAST[Tissue.WHITE][T1CE]).sum())
            flair[distractors].append((image[FLAIR][far] > 1.15 * CONTRAST[Tissue.GRAY][FLAIR]).sum())
    assert min(t1ce[True]) > 20
    assert min(flair[True]) > 5
    assert max(t1ce[False]) == 0
    assert max(flair[False]) == 0


def uniform(**amounts):
    """The channels of a head of nothing but white matter."""
    grid = Grid((32, 32, 32), (1.0, 1.0, 1.0))
    fractions = np.zeros((len(Tissue), *grid.shape), np.float32)
    fractions[Tissue.WHITE] = 1
    brain = np.ones(grid.shape, bool)
    options = {"noise": 0.0, "bias": 0.0, "variation": 0.0, **amounts}
    return render(np.random.default_rng(0), grid, fractions, brain, **options)


def test_noise_is_rician():
    """E[M^2] = A^2 + 2 sigma^2, and Var[M^2] = 4 A^2 sigma^2 + 4 sigma^4."""
    image = uniform(noise=0.4).astype(np.float64)
    for c, channel in enumerate(image):
        a, sigma = MEANS[Tissue.WHITE, c], 0.4 * MEANS[Tissue.WHITE, c]
        assert (channel**2).mean() == pytest.approx(a**2 + 2 * sigma**2, rel=0.02)
        assert (channel**2).var() == pytest.approx(4 * a**2 * sigma**2 + 4 * sigma**4, rel=0.05)


def test_bias_is_smooth_and_has_the_requested_spread():
    gain = np.log(uniform(bias=0.2) / MEANS[Tissue.WHITE][:, None, None, None])
    np.testing.assert_allclose(gain.mean((1, 2, 3)), 0, atol=1e-4)
    np.testing.assert_allclose(gain.std((1, 2, 3)), 0.2, rtol=1e-3)
    assert max(np.abs(np.diff(gain, axis=axis)).max() for axis in (1, 2, 3)) < 0.1
    assert not np.allclose(gain[0], gain[1], atol=0.05)


# --- geometry -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [-0.7, -0.25, 0.0, 0.4])
def test_coverage_of_a_plane_is_exact(offset):
    """The voxel [-1/2, 1/2] is covered by {z > -offset} to 1/2 + offset, cut to [0, 1]; in any unit."""
    z = np.broadcast_to(np.arange(-3.0, 4.0, dtype=np.float32)[:, None, None], (7, 5, 5))
    for unit in (1.0, 3.0):
        np.testing.assert_allclose(coverage(unit * (z + offset)), np.clip(0.5 + z + offset, 0, 1), atol=1e-6)


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (3.0, 1.0, 1.0)])
def test_coverage_of_a_ball_has_its_volume(spacing):
    grid = Grid(tuple(int(36 / h) for h in spacing), spacing)
    share = coverage(12 - np.sqrt((grid.positions() ** 2).sum(0)))
    assert share.sum() * np.prod(spacing) == pytest.approx(4 / 3 * np.pi * 12**3, rel=0.02)


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (3.0, 1.0, 1.0)])
def test_noise_is_standard_and_its_band_is_in_millimeters(spacing):
    grid = Grid((48, 60, 60), spacing)
    noise = smooth_noise(np.random.default_rng(0), grid, 10.0)
    assert noise.dtype == np.float32
    assert noise.mean() == pytest.approx(0, abs=1e-5)
    assert noise.std() == pytest.approx(1, abs=1e-5)
    frequency = np.sqrt(sum(f**2 for f in np.meshgrid(*map(np.fft.fftfreq, grid.shape, spacing), indexing="ij")))
    power = np.abs(np.fft.fftn(noise)) ** 2
    # Band sqrt of a Gaussian of deviation 0.05 / mm around 0.1 / mm: nothing beyond four deviations of it.
    assert power[frequency > 0.3].sum() < 1e-3 * power.sum()
    assert 0.08 < (power * frequency).sum() / power.sum() < 0.14


def test_tumors_push_tissue_outwards_and_leave_the_rest():
    grid = Grid((24, 24, 24), (2.0, 2.0, 2.0))
    position = grid.positions()
    np.testing.assert_array_equal(displace(position, []), position)
    lesion = replace(place_lesions(np.random.default_rng(0), grid, 1)[0], outer=5.0)
    origin = displace(position, [lesion])
    offset = position - lesion.center[:, None, None, None]
    now, before = np.linalg.norm(offset, axis=0), np.linalg.norm(origin - lesion.center[:, None, None, None], axis=0)
    assert (before <= now + 1e-4).all()
    assert (now - before).max() <= 0.35 * 5.0 + 1e-4
    np.testing.assert_allclose(origin[:, now > 25], position[:, now > 25], atol=0.02)


@pytest.mark.parametrize("settings", [SMALL, THICK, PhantomSettings(shape=(12, 12, 12)), replace(SMALL, max_lesions=4)])
def test_other_grids_hold_a_tumor_too(settings):
    for seed in range(4):
        image, labels = make_case(seed, settings)
        assert image.shape == (4, *settings.shape)
        assert np.isfinite(image).all()
        assert np.isin(labels, (1, 3)).any()
        assert (labels == 2).any()


def test_thick_slices_show_the_same_share_of_tumor(cases, thick_cases):
    """Sizes are in mm: a third of the slices, three times as thick, hold as much tumour on average."""
    thin, thick = (
        np.mean([(labels > 0).sum() / (image[0] > 0).sum() for image, labels in drawn])
        for drawn in (cases, thick_cases)
    )
    assert thin == pytest.approx(thick, rel=0.25)


# --- datasets -------------------------------------------------------------------------------------------------------


def test_nnunet_accepts_the_dataset_and_reads_its_geometry(tmp_path, monkeypatch):
    folder = write_dataset(tmp_path / "Dataset901_Phantom", 2, 0, SMALL, test_cases=1)
    assert folder == tmp_path / "Dataset901_Phantom"
    threads = SimpleNamespace(get_context=lambda method: multiprocessing.dummy)  # a process takes seconds to start
    monkeypatch.setattr(verify_dataset_integrity, "multiprocessing", threads)
    verify_dataset_integrity.verify_dataset_integrity(str(folder))
    names = set(tree(folder))
    assert len(names) == 3 * 5 + 1
    assert {"imagesTr/phantom_001_0003.nii.gz", "labelsTr/phantom_001.nii.gz", "dataset.json"} <= names
    assert {"imagesTs/phantom_002_0000.nii.gz", "labelsTs/phantom_002.nii.gz"} <= names
    _, properties = SimpleITKIO().read_images([str(folder / "imagesTr/phantom_000_0000.nii.gz")])
    assert properties["spacing"] == pytest.approx([3.0, 2.5, 2.0])
    picture = sitk.ReadImage(str(folder / "labelsTs/phantom_002.nii.gz"))
    assert picture.GetOrigin() == pytest.approx(phantom.ORIGIN)
    assert all(phantom.ORIGIN)
    assert picture.GetDirection() == pytest.approx(np.eye(3).ravel())
    assert picture.GetPixelID() == sitk.sitkUInt8


def test_files_hold_what_make_case_draws(tmp_path):
    folder = write_dataset(tmp_path / "Dataset901_Phantom", 2, 7, SMALL)
    seed = int(np.random.SeedSequence((7, 1)).generate_state(1, np.uint64)[0])
    image, labels = make_case(seed, SMALL)
    for c in range(4):
        stored = sitk.GetArrayFromImage(sitk.ReadImage(str(folder / f"imagesTr/phantom_001_{c:04d}.nii.gz")))
        np.testing.assert_array_equal(stored, image[c])
    np.testing.assert_array_equal(
        sitk.GetArrayFromImage(sitk.ReadImage(str(folder / "labelsTr/phantom_001.nii.gz"))), labels
    )


@pytest.mark.parametrize("regions", [True, False])
def test_labels_survive_nnunets_round_trip(tmp_path, cases, regions):
    folder = write_dataset(tmp_path / "Dataset901_Phantom", 1, 0, SMALL, regions=regions)
    description = json.loads((folder / "dataset.json").read_text())
    manager = LabelManager(description["labels"], description.get("regions_class_order"))
    assert manager.has_regions is regions
    assert manager.all_labels == [0, 1, 2, 3]
    channels = manager.foreground_regions if regions else [int(label) for label in manager.all_labels]
    convert = ConvertSegmentationToRegionsTransform(channels)
    if regions:
        assert channels == [(1, 2, 3), (1, 3), (3,)]
    for _, labels in cases[:4]:
        target = convert._apply_to_segmentation(torch.from_numpy(labels)[None].float())
        back = manager.convert_probabilities_to_segmentation(target.float().numpy())
        np.testing.assert_array_equal(back, labels)


def test_the_same_seed_writes_the_same_bytes(tmp_path):
    first, second, other = (
        write_dataset(tmp_path / f"Dataset90{i}_Phantom", 1, seed, SMALL) for i, seed in enumerate((5, 5, 6))
    )
    content = [{n: c for n, (c, _) in tree(f).items() if n != "dataset.json"} for f in (first, second, other)]
    assert content[0] == content[1]
    assert all(content[0][name] != content[2][name] for name in content[0])


def test_a_repeated_call_writes_only_what_is_missing(tmp_path):
    folder = tmp_path / "Dataset901_Phantom"
    before = tree(write_dataset(folder, 3, 0, SMALL, test_cases=1))
    (folder / "imagesTr/phantom_001_0002.nii.gz").unlink()
    (folder / "labelsTs/phantom_003.nii.gz").unlink()
    write_dataset(folder, 3, 0, SMALL, test_cases=1)
    after = tree(folder)
    assert {name: content for name, (content, _) in after.items()} == {n: c for n, (c, _) in before.items()}
    rewritten = {name for name in before if before[name][1] != after[name][1]}
    assert rewritten == {"imagesTr/phantom_001_0002.nii.gz", "labelsTs/phantom_003.nii.gz"}


def test_an_interrupted_call_leaves_whole_files_only_and_continues(tmp_path, monkeypatch):
    folder, moves = tmp_path / "Dataset901_Phantom", []

    def interrupted(source, target):
        moves.append(target)
        if len(moves) == 8:
            raise KeyboardInterrupt
        os.rename(source, target)

    monkeypatch.setattr(phantom.os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_dataset(folder, 2, 0, SMALL)
    images = sorted(p.name for p in (folder / "imagesTr").iterdir())
    assert images == [*(f"phantom_000_{c:04d}.nii.gz" for c in range(4)), "phantom_001_0000.nii.gz"]
    monkeypatch.undo()
    write_dataset(folder, 2, 0, SMALL)
    whole = write_dataset(tmp_path / "Dataset902_Phantom", 2, 0, SMALL)
    content = [{n: c for n, (c, _) in tree(f).items() if n != "dataset.json"} for f in (folder, whole)]
    assert content[0] == content[1]


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"cases": 2}, {"settings": THICK}, {"test_cases": 1}, {"regions": False}]
)
def test_a_folder_of_other_arguments_is_refused_and_untouched(tmp_path, change):
    arguments = {"folder": tmp_path / "Dataset901_Phantom", "cases": 1, "seed": 0, "settings": SMALL}
    before = tree(write_dataset(**arguments))
    with pytest.raises(ValueError, match="other arguments"):
        write_dataset(**{**arguments, **change})
    assert tree(tmp_path / "Dataset901_Phantom") == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cases": 0}, "cases is 0"),
        ({"test_cases": -1}, "test_cases is -1"),
        ({"seed": -1}, "seed is -1"),
        ({"folder": Path("phantom")}, "DatasetXXX_NAME"),
    ],
)
def test_broken_arguments_are_named(tmp_path, arguments, message):
    valid = {"folder": Path("Dataset901_Phantom"), "cases": 1, "seed": 0, "settings": SMALL, **arguments}
    with pytest.raises(ValueError, match=message):
        write_dataset(**{**valid, "folder": tmp_path / valid["folder"]})
    assert not tree(tmp_path)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("shape", (48, 48)),
        ("shape", (48, 48, 8)),
        ("shape", (48.0, 48, 48)),
        ("spacing", (1.0, 1.0)),
        ("spacing", (1.0, 0.0, 1.0)),
        ("spacing", (1.0, float("nan"), 1.0)),
        ("max_lesions", 0),
        ("further_lesion", 1.5),
        ("enhancing", -0.1),
        ("noise", -1),
        ("bias", float("nan")),
        ("variation", 2),
    ],
)
def test_broken_settings_are_named(name, value):
    with pytest.raises(ValueError, match=f"^{name} is {re.escape(repr(value))}; it must be "):
        PhantomSettings(**{name: value})


def test_a_negative_seed_is_refused():
    with pytest.raises(ValueError, match="seed is -1"):
        make_case(-1)


def test_the_documented_table_is_the_one_in_the_code():
    text = (REPOSITORY / "docs" / "phantom.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \|[^|]*\| (\d+) \| (\d+) \| (\d+) \| (\d+) \|", text, re.MULTILINE)
    assert {name: tuple(map(int, values)) for name, *values in rows} == {t.name: CONTRAST[t] for t in Tissue}
