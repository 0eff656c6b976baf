"""Train methods for two steps, then predict: ``methods_driver.py DATASET CHANNEL,CHANNEL,... METHOD METHOD ...``.

One process for all, because importing nnU-Net takes longer than any of them. Prints one line of JSON a method.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.run.run_training import get_trainer_from_args
from workspace import CONFIGURATION, TINY

from nnunet_diffrefine.methods import METHODS

CPU = torch.device("cpu")


def train(dataset: str, method: str):
    trainer = get_trainer_from_args(dataset, CONFIGURATION, 0, f"{METHODS[method].trainer}_tiny", TINY, device=CPU)
    trainer.run_training()
    return trainer


def predict(folder: str, image: np.ndarray, properties: dict) -> tuple[np.ndarray, nnUNetPredictor]:
    predictor = nnUNetPredictor(device=CPU, allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(folder, (0,), "checkpoint_final.pth")
    return predictor.predict_single_npy_array(image, properties), predictor


def best_thresholds(trainer) -> list[float] | None:
    file = Path(trainer.output_folder) / "checkpoint_best.pth"
    weights = torch.load(file, map_location="cpu", weights_only=False)["network_weights"]
    return weights["thresholds"].tolist() if "thresholds" in weights else None


def main() -> None:
    dataset, *methods = sys.argv[1:2] + sys.argv[3:]
    channels = sys.argv[2].split(",")
    image, properties = SimpleITKIO().read_images(channels)
    for method in methods:
        trainer = train(dataset, method)
        segmentation, predictor = predict(trainer.output_folder_base, image, properties)
        weights = predictor.list_of_parameters[0]
        thresholds = weights["thresholds"].tolist() if "thresholds" in weights else None
        seen = {
            "method": method,
            "labels": sorted(int(v) for v in np.unique(segmentation)),
            "shape": list(segmentation.shape),
            "trained_on": len(trainer.do_split()[0]),
            "held_out": len(trainer.calibration_cases),
            "thresholds": thresholds,
            "best_has_them": best_thresholds(trainer) == thresholds,
            "finite": all(bool(torch.isfinite(v).all()) for k, v in weights.items() if k != "thresholds"),
        }
        print("SEEN " + json.dumps(seen), flush=True)


if __name__ == "__main__":
    main()
