r"""Link a raw dataset into ``nnUNet_raw`` with some labelled cases set aside: no fold ever sees them.

python benchmarks/set_aside.py ../shared/data/Dataset004_Hippocampus --every 10

Every tenth case, in the order of names, goes to ``imagesTs`` and ``labelsTs``; the others stay training cases.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from nnunetv2.paths import nnUNet_raw


def link(source: Path, target: Path, every: int) -> tuple[int, int]:
    """Link images and labels of the dataset at ``source``; return how many cases were kept and set aside.

    Raises:
        SystemExit: the target holds files that would not be put there so.
    """
    dataset = json.loads((source / "dataset.json").read_text())
    cases = sorted(file.name.removesuffix(dataset["file_ending"]) for file in (source / "labelsTr").iterdir())
    aside = set(cases[every - 1 :: every])
    links = {}
    for kind in ("images", "labels"):
        for file in (source / f"{kind}Tr").iterdir():
            case = file.name.removesuffix(dataset["file_ending"])
            case = case if kind == "labels" else case.rsplit("_", 1)[0]
            links[target / f"{kind}{'Ts' if case in aside else 'Tr'}" / file.name] = file.resolve()
    folders = [target / f"{kind}{split}" for kind in ("images", "labels") for split in ("Tr", "Ts")]
    _refuse_others(folders, links, every)
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    for new, file in links.items():
        if not new.exists():
            new.symlink_to(file)
    dataset["numTraining"] = len(cases) - len(aside)
    (target / "dataset.json").write_text(json.dumps(dataset, indent=1))
    return len(cases) - len(aside), len(aside)


def _refuse_others(folders: list[Path], links: dict[Path, Path], every: int) -> None:
    """Links of another choice beside these would put cases that were set aside into the training."""
    for folder in folders:
        there = sorted(folder.iterdir()) if folder.is_dir() else []
        if other := [file.name for file in there if links.get(file) != file.resolve()]:
            raise SystemExit(f"{folder} holds {len(other)} file(s) that --every {every} would not link there, such as "
                             f"{other[0]}. Use another nnUNet_raw, or move {folder.parent} away first.")  # fmt: skip


def main() -> None:
    """Read the arguments and link."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="folder of a raw nnU-Net dataset with labels")
    parser.add_argument("--every", type=int, default=10)
    args = parser.parse_args()
    target = Path(nnUNet_raw.get()) / args.source.name
    kept, aside = link(args.source, target, args.every)
    print(f"{target}: {kept} training cases, {aside} set aside in imagesTs and labelsTs")


if __name__ == "__main__":
    main()
