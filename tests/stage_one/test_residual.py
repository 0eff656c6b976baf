"""The export of a synthesis: out-of-fold differences, their range and quantiles, and the same leak check."""

import copy
import json

import numpy as np
import pytest
import torch
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_diffrefine.environment import VARIABLE
from nnunet_diffrefine.paths import (
    StageOneId,
    export_folder,
    fold_folder,
    model_folder,
    preprocessed_dataset,
    residual_folder,
    resource_folder,
)
from nnunet_diffrefine.stage_one.export import export
from nnunet_diffrefine.stage_one.leak import LeakError, open_export
from nnunet_diffrefine.stage_one.manifest import Manifest
from nnunet_diffrefine.stage_one.residual import median_quantile, quantile, residual_quantiles, synthesised_channel
from nnunet_diffrefine.stage_one.store import PriorStore, dequantise
from nnunet_diffrefine.training.recoseg import prepare_recoseg, prepare_synthesis
from nnunet_diffrefine.training.recoseg_build import build_recoseg, synthesis_of
from tests.stage_one.tiny import DATASET, DATASET_JSON, SIZE, SPLITS, mended_by, tiny_plans, write_json

SYNTHESIS = StageOneId("ReCoSegSynthesisTrainer", "nnUNetPlans", "3d_fullres")
MAXIMUM = 4.0
TWO = {**DATASET_JSON, "channel_names": {"0": "T1Gd", "1": "FLAIR"}}
BLOCK = {"maximum": MAXIMUM, "process": {"timesteps": 10}, "sampling": {"steps": 2}}


def plans_of(configuration="3d_fullres", **block):
    plans = tiny_plans()
    two = plans["configurations"][configuration]
    two.update(normalization_schemes=["ZScoreNormalization"] * 2, use_mask_for_norm=[False] * 2)
    if configuration == "2d":
        two["architecture"] = copy.deepcopy(two["architecture"])
        kwargs = two["architecture"]["arch_kwargs"]
        kwargs.update(kernel_sizes=[[3, 3]] * 2, strides=[[1, 1], [2, 2]], conv_op="torch.nn.modules.conv.Conv2d")
        kwargs["norm_op"] = "torch.nn.modules.instancenorm.InstanceNorm2d"
    if block:
        two["diffrefine"] = block
    return {**plans, "continue_training": False}


def write_images(folder):
    """Two channels; in the first slice both are 0, as nnU-Net leaves what lies outside of a masked image."""
    for number, case in enumerate(case for split in SPLITS for case in split["val"]):
        image = np.random.default_rng(number).normal(0, 1, (2, *[SIZE] * 3)).astype(np.float32)
        image[:, 0] = 0
        labels = np.zeros((1, *image.shape[1:]), np.int8)
        nnUNetDatasetBlosc2.save_case(image, labels, {}, str(folder / case), chunks=image.shape, blocks=image.shape)


@pytest.fixture(params=["3d_fullres", "2d"])
def trained(folders, monkeypatch, request):
    """Two folds of a synthesis of random weights, on the images of two channels, in 3D and in 2D."""
    monkeypatch.setenv(VARIABLE, str(resource_folder("trainers")))
    one = StageOneId(SYNTHESIS.trainer, SYNTHESIS.plans, request.param)
    base, model = preprocessed_dataset(DATASET), model_folder(DATASET, one)
    images = base / "nnUNetPlans_3d_fullres"
    images.mkdir()
    write_images(images)
    write_json(base / "nnUNetPlans.json", plans_of(one.configuration))
    write_json(base / "dataset.json", TWO)
    ready = prepare_synthesis(one.trainer, plans_of(one.configuration, **BLOCK), one.configuration, 0, TWO)
    write_json(model / "plans.json", ready.plans)
    write_json(model / "dataset.json", TWO)
    for fold in range(2):
        save(one, fold, network(ready.plans, one, seed=fold))
    return one, ready


def network(plans, one, seed):
    torch.manual_seed(seed)
    return synthesis_of(PlansManager(plans).get_configuration(one.configuration)).eval()


def save(one, fold, network):
    path = fold_folder(DATASET, one, fold) / "checkpoint_final.pth"
    path.parent.mkdir(parents=True, exist_ok=True)
    init = {"fold": fold, "configuration": one.configuration}
    checkpoint = {"network_weights": network.state_dict(), "init_args": init, "trainer_name": one.trainer}
    torch.save({**checkpoint, "inference_allowed_mirroring_axes": None}, path)


def image_of(case):
    folder = preprocessed_dataset(DATASET) / "nnUNetPlans_3d_fullres"
    return torch.from_numpy(np.asarray(nnUNetDatasetBlosc2(str(folder), [case]).load_case(case)[0][:]))


