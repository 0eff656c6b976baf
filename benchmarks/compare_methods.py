r"""Train every method for the same number of steps on the same out-of-fold priors, and write one table.

python benchmarks/compare_methods.py "bridge, surface loss=bridge:error.surface=0.5" \
    "2d=nnUNetTrainerAdam_bench2400@nnUNetPlansBench2d@2d" -d 4 -p nnUNetPlansBench -f 0 --steps 600 --jobs 2 \
    --stage_one nnUNetTrainerAdam_bench2400 -o docs/results/methods --set training.initial_weights=stage_one

Needs stage one trained with --npz on all folds and exported. Trains what is not trained yet (one process a system,
``OUT/logs``), measures the cost of each refiner (``OUT/cost``), scores, and writes ``OUT.md`` and ``OUT.json``. Run it
again to continue after an interruption.

Beside every method: stage one trained on for the same budget, at a tenth of its learning rate (the bar) and at its own,
and a second network with stage one's own budget. Further systems are a method with other settings,
NAME=METHOD:KEY=VALUE,... or any trainer, NAME=TRAINER[@PLANS[@CONFIGURATION]].
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from comparison_table import comparison_table, cost_table
from crossval_table import CrossValidation, score
from nnunetv2.paths import nnUNet_preprocessed
from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name
from tqdm import tqdm

from nnunet_diffrefine.config import BLOCK, ConfigError, RefineConfig
from nnunet_diffrefine.methods import METHODS
from nnunet_diffrefine.plan_command import parse_changes
from nnunet_diffrefine.plans import merge, shipped_settings
from nnunet_diffrefine.stage_one.manifest import write_atomically

BAR, FAST, SECOND = "stage one trained on", "the same at stage one's learning rate", "second network"


@dataclass(frozen=True)
class System:
    """Something to train and score.

    Attributes:
        name: in the table.
        model: TRAINER@PLANS@CONFIGURATION.
        refiner: whether it is one, so that its cost is measured.
        start: checkpoint that a control trains on from.
    """

    name: str
    model: str
    refiner: bool = False
    start: Path | None = None


class Comparison:
    """The systems to compare and where each stands."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.dataset = maybe_convert_to_dataset_name(args.d)
        self.run = CrossValidation(self.dataset, args.p, [args.f])
        self.work: Path = args.work or args.o.with_suffix("")
        for part in ("logs", "cost"):
            (self.work / part).mkdir(parents=True, exist_ok=True)
        common = parse_changes(args.set)
        refiners = [self._refiner(name, name, common) for name in (METHODS if args.methods is None else args.methods)]
        self.systems = [*self._controls(), *refiners, *(self._further(pair, common) for pair in args.systems)]

    def _controls(self) -> list[System]:
        if self.args.no_controls:
            return []
        stage_one, extra = self.args.stage_one, f"{self.args.stage_one.rsplit('_bench', 1)[0]}_bench{self.args.steps}"
        start = self.run.folder(stage_one, self.args.f) / "checkpoint_final.pth"
        end = f"@{self.args.p}@3d_fullres"
        on = [System(BAR, f"{extra}_on_tenth{end}", start=start), System(FAST, f"{extra}_on{end}", start=start)]
        return [*on, System(SECOND, f"{stage_one}_second{end}")]

    def _further(self, pair: str, common: dict) -> System:
        name, _, model = pair.partition("=")
        method, _, changes = model.partition(":")
        if method in METHODS:
            return self._refiner(name, method, merge(common, parse_changes(changes.split(","))))
        return System(name, "@".join(self.run.parts(model)))

    def _refiner(self, name: str, method: str, changes: dict) -> System:
        try:
            RefineConfig.from_dict(merge(shipped_settings(method, changes), changes))
        except ConfigError as error:
            print(f"{name} keeps its preset: {error}", file=sys.stderr)
            changes = {}
        plans = self._plans(name, changes) if changes else self.args.p
        return System(name, f"{METHODS[method].trainer}_bench{self.args.steps}@{plans}@3d_fullres", refiner=True)

    def _plans(self, name: str, changes: dict) -> str:
        """Plans whose settings go over the preset of the method; those of an earlier run must have the same."""
        own = "Compared" if name in METHODS else "_" + "".join(c for c in name if c.isalnum())
        target = f"{self.args.p}{own}"
        folder = Path(nnUNet_preprocessed.get()) / self.dataset
        plans = json.loads((folder / f"{self.args.p}.json").read_text())
        plans["plans_name"], plans["configurations"]["3d_fullres"][BLOCK] = target, changes
        file = folder / f"{target}.json"
        if not file.exists():
            write_atomically(file, json.dumps(plans, indent=4).encode())
        earlier = json.loads(file.read_text())["configurations"]["3d_fullres"].get(BLOCK)
        if earlier != changes:
            raise SystemExit(f"{file} has settings {earlier}, but {name} wants {changes}: models of the old ones would "
                             "be shown as new. Give the system another NAME (other --set: another -p), or delete the "
                             "file and what was trained with it.")  # fmt: skip
        return target

    def train(self) -> None:
        """Train what has no validation summary yet and measure its cost, a few at a time."""
        with ThreadPoolExecutor(self.args.jobs) as pool:
            work = pool.map(self._train_and_measure, self.systems)
            for _ in tqdm(work, total=len(self.systems), desc="train", unit="model"):
                pass

    def _train_and_measure(self, system: System) -> None:
        if not self.done(system):
            self._train(system)
        if system.refiner and self.done(system) and not self.cost(system).is_file():
            self._measure(system)

    def cost(self, system: System) -> Path:
        """Where its cost is kept."""
        return self.work / "cost" / f"{system.model}.json"

    def done(self, system: System) -> bool:
        """Whether its validation is."""
        return (self.run.folder(system.model, self.args.f) / "validation" / "summary.json").is_file()

    def _train(self, system: System) -> None:
        trainer, plans, configuration = system.model.split("@")
        command = ["nnUNetv2_train", self.args.d, configuration, str(self.args.f), "-tr", trainer, "-p", plans]
        command += ["--npz", "-device", self.args.device]
        if any(self.run.folder(system.model, self.args.f).glob("checkpoint_*.pth")):
            command.append("--c")
        environment = {**os.environ, "DIFFREFINE_BENCH_START": str(system.start)}
        file = self.work / "logs" / f"{system.model}.log"
        with file.open("a") as log:
            done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False, env=environment)
        if done.returncode:
            print(f"{system.name} failed ({done.returncode}): see {file}", file=sys.stderr)

    def _measure(self, system: System) -> None:
        trainer, plans, _ = system.model.split("@")
        command = [sys.executable, str(Path(__file__).with_name("method_cost.py")), "-d", self.args.d, "-p", plans]
        command += ["-tr", trainer, "-f", str(self.args.f), "-device", self.args.device]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        line = next((x for x in done.stdout.splitlines() if x.startswith("RESULT ")), None)
        if line is None:
            print(f"cost of {system.name} failed:\n{done.stderr[-2000:]}", file=sys.stderr)
            return
        self.cost(system).write_text(line.removeprefix("RESULT "))

    def scores(self) -> dict[str, dict]:
        """Scores of all that is trained, alone and (``"+"`` before the name) averaged with stage one."""
        stage_one = self.args.stage_one
        models = {system.name: system.model for system in self.systems if self.done(system)}
        averaged = {f"+{name}": f"{stage_one}+{model}" for name, model in models.items()}
        return score(self.run, {"stage one": stage_one, **models, **averaged}, stage_one)

    def costs(self) -> dict[str, dict]:
        """Cost of every refiner that was measured."""
        files = {system.name: self.cost(system) for system in self.systems}
        return {name: json.loads(file.read_text()) for name, file in files.items() if file.is_file()}


