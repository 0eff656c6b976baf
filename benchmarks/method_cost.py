"""What a trained method costs at prediction, and what its sampler is worth, in one process; prints one line of JSON.

python benchmarks/method_cost.py -d 4 -p nnUNetPlansSmall -tr DiffRefineTrainer_DMCIE_bench1200 -f 0 [--cases 5]

Network passes per window, parameters (refiner; stage one), seconds a case beside stage one's own (in turn, mirrored as
nnU-Net does it), growth of memory, and Dice and HD95 of the validation cases, in preprocessed geometry, of the
settings as trained and of one step with one seed.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from metrics import dice, hd95
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.paths import nnUNet_preprocessed, nnUNet_results
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name
from torch import Tensor

from nnunet_diffrefine.data import PriorDataset
from nnunet_diffrefine.inference.volume import GivenPrior, references, whole
from nnunet_diffrefine.networks.refinement import mirrored_mean
from nnunet_diffrefine.paths import StageOneId, export_folder
from nnunet_diffrefine.plans import read_block
from nnunet_diffrefine.stage_one.store import PriorStore


class Model:
    """A trained refiner fold, its validation cases, and stage one alone."""

    def __init__(self, args: argparse.Namespace) -> None:
        dataset = maybe_convert_to_dataset_name(args.d)
        folder = Path(nnUNet_results.get()) / dataset / StageOneId(args.tr, args.p, "3d_fullres").name
        self.predictor = nnUNetPredictor(use_mirroring=False, device=torch.device(args.device), allow_tqdm=False)
        self.predictor.initialize_from_trained_model_folder(str(folder), (args.f,), "checkpoint_final.pth")
        self.predictor.network.load_state_dict(self.predictor.list_of_parameters[0])
        self.network = self.predictor.network.eval()
        preprocessed = Path(nnUNet_preprocessed.get()) / dataset
        data = str(preprocessed / self.predictor.configuration_manager.data_identifier)
        self.cases = json.loads((preprocessed / "splits_final.json").read_text())[args.f]["val"]
        self.data = infer_dataset_class(data)(data, list(self.cases))
        record = read_block(self.predictor.configuration_manager.configuration)[1].stage_one
        stage_one = StageOneId(record["trainer"], record["plans"], record["configuration"])
        self.given = PriorDataset(self.data, PriorStore(export_folder(dataset, stage_one)))

    def run(self, module: torch.nn.Module, case: str) -> Tensor:
        """Logits (1, H, D, H, W) of a preprocessed case."""
        self.predictor.network = module
        image = torch.from_numpy(self.data.load_case(case)[0][:])
        return self.predictor.predict_sliding_window_return_logits(image)[None].float()

    def seconds(self, cases: int) -> tuple[float, float]:
        """Median seconds a case of the refiner and of stage one mirrored eight times, measured in turn."""
        stage_one = _StageOne(self.network)
        times: dict[str, list[float]] = {"refiner": [], "stage one": []}
        for case in self.cases[:cases]:
            for name, module in (("refiner", self.network), ("stage one", stage_one)):
                began = time.perf_counter()
                self.run(module, case)
                times[name].append(time.perf_counter() - began)
        return statistics.median(times["refiner"]), statistics.median(times["stage one"])

    def passes(self) -> int:
        """Denoiser passes for one window with foreground; seeds in one batch count one each."""
        calls: list[int] = []
        hook = self.network.denoiser.register_forward_hook(lambda _, inputs, __: calls.append(len(inputs[0])))
        image = torch.from_numpy(self.data.load_case(self.cases[0])[0][:])[None]
        patch = tuple(self.predictor.configuration_manager.patch_size)
        window = torch.nn.functional.interpolate(image, patch).to(self.predictor.device)
        prior = torch.full((1, self.network.foreground.channels, *patch), 0.4, device=window.device)
        with torch.no_grad():
            self.network.refine_window(window, prior)
        hook.remove()
        return sum(calls)

    def scores(self) -> dict[str, float]:
        """Mean Dice in % and HD95 in mm over the validation cases and classes, from their exported priors."""
        rows, self.predictor.network = [], GivenPrior(self.network)
        for case in self.cases:
            logits = self.predictor.predict_sliding_window_return_logits(whole(self.given.load_case(case)[0]))
            decided = self.network.foreground.decide(logits[None].float())[0].numpy() > 0
            reference, _ = references(np.asarray(self.data.load_case(case)[1][:]), self.predictor.label_manager)
            spacing = tuple(self.predictor.configuration_manager.spacing)
            pairs = list(zip(decided, reference.numpy(), strict=True))
            rows.append([[dice(p, r) for p, r in pairs], [hd95(p, r, spacing) for p, r in pairs]])
        mean = np.nanmean(np.array(rows), (0, 2))
        return {"dice": 100 * float(mean[0]), "hd95": float(mean[1])}

    def shortened(self) -> None:
        """One step, one seed from now on."""
        method = self.network.method
        method.config = replace(method.config, sampling=replace(method.config.sampling, steps=1, samples=1))


class _StageOne(torch.nn.Module):
    def __init__(self, network) -> None:  # noqa: ANN001
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        # Mirrored as nnU-Net does it, also where a method that does not look at the prior does without.
        return mirrored_mean(self.network.stage_one, self.network.refiner_axes, x)


def main() -> None:
    """Measure and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-d", required=True)
    parser.add_argument("-p", default="nnUNetPlans")
    parser.add_argument("-tr", required=True)
    parser.add_argument("-f", type=int, default=0)
    parser.add_argument("-device", default="cpu")
    parser.add_argument("--cases", type=int, default=5, help="cases that are timed")
    args = parser.parse_args()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    model = Model(args)
    refiner, stage_one = model.seconds(args.cases)
    result = {
        "passes": model.passes(),
        "parameters": sum(p.numel() for p in model.network.denoiser.parameters()),
        "stage_one_parameters": sum(p.numel() for p in model.network.stage_one.parameters()),
        "seconds": refiner,
        "stage_one_seconds": stage_one,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before,
    }
    sampling = model.network.method.config.sampling
    if (sampling.steps, sampling.samples) != (1, 1):
        model.shortened()
        result["one_step"] = model.scores()
    print("RESULT " + json.dumps(result))


if __name__ == "__main__":
    main()