def test_what_is_stored_is_the_difference_of_the_fold_that_held_the_case_out(trained):
    one, ready = trained
    manifest = export(DATASET, one, device="cpu")
    folder = residual_folder(DATASET, one)
    assert not export_folder(DATASET, one).exists()
    for fold, split in enumerate(SPLITS):
        for case in split["val"]:
            image = image_of(case)
            windows = image.transpose(0, 1) if one.configuration == "2d" else image[None]
            drawn = [network(ready.plans, one, seed).synthesise(windows).detach() for seed in (fold, 1 - fold)]
            own, other = (x.transpose(0, 1)[0] if one.configuration == "2d" else x[0, 0] for x in drawn)
            excess, deficit = MAXIMUM * dequantise(PriorStore(folder).read(case)[:])
            inner = np.s_[2:-2, 2:-2, 2:-2]  # nnU-Net's half precision weights leave few digits in the corners
            error = np.abs((excess - deficit) - (own - image[0]).clamp(-MAXIMUM, MAXIMUM).numpy())[inner]
            assert error.max() < 0.5 * MAXIMUM / 255 + 0.01
            assert np.abs((excess - deficit) - (other - image[0]).numpy())[inner].max() > 0.05
            assert manifest.cases[case].fold == fold
    assert manifest.channel == ready.channel
    assert (manifest.channel.name, manifest.channel.index, manifest.channel.maximum) == ("T1Gd", 0, MAXIMUM)
    assert manifest.stage_one.builder == "ReCoSegSynthesisTrainer"


def test_the_manifest_is_read_back_and_the_leak_check_passes_and_refuses(trained):
    one, ready = trained
    manifest = export(DATASET, one, device="cpu")
    folder = residual_folder(DATASET, one)
    assert Manifest.read(folder) == manifest
    open_export(DATASET, one, ready.plans, one.configuration, TWO, folder)
    wrong = manifest.with_case("c0", manifest.cases["c2"])
    wrong.write(folder)
    with pytest.raises(LeakError, match="c0.*trained on them") as caught:
        open_export(DATASET, one, ready.plans, one.configuration, TWO, folder)
    (mend,) = mended_by(str(caught.value))
    assert (mend.tr, mend.c, mend.f) == ("ReCoSegSynthesisTrainer", one.configuration, ["0"])


def test_a_second_run_draws_nothing_and_other_settings_draw_anew(trained):
    one, ready = trained
    first = export(DATASET, one, device="cpu")
    stamp = {f.name: f.stat().st_mtime_ns for f in residual_folder(DATASET, one).glob("*.b2nd")}
    assert export(DATASET, one, device="cpu") == first
    assert stamp == {f.name: f.stat().st_mtime_ns for f in residual_folder(DATASET, one).glob("*.b2nd")}
    model = model_folder(DATASET, one)
    other = prepare_synthesis(
        "Other", plans_of(one.configuration, **BLOCK | {"maximum": 2.0}), one.configuration, 0, TWO
    )
    write_json(model / "plans.json", other.plans)
    assert export(DATASET, one, device="cpu").channel.maximum == 2.0


def segmentation_plans(one, **block):
    return plans_of(one.configuration, **block)


def prepare(one, fold=0, **block):
    return prepare_recoseg("ReCoSegTrainer", segmentation_plans(one, **block), one.configuration, fold, TWO)


def test_a_segmentation_is_refused_until_every_fold_is_exported(trained):
    one, _ = trained
    with pytest.raises(RuntimeError, match="No out-of-fold synthesis") as caught:
        prepare(one)
    for fold in (0, 1):
        wanted = f"nnUNetv2_train {DATASET} {one.configuration} {fold} -tr ReCoSegSynthesisTrainer -p nnUNetPlans"
        assert wanted in str(caught.value)
    export(DATASET, one, folds=[1], device="cpu")
    with pytest.raises(LeakError, match=r"Fold\(s\) 0 of .* are not exported"):
        prepare(one, fold=1)
    export(DATASET, one, folds=[0], device="cpu")
    assert prepare(one).checkpoint == fold_folder(DATASET, one, 0) / "checkpoint_final.pth"


@pytest.mark.parametrize(("fold", "match"), [("all", "Fold 'all' trains on every case"), (2, "defines folds 0..1")])
def test_folds_without_held_out_cases_are_refused(trained, fold, match):
    one, _ = trained
    export(DATASET, one, device="cpu")
    with pytest.raises(RuntimeError, match=match):
        prepare(one, fold=fold)
    with pytest.raises(RuntimeError, match=match):
        prepare_synthesis(one.trainer, plans_of(one.configuration), one.configuration, fold, TWO)


