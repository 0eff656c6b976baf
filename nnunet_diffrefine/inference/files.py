"""Cases in folders of images and predictions, and files that appear whole or not at all."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

PARTIAL = ".partial"
LOCK = ".lock"


@dataclass(frozen=True)
class CaseFiles:
    """Input files of a case.

    Attributes:
        name: of the case, without channel and file ending.
        images: one a channel.
        labels: the prediction's label map.
        probabilities: the prediction's npz, or None where there are only labels.
    """

    name: str
    images: tuple[Path, ...]
    labels: Path
    probabilities: Path | None


def find_cases(images: Path, predictions: Path, ending: str, channels: int) -> list[CaseFiles]:
    """The cases of both folders, sorted.

    Raises:
        ValueError: a folder is missing or empty, a case is in one of them only, a channel or an npz is missing.
    """
    for flag, folder in (("-i", images), ("-s", predictions)):
        if not folder.is_dir():
            raise ValueError(f"{flag} is {folder}, which is no folder.")
    pattern = re.compile(rf"(.+)_(\d{{4}}){re.escape(ending)}")
    found: dict[str, set[int]] = {}
    for match in filter(None, (pattern.fullmatch(file.name) for file in images.iterdir())):
        found.setdefault(match[1], set()).add(int(match[2]))
    predicted = {f.name.removesuffix(ending) for f in predictions.iterdir() if f.name.endswith(ending)}
    _require_pairs(set(found), predicted, images, predictions, ending)
    if wrong := sorted(case for case, has in found.items() if has != set(range(channels))):
        has = sorted(found[wrong[0]])
        raise ValueError(
            f"The model needs {channels} channel(s), _0000 to _{channels - 1:04d}, but {len(wrong)} case(s) in "
            f"{images} have others: {listed(wrong)}. {wrong[0]} has {has}."
        )
    soft = {f.name.removesuffix(".npz") for f in predictions.glob("*.npz")} & set(found)
    if soft and (without := sorted(set(found) - soft)):
        raise ValueError(f"{predictions} has probabilities (.npz) of some cases but not of: {listed(without)}. "
                         "Predict these again with --save_probabilities, or take all .npz away.")  # fmt: skip
    return [
        CaseFiles(
            case,
            tuple(images / f"{case}_{channel:04d}{ending}" for channel in range(channels)),
            predictions / f"{case}{ending}",
            predictions / f"{case}.npz" if case in soft else None,
        )
        for case in sorted(found)
    ]


def _require_pairs(found: set[str], predicted: set[str], images: Path, predictions: Path, ending: str) -> None:
    if not found:
        raise ValueError(f"{images} has no images named CASE_0000{ending}, as nnU-Net wants them.")
    if only := sorted(found - predicted):
        raise ValueError(f"{len(only)} case(s) have an image but no prediction CASE{ending} in {predictions}: "
                         f"{listed(only)}.")  # fmt: skip
    if only := sorted(predicted - found):
        raise ValueError(f"{len(only)} prediction(s) have no image CASE_0000{ending} in {images}: {listed(only)}.")


def listed(names: Sequence[str], most: int = 10) -> str:
    """Names for a message, at most ``most`` of them."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


# Writing


class OutputFolder:
    """Files that appear under their final name only once they are complete.

    They are written into a hidden folder inside and moved, so a process may be killed at any moment. A lock in the
    hidden folder is held as long as its process lives.

    Args:
        folder: made if it is not there.
        part: name of the process, where several share the folder.
    """

    def __init__(self, folder: Path, part: str = "") -> None:
        self.folder = folder
        self.partial = folder / f"{PARTIAL}{part}"

    @contextmanager
    def begun(self) -> Iterator[None]:
        """The hidden folder is there, without what a killed process left half done, and is removed in the end.

        Raises:
            ValueError: nothing can be written there, or another process writes as the same part.
        """
        lock = FileLock(self.partial / LOCK)
        try:
            self.partial.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=1)
            for left in self.partial.iterdir():
                if left.name != LOCK:
                    left.unlink()
        except Timeout as error:
            raise ValueError(f"Another process writes into {self.folder} (-o) as the same part (-part_id). Wait for "
                             f"it; if there is none, delete {self.partial}.") from error  # fmt: skip
        except OSError as error:
            lock.release()
            raise ValueError(f"Nothing can be written into {self.folder}: {error}. Choose another -o.") from error
        try:
            yield
        finally:
            lock.release()
            shutil.rmtree(self.partial, ignore_errors=True)

    def clear_up(self) -> None:
        """Remove hidden folders that killed processes left; those of running ones stay."""
        for folder in self.folder.glob(f"{PARTIAL}*"):
            with suppress(OSError):
                with FileLock(folder / LOCK).acquire(timeout=0):  # fails while its process lives
                    pass
                shutil.rmtree(folder)

    def write(self, name: str, write: Callable[[Path], Any]) -> None:
        """Let ``write`` make a file, then give it its ``name`` (which may have a folder in it).

        A ``.json`` of the same stem that ``write`` leaves beside it (nnU-Net's of TIFF files: the spacing) goes along.

        Raises:
            OSError: it could not be written completely.
        """
        final, temporary = self.folder / name, self.partial / Path(name).name
        try:
            write(temporary)
        except (OSError, RuntimeError) as error:
            temporary.unlink(missing_ok=True)
            raise OSError(f"{final} could not be written; is the disk full? {error}") from error
        final.parent.mkdir(exist_ok=True)
        sidecar = temporary.with_suffix(".json")
        if sidecar != temporary and sidecar.is_file():
            os.replace(sidecar, final.with_suffix(".json"))
        os.replace(temporary, final)

    def write_json(self, name: str, values: Any) -> None:  # noqa: ANN401 (anything JSON can hold)
        """Write a JSON file."""
        self.write(name, lambda file: file.write_text(json.dumps(values, indent=2, default=str)))
