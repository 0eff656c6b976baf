"""Stored priors: how exact, how small, and that a half-written or damaged file is never taken for a prior."""

import os
import pickle

import numpy as np
import pytest
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from scipy import ndimage

from nnunet_diffrefine.stage_one.store import PriorStore, dequantise, quantise
from tests.stage_one.tiny import soft_sphere

LEVELS = np.arange(256, dtype=np.uint8)


def test_the_error_of_eight_bits_is_at_most_half_a_level():
    probabilities = np.random.default_rng(0).random((3, 20, 20, 20), dtype=np.float32)
    error = np.abs(dequantise(quantise(probabilities)).astype(np.float64) - probabilities)
    assert error.max() <= 0.5 / 255 + 1e-7


def test_zero_and_one_are_exact_and_every_level_is_its_own_inverse():
    assert dequantise(quantise(np.array([0.0, 1.0], np.float32))).tolist() == [0.0, 1.0]
    assert (quantise(dequantise(LEVELS)) == LEVELS).all()


def test_levels_read_back_as_k_255ths_in_float32():
    assert dequantise(LEVELS).dtype == np.float32
    assert (dequantise(LEVELS) == (np.arange(256, dtype=np.float64) / 255).astype(np.float32)).all()


def test_read_is_lazy_and_slices_like_the_array(tmp_path):
    store, probabilities = PriorStore(tmp_path), soft_sphere(size=70)
    record = store.write("a", probabilities, fold=3)
    handle = store.read("a")
    crop = (slice(None), slice(3, 69), slice(0, 5), slice(60, 70))
    assert not isinstance(handle, np.ndarray)
    assert handle.dtype == np.uint8
    assert (handle[crop] == quantise(probabilities)[crop]).all()
    assert (record.fold, record.shape, record.bytes) == (3, [2, 70, 70, 70], store.path("a").stat().st_size)


def test_a_store_travels_to_worker_processes(tmp_path):
    store = PriorStore(tmp_path)
    store.write("a", soft_sphere(), 0)
    store.read("a")
    assert (pickle.loads(pickle.dumps(store)).read("a")[:] == store.read("a")[:]).all()


def test_values_a_rounding_error_outside_the_range_are_clipped(tmp_path):
    store = PriorStore(tmp_path)
    store.write("a", np.full((1, 2, 2, 2), 1.0000001, np.float32), 0)
    store.write("b", np.full((1, 2, 2, 2), -1e-7, np.float32), 0)
    assert (store.read("a")[:] == 255).all()
    assert (store.read("b")[:] == 0).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -0.1, 1.1])
def test_what_is_no_probability_is_refused_with_the_case_named(tmp_path, bad):
    probabilities = soft_sphere()
    probabilities[0, 1, 1, 1] = bad
    with pytest.raises(ValueError, match=r"case_7 lie in .*wanted finite values in \[0, 1\]"):
        PriorStore(tmp_path).write("case_7", probabilities, 0)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_channel_axis_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"\(8, 8, 8\); wanted \(R, D, H, W\)"):
        PriorStore(tmp_path).write("a", soft_sphere()[0], 0)


def test_a_crash_before_the_rename_leaves_the_old_prior_and_nothing_else(tmp_path, monkeypatch):
    store = PriorStore(tmp_path)
    record = store.write("a", soft_sphere(), 0)

    def crash(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", crash)
    for case in ("a", "b"):
        with pytest.raises(KeyboardInterrupt):
            store.write(case, soft_sphere() / 2, 0)
    assert [path.name for path in tmp_path.iterdir()] == ["a.b2nd"]
    assert store.verify("a", record)


def test_missing_and_damaged_files_say_so(tmp_path):
    store = PriorStore(tmp_path)
    with pytest.raises(FileNotFoundError, match="No prior of case a"):
        store.read("a")
    record = store.write("a", soft_sphere(), 0)
    store.path("a").write_bytes(store.path("a").read_bytes()[:40])
    assert store.fault("a", record) == "truncated"
    with pytest.raises(RuntimeError, match=r"a\.b2nd is damaged"):
        store.read("a")


def test_priors_take_at_most_a_twentieth_of_the_preprocessed_images(tmp_path):
    """Against nnU-Net's own compression of a noisy image; as after a real training, 3 to 4 % of the prior is soft."""
    rng = np.random.default_rng(0)
    radius = np.sqrt(((np.indices((64,) * 3) - 32) ** 2).sum(0))
    wobble = ndimage.gaussian_filter(rng.normal(0, 5, (2, 64, 64, 64)), (0, 2, 2, 2))
    outer, inner = (1 / (1 + np.exp(3 * (radius - r) + w)) for r, w in zip((12, 7), wobble, strict=True))
    prior = np.stack([outer - inner, inner]).clip(0, 1).astype(np.float32)
    assert 0.02 < ((prior > 1 / 510) & (prior < 1 - 1 / 510)).mean() < 0.04
    image = (outer + rng.normal(0, 1, outer.shape)).astype(np.float32)[None]
    shapes = {"chunks": image.shape, "blocks": (1, 32, 32, 32)}
    nnUNetDatasetBlosc2.save_case(image, np.zeros(image.shape, np.int8), {}, str(tmp_path / "image"), **shapes)
    record = PriorStore(tmp_path).write("a", prior, 0)
    assert record.bytes <= 0.05 * (tmp_path / "image.b2nd").stat().st_size