def test_several_syntheses_have_to_be_chosen_from(trained):
    one, _ = trained
    export(DATASET, one, device="cpu")
    manifest = residual_folder(DATASET, one) / "manifest.json"
    twin = residual_folder(DATASET, StageOneId("ReCoSegSynthesisTrainer_other", one.plans, one.configuration))
    write_json(twin / "manifest.json", json.loads(manifest.read_text()))
    with pytest.raises(RuntimeError, match=r"Several syntheses.*synthesis\.trainer"):
        prepare(one)
    assert prepare(one, synthesis={"trainer": one.trainer}).channel.name == "T1Gd"


def test_the_plans_alone_rebuild_the_network_and_take_the_folds_synthesis(trained):
    one, ready = trained
    export(DATASET, one, device="cpu")
    prepared = prepare(one, keep_target=False)
    plans = json.loads(json.dumps(prepared.plans))
    built = build_recoseg(PlansManager(plans).get_configuration(one.configuration), 3, True).eval()
    weights = torch.load(prepared.checkpoint, weights_only=False)["network_weights"]
    built.synthesis.load_state_dict(weights)
    dimensions = 2 if one.configuration == "2d" else 3
    x = torch.randn(1, 2, *[SIZE] * dimensions, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(built.synthesis.synthesise(x), network(ready.plans, one, seed=0).synthesise(x))
    built.segmenter.decoder.deep_supervision = False
    assert built(x).shape == (1, 3, *[SIZE] * dimensions)
    assert built.axes == tuple(range(dimensions))


def test_the_model_knows_which_region_lies_in_which(trained):
    one, _ = trained
    regions = {**TWO, "labels": {"background": 0, "core": [2], "whole": [1, 2]}, "regions_class_order": [2, 1]}
    for folder in (preprocessed_dataset(DATASET), model_folder(DATASET, one)):
        write_json(folder / "dataset.json", regions)
    export(DATASET, one, device="cpu")
    plans = prepare_recoseg("ReCoSegTrainer", plans_of(one.configuration), one.configuration, 0, regions).plans
    kept = json.loads(json.dumps(plans))
    built = build_recoseg(PlansManager(kept).get_configuration(one.configuration), 2, False)
    assert built.method.foreground.names == ("core", "whole")
    assert built.method.foreground.parents == (1, None)


def test_the_scale_is_the_median_of_the_training_cases_quantiles(trained):
    one, _ = trained
    manifest = export(DATASET, one, device="cpu")
    prepared = prepare(one, residual={"saturation": 0.5})
    values = sorted(manifest.cases[case].quantiles[100] for case in ("c0", "c1", "c2"))
    assert float(prepared.scale(["c0", "c1", "c2"])) == pytest.approx(values[1])


def test_quantiles_are_those_of_the_voxels_of_the_image():
    parts = np.zeros((2, 4, 10, 10), np.float32)
    parts[0, 0], parts[1, 1] = 0.25, 0.5
    image = np.zeros((3, 4, 10, 10), np.float32)
    image[2, :2] = 1
    values = residual_quantiles(parts, image, 8.0)
    assert (quantile(values, 0.0), quantile(values, 0.4), quantile(values, 0.6), values[-1]) == (2.0, 2.0, 4.0, 4.0)
    whole = residual_quantiles(parts, np.zeros_like(image), 8.0)
    assert quantile(whole, 0.4) == 0.0
    assert float(median_quantile({"a": [0.0, 1.0], "b": [0.0, 3.0], "c": [0.0, 9.0]}, 0.5)) == pytest.approx(1.5)
    assert float(median_quantile({"a": [0.0, 0.0]}, 0.5)) > 0


def test_only_a_trained_synthesis_has_a_channel():
    assert synthesised_channel({}) is None
    assert synthesised_channel({"diffrefine": {"method": "bridge", "resolved": {}}}) is None
    assert synthesised_channel({"diffrefine": {"method": "recoseg_synthesis"}}) is None


def test_a_channel_that_is_not_in_standard_deviations_is_refused(folders):
    plans = plans_of()
    plans["configurations"]["3d_fullres"]["normalization_schemes"][0] = "NoNormalization"
    with pytest.raises(NotImplementedError, match="'channel' is 'T1ce'.*NoNormalization"):
        prepare_synthesis(SYNTHESIS.trainer, plans, "3d_fullres", 0, TWO)


def test_a_data_set_of_one_channel_is_refused(folders):
    with pytest.raises(ValueError, match="diffrefine setting 'channel' is 'T1ce'.*dataset.json has MRI"):
        prepare_synthesis(SYNTHESIS.trainer, plans_of(), "3d_fullres", 0, DATASET_JSON)
