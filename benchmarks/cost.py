"""Cost of the refiner as ratios to stage one, in one run: training step, peak memory, prediction of a case.

python benchmarks/cost.py -d 4 -p nnUNetPlansSmall -tr DiffRefineTrainer_bench1200 -f 0 [-device cpu] [--repeats 10]

Needs a trained refiner fold. Steps of both are timed in turn (A B A B ...), so that a drifting machine hits both alike;
peak memory is that of a fresh process for each (CPU: resident set; CUDA: allocated).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import statistics
import time
from pathlib import Path

import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.paths import nnUNet_preprocessed, nnUNet_results
from nnunetv2.run.run_training import get_trainer_from_args
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name

from nnunet_diffrefine.paths import StageOneId
from nnunet_diffrefine.plans import read_block


def load_trainer(trainer: str, args: argparse.Namespace):  # noqa: ANN201 (nnU-Net's trainer)
    """An initialised trainer; the checkpoint folder is not touched."""
    instance = get_trainer_from_args(args.d, "3d_fullres", args.f, trainer, args.p, True, torch.device(args.device))
    instance.initialize()
    instance.set_deep_supervision_enabled(instance.enable_deep_supervision)
    instance.network.train()
    if hasattr(instance, "generator"):
        instance.generator.manual_seed(0)
    return instance


def random_batch(trainer, prior_channels: int) -> dict:  # noqa: ANN001
    """A batch of the shapes that the loader delivers."""
    size, patch = trainer.batch_size, trainer.configuration_manager.patch_size
    data = torch.rand(size, trainer.num_input_channels + prior_channels, *patch)
    heads, regions = trainer.label_manager.num_segmentation_heads, trainer.label_manager.has_regions
    scales = trainer._get_deep_supervision_scales() or [[1] * len(patch)]
    targets = []
    for scale in scales:
        shape = [round(p * s) for p, s in zip(patch, scale, strict=True)]
        labels = torch.randint(0, heads, (size, 1, *shape))
        targets.append(torch.rand(size, heads, *shape) > 0.5 if regions else labels)
    return {"data": data, "target": targets if trainer.enable_deep_supervision else targets[0]}


def peak_memory(trainer: str, args: argparse.Namespace, prior_channels: int, queue) -> None:  # noqa: ANN001
    """Put the growth of memory over three training steps, in MiB."""
    instance = load_trainer(trainer, args)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    batch = random_batch(instance, prior_channels)
    for _ in range(3):
        instance.train_step(batch)
    if args.device == "cuda":
        queue.put(torch.cuda.max_memory_allocated() / 2**20)
    else:
        queue.put(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before)


def step_times(trainers: dict, repeats: int) -> dict[str, float]:
    """Median seconds of a training step of each trainer, in turn."""
    times: dict[str, list[float]] = {name: [] for name in trainers}
    for i in range(repeats + 2):
        for name, (trainer, batch) in trainers.items():
            began = time.perf_counter()
            trainer.train_step(batch)
            if trainer.device.type == "cuda":
                torch.cuda.synchronize()
            if i >= 2:
                times[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in times.items()}


def prediction_times(models: dict[str, Path], args: argparse.Namespace) -> dict[str, float]:
    """Median seconds to predict a preprocessed validation case, mirroring as nnU-Net does it, in turn."""
    predictors = {}
    for name, folder in models.items():
        predictors[name] = nnUNetPredictor(device=torch.device(args.device), allow_tqdm=False)
        predictors[name].initialize_from_trained_model_folder(str(folder), (args.f,), "checkpoint_final.pth")
    preprocessed = Path(nnUNet_preprocessed.get()) / maybe_convert_to_dataset_name(args.d)
    data_folder = str(preprocessed / predictors["refined"].configuration_manager.data_identifier)
    cases = json.loads((preprocessed / "splits_final.json").read_text())[args.f]["val"][: args.cases]
    dataset = infer_dataset_class(data_folder)(data_folder, list(cases))
    times: dict[str, list[float]] = {name: [] for name in models}
    for case in cases:
        image = torch.from_numpy(dataset.load_case(case)[0][:])
        for name, predictor in predictors.items():
            began = time.perf_counter()
            predictor.predict_logits_from_preprocessed_data(image)
            times[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    """Measure and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-d", required=True)
    parser.add_argument("-p", default="nnUNetPlans")
    parser.add_argument("-tr", default="DiffRefineTrainer")
    parser.add_argument("-f", type=int, default=0)
    parser.add_argument("-device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--cases", type=int, default=5)
    args = parser.parse_args()
    dataset = maybe_convert_to_dataset_name(args.d)
    model = Path(nnUNet_results.get()) / dataset / StageOneId(args.tr, args.p, "3d_fullres").name
    plans = json.loads((model / "plans.json").read_text())
    _, resolved = read_block(plans["configurations"]["3d_fullres"])
    names = {"stage one": resolved.stage_one["trainer"], "refined": args.tr}
    channels = {"stage one": 0, "refined": resolved.channels().channels}
    memory = {}
    context = multiprocessing.get_context("spawn")
    for name, trainer in names.items():
        queue = context.Queue()
        process = context.Process(target=peak_memory, args=(trainer, args, channels[name], queue))
        process.start()
        memory[name] = queue.get()
        process.join()
    loaded = {name: load_trainer(trainer, args) for name, trainer in names.items()}
    steps = step_times({n: (t, random_batch(t, channels[n])) for n, t in loaded.items()}, args.repeats)
    folders = {"stage one": model.parent / StageOneId(names["stage one"], args.p, "3d_fullres").name, "refined": model}
    predictions = prediction_times(folders, args)
    print("\n| | stage one | refiner | ratio |\n| --- | ---: | ---: | ---: |")
    for title, values, unit in (
        ("training step", steps, "s"),
        ("memory of a training step", memory, "MiB"),
        ("prediction of a case", predictions, "s"),
    ):
        one, two = values["stage one"], values["refined"]
        print(f"| {title} | {one:.3g} {unit} | {two:.3g} {unit} | {two / one:.2f} |")


if __name__ == "__main__":
    main()
