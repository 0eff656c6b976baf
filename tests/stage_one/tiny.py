"""A dataset of four tiny cases in two folds: plans, splits, soft predictions, and what error messages advise."""

import argparse
import json
import re
import shlex
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_diffrefine.paths import StageOneId, fold_folder
from nnunet_diffrefine.stage_one import command
from nnunet_diffrefine.stage_one.fingerprint import splits_sha256
from nnunet_diffrefine.stage_one.leak import check_out_of_fold
from nnunet_diffrefine.stage_one.manifest import Manifest

DATASET = "Dataset999_Tiny"
STAGE_ONE = StageOneId("nnUNetTrainer", "nnUNetPlans", "3d_fullres")
SPLITS = [{"train": ["c2", "c3"], "val": ["c0", "c1"]}, {"train": ["c0", "c1"], "val": ["c2", "c3"]}]
DATASET_JSON = {
    "channel_names": {"0": "MRI"},
    "labels": {"background": 0, "core": 1, "rim": 2},
    "numTraining": 4,
    "file_ending": ".nii.gz",
}
SIZE = 8


def tiny_plans():
    resample = {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None}
    architecture = {
        "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
        "arch_kwargs": {
            "n_stages": 2,
            "features_per_stage": [4, 4],
            "conv_op": "torch.nn.modules.conv.Conv3d",
            "kernel_sizes": [[3, 3, 3], [3, 3, 3]],
            "strides": [[1, 1, 1], [2, 2, 2]],
            "n_conv_per_stage": [1, 1],
            "n_conv_per_stage_decoder": [1],
            "conv_bias": True,
            "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
            "norm_op_kwargs": {"eps": 1e-5, "affine": True},
            "dropout_op": None,
            "dropout_op_kwargs": None,
            "nonlin": "torch.nn.LeakyReLU",
            "nonlin_kwargs": {"inplace": True},
        },
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }
    full = {
        "data_identifier": "nnUNetPlans_3d_fullres",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 2,
        "patch_size": [SIZE] * 3,
        "spacing": [1.0, 1.0, 1.0],
        "normalization_schemes": ["ZScoreNormalization"],
        "use_mask_for_norm": [False],
        "resampling_fn_data": "resample_data_or_seg_to_shape",
        "resampling_fn_data_kwargs": resample,
        "resampling_fn_seg": "resample_data_or_seg_to_shape",
        "resampling_fn_seg_kwargs": {**resample, "is_seg": True},
        "resampling_fn_probabilities": "resample_data_or_seg_to_shape",
        "resampling_fn_probabilities_kwargs": resample,
        "architecture": architecture,
    }
    return {
        "dataset_name": DATASET,
        "plans_name": "nnUNetPlans",
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {"0": {"mean": 1.0, "std": 2.0}},
        "configurations": {
            "3d_fullres": full,
            "2d": {**full, "patch_size": [SIZE] * 2},
            "3d_cascade": {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"},
        },
    }


def write_json(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def soft_sphere(channels=2, size=SIZE):
    grid = np.indices((size,) * 3) - (size - 1) / 2
    distance = np.sqrt((grid**2).sum(0))
    return (
        np.stack([1 / (1 + np.exp(distance - size / (3 + c))) for c in range(channels)]).astype(np.float32) / channels
    )


def mended_by(message):
    """The export commands a message names, parsed by the command line's own parser."""
    parser = argparse.ArgumentParser()
    command.register(parser.add_subparsers())
    found = re.findall(r"nnUNetv2_diffrefine (export [^;]*?)(?=$|;|\. |\.$|, )", message)
    return [parser.parse_args(shlex.split(line)) for line in found]


@dataclass
class PaperExport:
    """An intact export whose checkpoints are a few bytes; tests plant one fault and call :meth:`check`."""

    manifest: Manifest
    folder: Path
    models: Path
    splits: list
    plans: dict
    dataset_json: dict

    def check(self):
        check_out_of_fold(
            self.manifest, self.folder, self.splits, self.models, self.plans, "3d_fullres", self.dataset_json
        )

    def replace_case(self, name, **changes):
        self.manifest = self.manifest.with_case(name, replace(self.manifest.cases[name], **changes))

    def accept_splits(self, splits):
        """Use other splits, as if the export had been made under them."""
        self.splits = splits
        self.manifest = replace(self.manifest, splits_sha256=splits_sha256(splits))


def write_image(path, seed, size=SIZE, value=None):
    """A preprocessed case as nnU-Net saves it: noise of the given size, one voxel of it set to ``value``."""
    image = np.random.default_rng(seed).normal(0, 1, (1, *[size] * 3)).astype(np.float32)
    if value is not None:
        image[0, 1, 2, 3] = value
    for file in path.parent.glob(f"{path.name}[._]*"):
        file.unlink()
    segmentation = np.zeros(image.shape, np.int8)
    nnUNetDatasetBlosc2.save_case(image, segmentation, {}, str(path), chunks=image.shape, blocks=image.shape)


def tiny_network(seed, dataset_json=DATASET_JSON):
    """The planned network, initialised at random."""
    plans = PlansManager(tiny_plans())
    heads = plans.get_label_manager(dataset_json).num_segmentation_heads
    torch.manual_seed(seed)
    return nnUNetTrainer.build_network_architecture(
        plans, plans.get_configuration("3d_fullres"), 1, heads, enable_deep_supervision=False
    )


def write_checkpoint(fold, seed, dataset_json=DATASET_JSON, **changes):
    """What nnU-Net's ``save_checkpoint`` writes, as far as a prediction needs it."""
    checkpoint = {
        "network_weights": tiny_network(seed, dataset_json).state_dict(),
        "init_args": {"fold": fold, "configuration": "3d_fullres"},
        "trainer_name": "nnUNetTrainer",
        "inference_allowed_mirroring_axes": (0, 1, 2),
        **changes,
    }
    path = fold_folder(DATASET, STAGE_ONE, fold) / "checkpoint_final.pth"
    path.parent.mkdir(exist_ok=True)
    torch.save(checkpoint, path)
    return path