def arguments() -> argparse.Namespace:
    """Of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("systems", nargs="*", help="NAME=METHOD:KEY=VALUE,... or NAME=TRAINER[@PLANS[@CONFIGURATION]]")
    parser.add_argument("-d", required=True)
    parser.add_argument("-p", default="nnUNetPlans")
    parser.add_argument("-f", type=int, default=0)
    parser.add_argument("-device", default="cpu")
    parser.add_argument("-o", type=Path, required=True, help="file without suffix: OUT.md and OUT.json are written")
    parser.add_argument("--stage_one", required=True, help="trainer of stage one, NAME_benchSTEPS")
    parser.add_argument("--steps", type=int, default=1200, choices=(60, 240, 480, 600, 1200), help="of each refiner")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="settings of all methods")
    parser.add_argument("--methods", nargs="*", choices=list(METHODS), help="default: all")
    parser.add_argument("--no_controls", action="store_true", help="neither second network nor training on")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time")
    parser.add_argument("--table", action="store_true", help="train nothing: the table of what is trained")
    parser.add_argument("--work", type=Path, help="folder for logs and costs (default: OUT)")
    return parser.parse_args()


def main() -> None:
    """Train, measure, score, write."""
    args = arguments()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    comparison = Comparison(args)
    if not args.table:
        comparison.train()
    rows, costs = comparison.scores(), comparison.costs()
    bar = BAR if BAR in rows else "stage one"
    text = f"{comparison_table(rows, comparison.run.names, 'stage one', bar)}\n\n{cost_table(costs)}\n"
    args.o.with_suffix(".md").write_text(text)
    models = {system.name: system.model for system in comparison.systems}
    args.o.with_suffix(".json").write_text(json.dumps({"systems": models, "scores": rows, "costs": costs}))
    print(text)


if __name__ == "__main__":
    main()
