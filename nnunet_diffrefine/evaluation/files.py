"""Files that are there whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path


def writable_folder(folder: Path) -> Path:
    """Create ``folder`` if need be and try it out, so that a long computation does not end in an error.

    Raises:
        OSError: it cannot be created or written to.
    """
    folder = Path(folder)
    trial = folder / f".{os.getpid()}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        trial.touch()
        trial.unlink()
    except OSError as error:
        raise OSError(f"Cannot write to the output folder {folder}: {error}. Name another with -o.") from error
    return folder


def write_atomically(path: Path, text: str) -> None:
    """Write ``text`` as UTF-8 so that readers see the old file or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
