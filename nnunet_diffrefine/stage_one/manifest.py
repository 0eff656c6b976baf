"""The manifest of an out-of-fold export: which model predicted which case, from what, and the files' fingerprints.

``manifest.json`` lies beside the priors. It is rewritten as a whole after every case (temporary file, then
``os.replace``) and only under a file lock, so several processes may export at once and a crash loses one case at most.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dacite
from filelock import FileLock

from nnunet_diffrefine.paths import MANIFEST, StageOneId
from nnunet_diffrefine.stage_one.mending import export_command

if TYPE_CHECKING:
    from nnunet_diffrefine.batch import Foreground

FORMAT = 1
LOCK = "manifest.lock"


@dataclass(frozen=True)
class FoldRecord:
    """The checkpoint that predicted a fold's validation cases: file name, SHA-256 and size in bytes."""

    checkpoint: str
    sha256: str
    bytes: int


@dataclass(frozen=True)
class CaseRecord:
    """One stored prior: the fold that predicted it, its shape [R, D, H, W], SHA-256 and size in bytes of its file.

    Of a residual, also its quantiles in standard deviations, evenly spread from 0 to 1, over the voxels of the image.
    """

    fold: int | str
    shape: list[int]
    sha256: str
    bytes: int
    quantiles: list[float] | None = None


@dataclass(frozen=True)
class ModelRecord:
    """Stage one, and what it takes to rebuild and run its network.

    Attributes:
        trainer: nnU-Net trainer class name.
        plans: plans identifier.
        configuration: configuration name.
        builder: name of the class that defines the trainer's ``build_network_architecture``.
        architecture: the configuration's ``architecture`` block.
        mirror_axes: spatial axes of nnU-Net's mirroring at inference, or None.
        tile_step_size: sliding window step as a share of the patch.
    """

    trainer: str
    plans: str
    configuration: str
    builder: str
    architecture: dict[str, Any]
    mirror_axes: list[int] | None
    tile_step_size: float

    @property
    def stage_one(self) -> StageOneId:
        """Trainer, plans and configuration."""
        return StageOneId(self.trainer, self.plans, self.configuration)


@dataclass(frozen=True)
class ChannelRecord:
    """The image channel whose synthesis an export holds instead of priors.

    Each case then has two channels in [0, 1]: by how much the synthetic channel exceeds the real one and by how much
    it falls short, in units of ``maximum``, above which differences are clipped.

    Attributes:
        name: of the channel in ``dataset.json``.
        index: of the channel among the image channels.
        image_channels: number of image channels, this one included.
        maximum: largest stored difference, in standard deviations of the preprocessed channel; 255 levels cover it.
        settings: of the synthesis, the trainer's ``diffrefine`` block.
    """

    name: str
    index: int
    image_channels: int
    maximum: float
    settings: dict[str, Any]


@dataclass(frozen=True)
class ForegroundRecord:
    """What the R channels of a prior mean; ``labels`` for label datasets, ``regions`` for region datasets."""

    names: list[str]
    exclusive: bool
    ignore_label: int | None
    labels: list[int] | None = None
    regions: list[list[int]] | None = None

    @property
    def foreground(self) -> Foreground:
        """The same as the value that travels through training."""
        from nnunet_diffrefine.batch import Foreground  # imports torch, which takes seconds; a manifest needs none

        return Foreground(tuple(self.names), self.exclusive, self.ignore_label)

    @classmethod
    def from_dataset_json(cls, dataset_json: Mapping[str, Any]) -> ForegroundRecord:
        """Read nnU-Net's ``dataset.json``: labels in ascending order of their value, regions in the file's order."""
        values = {name: _values(value) for name, value in dataset_json["labels"].items()}
        ignore = values.pop("ignore", [None])[0]
        inside = {name: value for name, value in values.items() if value != [0]}
        if any(len(value) > 1 for value in inside.values()):
            return cls(list(inside), False, ignore, regions=list(inside.values()))
        names = sorted(inside, key=lambda name: inside[name])
        return cls(names, True, ignore, labels=[inside[name][0] for name in names])


def _values(value: int | Sequence[int]) -> list[Any]:
    """The label values that a class or region unites, each once, in the file's order."""
    members = [value] if isinstance(value, int) else value
    return list(dict.fromkeys(int(member) for member in members))


