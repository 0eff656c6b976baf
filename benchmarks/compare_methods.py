r"""Train every method for the same number of steps on the same out-of-fold priors, and write one table.

python benchmarks/compare_methods.py -d 4 -p nnUNetPlansSmall -f 0 --stage_one nnUNetTrainer_bench1200 --steps 1200 \
    --jobs 2 -o docs/results/methods [--set training.initial_weights=stage_one]

Needs stage one trained with --npz on all folds and exported. Trains what is not trained yet (one process a method,
``OUT/logs``), measures the cost of each (``OUT/cost``), scores, and writes ``OUT.md`` and ``OUT.json``. Run it again to
continue after an interruption. Further systems that are trained already: NAME=TRAINER[@PLANS[@CONFIGURATION]].
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from crossval_table import CrossValidation, score, table
from nnunetv2.paths import nnUNet_preprocessed
from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name
from tqdm import tqdm

from nnunet_diffrefine.config import BLOCK
from nnunet_diffrefine.methods import METHODS
from nnunet_diffrefine.plan_command import parse_changes


class Comparison:
    """The systems to compare and where each stands."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.run = CrossValidation(maybe_convert_to_dataset_name(args.d), args.p, [args.f])
        self.work: Path = args.work or args.o.with_suffix("")
        (self.work / "logs").mkdir(parents=True, exist_ok=True)
        (self.work / "cost").mkdir(exist_ok=True)
        chosen = args.methods or list(METHODS)
        self.refiners = {name: f"{METHODS[name].trainer}_bench{args.steps}" for name in chosen}
        base = f"nnUNetTrainer_bench{args.steps}"
        self.controls = {"second network": f"{base}_second", "stage one trained on": f"{base}_on"}
        if args.no_controls:
            self.controls = {}

    def train(self) -> None:
        """Train what has no validation summary yet and measure its cost, a few at a time."""
        todo = [*self.controls.values(), *self.refiners.values()]
        with ThreadPoolExecutor(self.args.jobs) as pool:
            for _ in tqdm(pool.map(self._train_and_measure, todo), total=len(todo), desc="train", unit="model"):
                pass

    def _train_and_measure(self, trainer: str) -> None:
        if not self._done(trainer):
            self._train(trainer)
        if trainer in self.refiners.values() and self._done(trainer) and not self._cost(trainer).is_file():
            self._measure(trainer, self._cost(trainer))

    def _cost(self, trainer: str) -> Path:
        return self.work / "cost" / f"{trainer}.json"

    def _done(self, trainer: str) -> bool:
        return (self.run.folder(trainer, self.args.f) / "validation" / "summary.json").is_file()

    def _train(self, trainer: str) -> None:
        args, fold = self.args, self.run.folder(trainer, self.args.f)
        command = ["nnUNetv2_train", args.d, "3d_fullres", str(args.f), "-tr", trainer, "-p", args.p, "--npz"]
        command += ["-device", args.device]
        if any(fold.glob("checkpoint_*.pth")):
            command.append("--c")
        elif trainer.endswith("_on"):
            command += ["-pretrained_weights", str(self.run.folder(args.stage_one, args.f) / "checkpoint_final.pth")]
        with (self.work / "logs" / f"{trainer}.log").open("a") as log:
            code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False).returncode
        if code:
            print(f"{trainer} failed ({code}): see {self.work / 'logs' / trainer}.log", file=sys.stderr)

    def costs(self) -> dict[str, dict]:
        """Cost of every refiner that was measured."""
        measured = {name: self._cost(trainer) for name, trainer in self.refiners.items()}
        return {name: json.loads(file.read_text()) for name, file in measured.items() if file.is_file()}

    def _measure(self, trainer: str, file: Path) -> None:
        args = self.args
        command = [sys.executable, str(Path(__file__).with_name("method_cost.py")), "-d", args.d, "-p", args.p]
        command += ["-tr", trainer, "-f", str(args.f), "-device", args.device]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        line = next((x for x in done.stdout.splitlines() if x.startswith("RESULT ")), None)
        if line is None:
            print(f"cost of {trainer} failed:\n{done.stderr[-2000:]}", file=sys.stderr)
            return
        file.write_text(line.removeprefix("RESULT "))

    def systems(self) -> dict[str, str]:
        """All trained systems, and each one averaged with stage one."""
        single = {**self.controls, **dict(pair.split("=", 1) for pair in self.args.systems), **self.refiners}
        single = {name: model for name, model in single.items() if self._done(model)}
        mixed = {f"stage one + {name}": f"{self.args.stage_one}+{model}" for name, model in single.items()}
        return {"stage one": self.args.stage_one, **single, **mixed}


def plans_for_all(dataset: str, source: str, changes: dict) -> str:
    """Copy plans with settings that go over the preset of every method, and return the copy's name."""
    folder = Path(nnUNet_preprocessed.get()) / dataset
    plans = json.loads((folder / f"{source}.json").read_text())
    plans["plans_name"] = name = f"{source}Compared"
    plans["configurations"]["3d_fullres"][BLOCK] = changes
    (folder / f"{name}.json").write_text(json.dumps(plans, indent=4))
    return name


def cost_table(costs: dict[str, dict]) -> str:
    """Markdown: passes, parameters, seconds a case, memory, and the one-step version."""
    lines = [
        "| method | passes | parameters | s / case | x stage one | peak MiB | one step: Dice | HD95 |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, cost in costs.items():
        one = cost.get("one_step")
        short = f"{one['dice']:.2f} | {one['hd95']:.3f}" if one else "as trained | as trained"
        ratio = cost["seconds"] / cost["stage_one_seconds"]
        lines.append(
            f"| {name} | {cost['passes']} | {cost['parameters'] / 1e6:.2f} M | {cost['seconds']:.2f} | {ratio:.2f} | "
            f"{cost['peak_mib']:.0f} | {short} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Train, measure, score, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("systems", nargs="*", help="NAME=TRAINER[@PLANS[@CONFIGURATION]], trained already")
    parser.add_argument("-d", required=True)
    parser.add_argument("-p", default="nnUNetPlans")
    parser.add_argument("-f", type=int, default=0)
    parser.add_argument("-device", default="cpu")
    parser.add_argument("-o", type=Path, required=True, help="file without suffix: OUT.md and OUT.json are written")
    parser.add_argument("--stage_one", required=True, help="trainer of stage one")
    parser.add_argument("--steps", type=int, default=1200, choices=(60, 240, 600, 1200), help="budget of each method")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="settings of all methods")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), help="default: all")
    parser.add_argument("--no_controls", action="store_true", help="neither second network nor training on")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time")
    parser.add_argument("--work", type=Path, help="folder for logs and costs (default: OUT)")
    args = parser.parse_args()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if args.set:
        args.stage_one = args.stage_one if "@" in args.stage_one else f"{args.stage_one}@{args.p}"
        args.p = plans_for_all(maybe_convert_to_dataset_name(args.d), args.p, parse_changes(args.set))
    comparison = Comparison(args)
    comparison.train()
    costs = comparison.costs()
    systems = comparison.systems()
    references = {case: comparison.run.reference(case)[0] for _, case in comparison.run.cases[:3]}
    classes = sorted({int(c) for labels in references.values() for c in set(labels.flat)} - {0})
    rows = score(comparison.run, systems, classes, args.stage_one)
    text = f"{table(rows, classes, 'stage one')}\n\n{cost_table(costs)}\n"
    args.o.with_suffix(".md").write_text(text)
    args.o.with_suffix(".json").write_text(json.dumps({"systems": systems, "scores": rows, "costs": costs}))
    print(text)


if __name__ == "__main__":
    main()
