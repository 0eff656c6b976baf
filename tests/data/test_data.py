"""The prior travels with the image: the same crops, the same movements, and no change of its values."""

import multiprocessing
import pickle
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from acvl_utils.cropping_and_padding.bounding_boxes import crop_and_pad_nd
from batchgenerators.dataloading.nondet_multi_threaded_augmenter import NonDetMultiThreadedAugmenter
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
from batchgeneratorsv2.transforms.utils.random import RandomTransform
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from torch import Tensor

from nnunet_diffrefine.data import PriorDataset, PriorTransform
from nnunet_diffrefine.data.dataset import StackedChannels
from nnunet_diffrefine.stage_one.store import PriorStore, dequantise

PATCH = (16, 16, 16)
WIDE = (24, 26, 28)  # before rotation and scaling, as nnU-Net crops it
LABELS = LabelManager({"background": 0, "edema": 1, "core": 2}, None)
CASES = {"large": (20, 18, 22), "small": (6, 20, 7)}


# --- dataset and loader -----------------------------------------------------------------------------------------------


def numbered(shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """An image of two channels that number the voxels from 1, and uint8 levels of a prior that follow from them."""
    number = np.arange(1, np.prod(shape) + 1, dtype=np.float32).reshape(shape)
    return np.stack((number, -number)), np.stack((number % 251, 250 - number % 251)).astype(np.uint8)


def follows(image: Tensor, prior: Tensor) -> bool:
    """Whether image (2, *S) and prior (2, *S) are a crop of :func:`numbered`, with zeros around it."""
    inside = image[0] > 0
    level = torch.where(inside, image[0] % 251, 0)
    expected = torch.stack((level, torch.where(inside, 250 - level, 0))) / 255
    return bool(torch.equal(image[1], -image[0]) and torch.equal(prior, expected))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> PriorDataset:
    preprocessed, export = tmp_path_factory.mktemp("preprocessed"), tmp_path_factory.mktemp("export")
    store = PriorStore(export)
    for case, shape in CASES.items():
        image, levels = numbered(shape)
        segmentation = np.zeros((1, *shape), np.int8)
        segmentation[0, 2:4, 3:6, 2:5], segmentation[0, 4:5, 3:6, 2:5] = 1, 2
        locations = {k: np.argwhere(segmentation == k) for k in (1, 2)}
        block = (1, *(min(8, n) for n in shape))
        nnUNetDatasetBlosc2.save_case(
            image, segmentation, {"class_locations": locations}, str(preprocessed / case), block, block
        )
        store.write(case, dequantise(levels), fold=0)
    return PriorDataset(nnUNetDatasetBlosc2(str(preprocessed), sorted(CASES)), store)


def loader(dataset: Any, patch: tuple[int, ...] = PATCH, transforms: BasicTransform | None = None) -> nnUNetDataLoader:
    return nnUNetDataLoader(dataset, 2, patch, patch, LABELS, oversample_foreground_percent=0.5, transforms=transforms)


@pytest.mark.parametrize("case", CASES)
def test_a_case_is_nnunets_with_the_prior_behind(dataset: PriorDataset, case: str) -> None:
    data, segmentation, previous, properties = dataset.load_case(case)
    image, levels = numbered(CASES[case])
    assert data.shape == (4, *CASES[case])
    assert (data.ndim, data.dtype) == (4, np.float32)
    everything = data[:, :, :, :]
    assert everything.dtype == np.float32
    assert np.array_equal(everything[:2], image)
    assert np.array_equal(everything[2:], levels.astype(np.float32) / np.float32(255))
    theirs = dataset.dataset.load_case(case)
    assert np.array_equal(segmentation[:], theirs[1][:])
    assert previous is theirs[2] is None
    assert properties.keys() == theirs[3].keys()
    assert np.array_equal(dataset[case][0][:, 1:3], everything[:, 1:3])


def test_it_lists_nnunets_cases(dataset: PriorDataset) -> None:
    assert dataset.identifiers == dataset.dataset.identifiers == sorted(CASES)
    assert dataset.source_folder == dataset.dataset.source_folder


@pytest.mark.parametrize(
    "bbox", [[[0, 4], [3, 9], [1, 2]], [[-5, 3], [0, 30], [20, 24]], [[-2, 22], [-2, 20], [-2, 24]]]
)
def test_crops_and_padding_are_those_of_the_whole_array(dataset: PriorDataset, bbox: list[list[int]]) -> None:
    data = dataset.load_case("large")[0]
    lazy, whole = crop_and_pad_nd(data, bbox, 0), crop_and_pad_nd(data[:], bbox, 0)
    assert lazy.dtype == np.float32
    assert np.array_equal(lazy, whole)


def test_only_the_crop_is_read() -> None:
    class Recording:
        def __init__(self, channels: int, dtype: type) -> None:
            self.array, self.read = np.ones((channels, 50, 50, 50), dtype), 0
            self.shape = self.array.shape

        def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
            self.read += self.array[index].size
            return self.array[index]

    image, prior = Recording(3, np.float32), Recording(2, np.uint8)
    crop = StackedChannels(image, prior, "case")[:, 1:3, 4:8, 0:5]
    assert crop.shape == (5, 2, 4, 5)
    assert (image.read, prior.read) == (3 * 40, 2 * 40)


def test_a_prior_of_another_shape_is_refused_with_the_mending_command() -> None:
    image, prior = np.zeros((1, 4, 5, 6), np.float32), np.zeros((2, 4, 5, 7), np.uint8)
    with pytest.raises(RuntimeError, match=r"Case liver_3.*\(4, 5, 6\).*\(4, 5, 7\).*nnUNetv2_diffrefine export"):
        StackedChannels(image, prior, "liver_3")


def test_a_missing_prior_is_named(dataset: PriorDataset, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="large"):
        PriorDataset(dataset.dataset, PriorStore(tmp_path)).load_case("large")


def test_nnunets_loader_delivers_image_and_prior_of_the_same_crop(dataset: PriorDataset) -> None:
    np.random.seed(0)
    seen: set[str] = set()
    for _ in range(10):
        batch = next(loader(dataset))
        assert batch["data"].shape == (2, 4, *PATCH)
        assert batch["target"].shape == (2, 1, *PATCH)
        seen.update(batch["keys"])
        for data, case in zip(batch["data"], batch["keys"], strict=True):
            assert follows(data[:2], data[2:])
            padded = data[0] == 0
            assert padded.any() == (case == "small")  # patch corners lie inside the large case
            assert not data[2:, padded].any()
    assert seen == set(CASES)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # its way of being stopped
def test_the_loader_works_in_a_forked_worker(dataset: PriorDataset) -> None:
    workers = NonDetMultiThreadedAugmenter(loader(dataset), None, 1, num_cached=1, wait_time=0.002)
    try:
        batches = [next(workers) for _ in range(3)]
    finally:
        workers._finish()
    assert all(follows(data[:2], data[2:]) for batch in batches for data in batch["data"])


@pytest.mark.slow
def test_the_loader_works_in_a_spawned_worker(dataset: PriorDataset) -> None:
    transforms = PriorTransform(nnUNetTrainer.get_validation_transforms(None, False, None, None, None), 2)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        batch = pool.submit(next, loader(dataset, transforms=transforms)).result(timeout=120)
    assert all(follows(data[:2], data[2:]) for data in batch["data"])


def test_everything_a_worker_gets_can_be_pickled(dataset: PriorDataset) -> None:
    copy = pickle.loads(pickle.dumps(loader(dataset, transforms=PriorTransform(training_transforms(), 2))))
    assert copy.transforms.prior_channels == 2
    assert next(copy)["data"].shape == (2, 4, *PATCH)
    unpickled = pickle.loads(pickle.dumps(dataset))
    assert np.array_equal(unpickled.load_case("large")[0][:], dataset.load_case("large")[0][:])


# --- transforms -------------------------------------------------------------------------------------------------------


def training_transforms(
    mirror: tuple[int, ...] = (0, 1, 2), spatial: bool = True, intensity: float | None = None, **settings: Any
) -> BasicTransform:
    """nnU-Net's own pipeline; spatial: always or never rotate and scale; intensity: probability of each transform."""
    arguments = {
        "do_dummy_2d_data_aug": False, "use_mask_for_norm": [False, False], "is_cascaded": False,
        "foreground_labels": [1, 2], "regions": None, "ignore_label": None, **settings,
    }  # fmt: skip
    pipeline = nnUNetTrainer.get_training_transforms(PATCH, (-0.5, 0.5), None, mirror, **arguments)
    kinds = [type(t) for t in pipeline.transforms]
    assert kinds.count(SpatialTransform) == 1
    assert kinds.count(RandomTransform) >= 7
    for transform in pipeline.transforms:
        if isinstance(transform, SpatialTransform):
            transform.p_rotation = transform.p_scaling = float(spatial)
        if isinstance(transform, RandomTransform) and intensity is not None:
            transform.apply_probability = intensity
    return pipeline


def waves(shape: tuple[int, ...] = WIDE, phase: float = 0.0) -> Tensor:
    """A smooth volume in [0, 1] without symmetry."""
    z, y, x = torch.meshgrid(*(torch.linspace(0, 1, n) for n in shape), indexing="ij")
    return 0.5 + 0.25 * torch.sin(7 * z + 3 * y * x + phase) + 0.25 * torch.cos(5 * y - 4 * x * z + 2 * phase)


def sample(shape: tuple[int, ...] = WIDE) -> dict[str, Tensor]:
    """Two image channels and two prior channels, the first of each alike; the segmentation is where it exceeds 0.5."""
    first, second, third = (waves(shape, phase) for phase in (0.0, 1.0, 2.0))
    return {"image": torch.stack((first, second, first, third)), "segmentation": (first > 0.5)[None].to(torch.int16)}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("dummy_2d", [False, True])
def test_the_prior_moves_with_the_image(seed: int, dummy_2d: bool) -> None:
    shape = (PATCH[0], *WIDE[1:]) if dummy_2d else WIDE
    np.random.seed(seed)
    torch.manual_seed(seed)
    transforms = training_transforms(intensity=0.0, do_dummy_2d_data_aug=dummy_2d)
    out = PriorTransform(transforms, 2)(**sample(shape))
    assert out["image"].shape == (4, *PATCH)
    image, prior = out["image"][:2], out["image"][2:]
    torch.testing.assert_close(prior[0], image[0], atol=1e-6, rtol=0)
    untouched = PriorTransform(training_transforms((), spatial=False, intensity=0.0), 2)(**sample(shape))["image"]
    assert (out["image"] - untouched).abs().mean() > 0.02
    assert not torch.allclose(prior[1], image[1], atol=0.1)
    clear = (prior[:1] - 0.5).abs() > 0.05
    agreement = (prior[:1] > 0.5) == (out["segmentation"] > 0)
    assert agreement[clear].float().mean() > 0.995


def test_mirroring_is_exact() -> None:
    given = sample(PATCH)
    results = []
    for seed in range(6):
        torch.manual_seed(seed)
        results.append(PriorTransform(training_transforms(spatial=False, intensity=0.0), 2)(**dict(given))["image"])
        flips = [axes for axes in ((), (1,), (2,), (3,), (1, 2), (1, 3), (2, 3), (1, 2, 3))]
        assert any(torch.equal(results[-1], given["image"].flip(axes)) for axes in flips)
    assert not all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("settings", [{}, {"do_dummy_2d_data_aug": True}, {"use_mask_for_norm": [True, True]}])
def test_intensity_transforms_leave_the_prior_untouched(settings: dict) -> None:
    np.random.seed(0)
    torch.manual_seed(0)
    given = sample(PATCH)
    copy = given["image"].clone()
    out = PriorTransform(training_transforms((), spatial=False, intensity=1.0, **settings), 2)(**dict(given))
    assert torch.equal(out["image"][2:], copy[2:])
    for channel in range(2):
        assert (out["image"][channel] - copy[channel]).abs().mean() > 0.05
    assert torch.equal(given["image"][2:], copy[2:])


def test_probabilities_stay_probabilities() -> None:
    class Overshoot(BasicTransform):
        def _apply_to_image(self, img: Tensor, **params: Any) -> Tensor:
            return img

        _apply_to_segmentation = _apply_to_image

        def _apply_to_regr_target(self, target: Tensor, **params: Any) -> Tensor:
            return 3 * target - 1

    image = torch.cat((5 * torch.randn(1, *PATCH), torch.rand(2, *PATCH)))
    out = PriorTransform(Overshoot(), 2)(image=image.clone(), segmentation=torch.zeros(1, *PATCH))["image"]
    assert torch.equal(out[:1], image[:1])
    assert torch.equal(out[1:], (3 * image[1:] - 1).clamp(0, 1))
    ones = torch.ones(3, *WIDE)
    moved = PriorTransform(training_transforms(), 2)(image=ones, segmentation=torch.zeros(1, *WIDE))["image"][1:]
    assert moved.max() <= 1
    assert moved.min() >= 0


def test_regions_and_the_ignore_label_stay_nnunets() -> None:
    settings = {"regions": [(1, 2), 2], "ignore_label": 3}
    given = sample(PATCH)
    given["segmentation"] = torch.randint(-1, 4, (1, *PATCH)).to(torch.int16)
    labels = given["segmentation"][0].clone()
    transforms = PriorTransform(training_transforms((), spatial=False, intensity=0.0, **settings), 2)
    target = transforms(**given)["segmentation"]
    assert torch.equal(target, torch.stack(((labels == 1) | (labels == 2), labels == 2, labels == 3)))


def test_the_loader_with_transforms_delivers_stacked_patches(dataset: PriorDataset) -> None:
    np.random.seed(1)
    batch = next(loader(dataset, WIDE, PriorTransform(training_transforms(), 2)))
    assert batch["data"].shape == (2, 4, *PATCH)
    assert batch["target"].shape == (2, 1, *PATCH)
    prior = batch["data"][:, 2:]
    assert prior.min() >= 0
    assert prior.max() <= 1
    assert prior.any()
