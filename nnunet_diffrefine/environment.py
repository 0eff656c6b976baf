"""``nnUNetv2_diffrefine env``: let nnU-Net find the trainers of this package.

nnU-Net looks trainer names up in its own folder and then in the folders that the environment variable
``nnUNet_extTrainer`` lists. It needs the variable wherever a refiner is trained *or* used for prediction.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import PurePath

from nnunet_diffrefine.paths import resource_folder

VARIABLE = "nnUNet_extTrainer"

DESCRIPTION = f"""\
Print the shell line that sets {VARIABLE}, so that nnUNetv2_train and nnUNetv2_predict find DiffRefineTrainer.
Folders already listed in the variable are kept. The line is only printed; your shell has to run it:

  sh, bash, zsh   eval "$(nnUNetv2_diffrefine env)"                       add it to ~/.bashrc or ~/.zshrc
  fish            nnUNetv2_diffrefine env --shell fish | source           add it to ~/.config/fish/config.fish
  PowerShell      nnUNetv2_diffrefine env --shell powershell | Out-String | Invoke-Expression
  cmd             for /f "delims=" %i in ('nnUNetv2_diffrefine env --shell cmd') do %i

Afterwards `nnUNetv2_diffrefine doctor` tells whether everything is found. The nnUNetv2_diffrefine commands
themselves need no such line.
"""


def extended_trainer_path(current: str | None) -> str:
    """Value of ``nnUNet_extTrainer`` that lists our trainers folder after the entries it has already.

    Args:
        current: the variable's value, folders joined by ``os.pathsep``, or None if it is not set. Repeated and empty
            entries are dropped, all others kept in their order.

    Raises:
        RuntimeError: the installation has no trainers folder, or its path cannot be written into the variable.
    """
    ours = str(resource_folder("trainers"))
    if not os.path.isdir(ours):
        raise RuntimeError(f"The trainers folder {ours} is missing. Reinstall nnunet-diffrefine.")
    if os.pathsep in ours:
        raise RuntimeError(
            f"The trainers folder {ours} has a '{os.pathsep}' in its path, which separates the folders in {VARIABLE}. "
            f"Install nnunet-diffrefine in a folder without '{os.pathsep}'."
        )
    unique: dict[str, str] = {}
    for entry in [*entries(current), ours]:
        unique.setdefault(normalised(entry), entry)
    return os.pathsep.join(unique.values())


def entries(value: str | None) -> list[str]:
    """The non-empty folders listed in a value of ``nnUNet_extTrainer``."""
    return [entry for entry in (value or "").split(os.pathsep) if entry.strip()]


def normalised(folder: str | os.PathLike[str]) -> str:
    """One spelling for each folder: absolute, links resolved, letters folded where the platform ignores case."""
    return os.path.normcase(os.path.realpath(folder))


def _posix(value: str) -> str:
    return f"export {VARIABLE}={shlex.quote(value)}"


def _fish(value: str) -> str:
    escaped = value.replace("\\", "\\\\").replace("'", "\\'")
    return f"set -gx {VARIABLE} '{escaped}'"


def _powershell(value: str) -> str:
    # PowerShell closes a quoted string at the typographic single quotes as well; doubling escapes all of them.
    return f"$env:{VARIABLE} = '" + re.sub("(['\u2018\u2019\u201a\u201b])", r"\1\1", value) + "'"


def _cmd(value: str) -> str:
    unsafe = sorted(set(value) & set('"%\r\n'))
    if unsafe:
        raise RuntimeError(f"cmd cannot quote {unsafe} in {VARIABLE}={value!r}. Use PowerShell, or other folder names.")
    return f'set "{VARIABLE}={value}"'


SHELLS: dict[str, Callable[[str], str]] = {
    "sh": _posix,
    "bash": _posix,
    "zsh": _posix,
    "fish": _fish,
    "powershell": _powershell,
    "cmd": _cmd,
}


def shell_line(shell: str, value: str) -> str:
    """The line that sets ``nnUNet_extTrainer`` to ``value`` in ``shell``, one of :data:`SHELLS`.

    Raises:
        RuntimeError: the shell has no way to quote the value.
    """
    return SHELLS[shell](value)


def guessed_shell() -> str:
    """The user's shell: named by ``$SHELL``; without it PowerShell on Windows, ``sh`` elsewhere."""
    name = PurePath(os.environ.get("SHELL", "")).stem.lower()
    if name == "pwsh" or (not name and os.name == "nt"):
        return "powershell"
    return name if name in SHELLS else "sh"


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the ``env`` command."""
    parser = subparsers.add_parser(
        "env",
        help="print the shell line that lets nnU-Net find DiffRefineTrainer",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--shell", choices=list(SHELLS), help="whose syntax to print; default: guessed from $SHELL")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Print the line; returns the exit code."""
    print(shell_line(args.shell or guessed_shell(), extended_trainer_path(os.environ.get(VARIABLE))))
    if sys.stdout.isatty():
        print("# Only printed so far. To apply it, see: nnUNetv2_diffrefine env --help", file=sys.stderr)
    return 0
