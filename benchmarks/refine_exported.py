r"""Refine the exported whole-volume priors of a fold's validation cases under several sampling settings.

python benchmarks/refine_exported.py -d 4 -p nnUNetPlansSmall -tr DiffRefineTrainer_bench1200 -f 0 \
    "1 step=" "2 steps=sampling.steps=2" "half=sampling.stage_one_weight=0.5" --window

Answers two questions cheaply, because stage one need not run: do more steps, mirroring or averaging help; and
(--window) what does it cost that prediction sees priors of single windows while training saw those of whole volumes.
Dice and HD95 are computed in preprocessed geometry against the preprocessed reference.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from metrics import dice, hd95
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.paths import nnUNet_preprocessed, nnUNet_results
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name
from torch import nn
from tqdm import tqdm

from nnunet_diffrefine.config import RefineConfig
from nnunet_diffrefine.data import PriorDataset
from nnunet_diffrefine.inference.volume import GivenPrior, references, whole
from nnunet_diffrefine.networks.refinement import RefinementNetwork
from nnunet_diffrefine.paths import StageOneId, export_folder
from nnunet_diffrefine.plan_command import parse_changes
from nnunet_diffrefine.plans import merge, read_block
from nnunet_diffrefine.stage_one.store import PriorStore


def with_settings(network: RefinementNetwork, config: RefineConfig) -> RefinementNetwork:
    """Give a trained network other sampling settings."""
    network.sampling, network.method.config = config.sampling, config
    return network


def main() -> None:
    """Read the arguments, refine, print one line a setting."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variants", nargs="+", help="NAME=KEY=VALUE,KEY=VALUE (nothing after NAME= for the default)")
    parser.add_argument("-d", required=True)
    parser.add_argument("-p", default="nnUNetPlans")
    parser.add_argument("-tr", default="DiffRefineTrainer")
    parser.add_argument("-f", type=int, default=0)
    parser.add_argument("-device", default="cpu")
    parser.add_argument("--window", action="store_true", help="also the network as users get it, with window priors")
    parser.add_argument("--cases", type=int, help="only the first so many cases")
    args = parser.parse_args()
    dataset = maybe_convert_to_dataset_name(args.d)
    model = Path(nnUNet_results.get()) / dataset / StageOneId(args.tr, args.p, "3d_fullres").name
    predictor = nnUNetPredictor(use_mirroring=False, device=torch.device(args.device), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(model), (args.f,), "checkpoint_final.pth")
    config, resolved = read_block(predictor.configuration_manager.configuration)
    preprocessed = Path(nnUNet_preprocessed.get()) / dataset
    folder = preprocessed / predictor.configuration_manager.data_identifier
    cases = json.loads((preprocessed / "splits_final.json").read_text())[args.f]["val"][: args.cases]
    record = resolved.stage_one
    store = PriorStore(export_folder(dataset, StageOneId(record["trainer"], record["plans"], record["configuration"])))
    data = PriorDataset(infer_dataset_class(str(folder))(str(folder), list(cases)), store)
    network = predictor.network
    spacing = tuple(predictor.configuration_manager.spacing)

    def evaluate(name: str, module: nn.Module, channels: int | None) -> None:
        predictor.network = module
        scores = [
            _score(predictor, data.load_case(case), channels, resolved.channels(), spacing) for case in tqdm(cases)
        ]
        values = np.array(scores)
        mean_dice, mean_hd = 100 * np.nanmean(values[:, 0]), np.nanmean(values[:, 1])
        print(f"{name}: mean Dice {mean_dice:.2f}, mean HD95 {mean_hd:.3f}", flush=True)

    for variant in args.variants:
        name, _, pairs = variant.partition("=")
        changed = RefineConfig.from_dict(merge(config.to_dict(), parse_changes([p for p in pairs.split(",") if p])))
        evaluate(name, GivenPrior(with_settings(network, changed)), None)
    if args.window:
        channels = len(predictor.dataset_json["channel_names"])
        evaluate("window priors, default", with_settings(network, config), channels)


def _score(predictor, case, channels, foreground, spacing):  # noqa: ANN001, ANN202
    data, segmentation, _, _ = case
    x = whole(data)
    logits = predictor.predict_sliding_window_return_logits(x[:channels])[None].float()
    decided = foreground.decide(logits)[0].numpy() > 0
    reference = references(np.asarray(segmentation[:]), predictor.label_manager)[0].numpy()
    return [
        [dice(p, r) for p, r in zip(decided, reference, strict=True)],
        [hd95(p, r, spacing) for p, r in zip(decided, reference, strict=True)],
    ]


if __name__ == "__main__":
    main()