@dataclass(frozen=True)
class Manifest:
    """Everything known about an export; see the module's text. ``folds`` and ``cases`` grow while it runs.

    ``channel`` is set for the export of a synthesis, and None for that of a segmentation.
    """

    dataset: str
    stage_one: ModelRecord
    data_identifier: str
    preprocessing_sha256: str
    splits_sha256: str
    foreground: ForegroundRecord
    nnunetv2: str
    folds: dict[int | str, FoldRecord] = field(default_factory=dict)
    cases: dict[str, CaseRecord] = field(default_factory=dict)
    channel: ChannelRecord | None = None
    format: int = FORMAT

    @property
    def channels(self) -> list[str]:
        """What each stored channel of a case is."""
        if self.channel is not None:
            return [f"{self.channel.name} {part}" for part in ("excess", "deficit")]
        return self.foreground.names

    def same_source(self, other: Manifest) -> bool:
        """Whether both were made from the same data, splits and model; folds, cases and nnU-Net's version aside."""
        return replace(self, folds={}, cases={}) == replace(other, folds={}, cases={}, nnunetv2=self.nnunetv2)

    def with_fold(self, fold: int, record: FoldRecord) -> Manifest:
        """Enter a fold's checkpoint; cases that another checkpoint of this fold predicted are dropped."""
        if self.folds.get(fold) == record:
            return self
        cases = {name: case for name, case in self.cases.items() if case.fold != fold}
        return replace(self, folds={**self.folds, fold: record}, cases=cases)

    def with_case(self, name: str, record: CaseRecord) -> Manifest:
        """Enter a case, replacing what was known about it."""
        return replace(self, cases={**self.cases, name: record})

    def to_json(self) -> str:
        """The file's text; what only a synthesis has is left out elsewhere."""
        values = {"format": self.format, **asdict(self)}
        for record, key in ((values, "channel"), *((case, "quantiles") for case in values["cases"].values())):
            if record[key] is None:
                del record[key]
        return json.dumps(values, indent=1)

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read ``folder/manifest.json``.

        Raises:
            RuntimeError: the file is missing, no valid JSON, has a key twice or a foreign format; the message names
                the command that mends it.
        """
        path = folder / MANIFEST
        if not path.is_file():
            raise RuntimeError(f"No out-of-fold export: {path} does not exist. Make it: {_command(folder)}")
        try:
            values = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_unique_keys)
            if not isinstance(values, dict) or values.get("format") != FORMAT:
                found = values.get("format") if isinstance(values, dict) else None
                raise ValueError(f"its format is {found!r}, this version reads {FORMAT}")
            values["folds"] = {_fold(key): record for key, record in values.get("folds", {}).items()}
            return dacite.from_dict(cls, values, dacite.Config(strict=True))
        except (ValueError, AttributeError, dacite.DaciteError) as error:
            raise RuntimeError(
                f"Cannot use {path}: {error}. Delete it and export again: rm '{path}' && {_command(folder)}"
            ) from error

    def write(self, folder: Path) -> None:
        """Write ``folder/manifest.json`` atomically."""
        write_atomically(folder / MANIFEST, self.to_json().encode())


def update(folder: Path, change: Callable[[Manifest | None], Manifest]) -> Manifest:
    """Read, change and write the manifest of ``folder`` under its lock; ``change`` gets None where there is none yet.

    Raises:
        RuntimeError: the manifest on disk is broken.
    """
    with FileLock(folder / LOCK):
        before = Manifest.read(folder) if (folder / MANIFEST).is_file() else None
        after = change(before)
        if after is not before:
            after.write(folder)
    return after


def write_atomically(path: Path, content: bytes) -> None:
    """Write ``content`` to ``path`` so that readers see the old file or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    if twice := sorted({key for key in keys if keys.count(key) > 1}):
        raise ValueError(f"key(s) {', '.join(twice)} appear more than once")
    return dict(pairs)


def _fold(key: str) -> int | str:
    return key if key == "all" else int(key)


def _command(folder: Path) -> str:
    """The export command of the folder ``nnUNet_preprocessed/DATASET/diffrefine/TRAINER__PLANS__CONFIG``."""
    try:
        return export_command(folder.parents[1].name, StageOneId.from_name(folder.name))
    except (ValueError, IndexError):
        return "nnUNetv2_diffrefine export (see its --help)"
