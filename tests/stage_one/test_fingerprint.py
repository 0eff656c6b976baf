"""Fingerprints change with what matters and with nothing else."""

import copy
import hashlib

import pytest
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_diffrefine.stage_one.fingerprint import (
    BLOCK_BYTES,
    CONFIGURATION_KEYS,
    PLANS_KEYS,
    file_sha256,
    preprocessing_sha256,
    resolve_configuration,
    splits_sha256,
)
from tests.stage_one.tiny import SPLITS, tiny_plans

BEFORE = preprocessing_sha256(tiny_plans(), "3d_fullres")


@pytest.mark.parametrize("size", [0, 1, BLOCK_BYTES, BLOCK_BYTES + 1])
def test_reading_in_blocks_hashes_the_whole_file(tmp_path, size):
    content = b"ab" * (size // 2) + b"c" * (size % 2)
    (tmp_path / "file").write_bytes(content)
    assert file_sha256(tmp_path / "file") == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("key", CONFIGURATION_KEYS)
def test_every_setting_of_the_preprocessing_counts(key):
    plans = tiny_plans()
    plans["configurations"]["3d_fullres"][key] = "something else"
    assert preprocessing_sha256(plans, "3d_fullres") != BEFORE


@pytest.mark.parametrize("key", PLANS_KEYS)
def test_axes_reader_and_intensities_count(key):
    assert preprocessing_sha256({**tiny_plans(), key: "something else"}, "3d_fullres") != BEFORE


@pytest.mark.parametrize("key", ["architecture", "patch_size", "batch_size", "resampling_fn_probabilities", "new"])
def test_network_patch_and_batch_do_not_count(key):
    plans = {**tiny_plans(), "plans_name": "other", "experiment_planner_used": "other"}
    plans["configurations"]["3d_fullres"][key] = "something else"
    assert preprocessing_sha256(plans, "3d_fullres") == BEFORE


def test_inherited_settings_count_and_resolve_as_nnunet_does():
    plans = tiny_plans()
    plans["configurations"]["child"] = {"inherits_from": "3d_fullres", "batch_size": 9}
    plans["configurations"]["grandchild"] = {"inherits_from": "child", "spacing": [3, 3, 3]}
    assert preprocessing_sha256(plans, "child") == BEFORE
    assert preprocessing_sha256(plans, "grandchild") != BEFORE
    theirs = PlansManager(copy.deepcopy(plans)).get_configuration("grandchild").configuration
    assert resolve_configuration(plans, "grandchild") == theirs


@pytest.mark.parametrize("parent", ["missing", "loop"])
def test_unknown_and_circular_configurations_are_refused(parent):
    plans = tiny_plans()
    plans["configurations"]["loop"] = {"inherits_from": parent}
    with pytest.raises(ValueError, match=f"'{parent}' is not in the plans, or inherits from itself"):
        resolve_configuration(plans, "loop")


def test_moving_a_case_or_a_fold_changes_the_splits():
    moved = [{"train": ["c1", "c3"], "val": ["c0", "c2"]}, SPLITS[1]]
    assert len({splits_sha256(splits) for splits in (SPLITS, moved, SPLITS[::-1], SPLITS[:1])}) == 4
