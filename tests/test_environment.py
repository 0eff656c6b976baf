"""``nnUNetv2_diffrefine env`` sets nnUNet_extTrainer in real shells, whatever characters the folders have."""

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from nnunet_diffrefine import environment
from nnunet_diffrefine.environment import VARIABLE, extended_trainer_path, guessed_shell, shell_line

REPOSITORY = Path(__file__).resolve().parents[1]
NASTY = [
    "/plain/folder",
    "/with space/and 'single' \"double\"",
    "/a $HOME `id` \\ % ! * ? & ; | # ~",
    "/é ’curly‘ 日本",
    "/a\nb",
]
SHOW = f"{sys.executable} -c 'import os; print(repr(os.environ[\"{VARIABLE}\"]))'"
# How the help tells each shell to run the line; $LINE stands for the output of the command.
APPLY = {
    "sh": ["sh", "-c", f'eval "$(printf %s "$LINE")"; {SHOW}'],
    "bash": ["bash", "--norc", "-c", f'eval "$(printf %s "$LINE")"; {SHOW}'],
    "zsh": ["zsh", "-f", "-c", f'eval "$(printf %s "$LINE")"; {SHOW}'],
    "fish": ["fish", "--no-config", "-c", f'printf %s "$LINE" | source; {SHOW}'],
    "powershell": ["pwsh", "-NoProfile", "-Command", f"$env:LINE | Out-String | Invoke-Expression; {SHOW}"],
}


@pytest.fixture
def ours(tmp_path, monkeypatch):
    """A trainers folder in place of the shipped one."""
    folder = tmp_path / "our trainers"
    folder.mkdir()
    monkeypatch.setattr(environment, "resource_folder", lambda name: tmp_path / f"our {name}")
    return str(folder)


@pytest.mark.parametrize("value", NASTY)
@pytest.mark.parametrize("shell", APPLY)
def test_the_shell_exports_exactly_the_value(shell, value):
    if not shutil.which(APPLY[shell][0]):
        pytest.skip(f"{APPLY[shell][0]} is not installed")
    variables = {**os.environ, "LINE": shell_line(shell, value), "PYTHONUTF8": "1"}
    shown = subprocess.run(APPLY[shell], env=variables, capture_output=True, encoding="utf-8", check=True).stdout
    assert shown == f"{value!r}\n"


@pytest.mark.parametrize(
    ("shell", "line"),
    [
        ("sh", "export nnUNet_extTrainer='/it'\"'\"'s'"),
        ("fish", "set -gx nnUNet_extTrainer '/it\\'s'"),
        ("powershell", "$env:nnUNet_extTrainer = '/it''s'"),
        ("cmd", 'set "nnUNet_extTrainer=/it\'s"'),
    ],
)
def test_each_syntax_escapes_a_quote_by_its_own_rule(shell, line):
    assert shell_line(shell, "/it's") == line


def test_powershell_escapes_typographic_quotes_which_it_takes_for_plain_ones():
    assert shell_line("powershell", "\u2018\u2019\u201a\u201b").endswith(
        "'\u2018\u2018\u2019\u2019\u201a\u201a\u201b\u201b'"
    )


@pytest.mark.parametrize("character", ['"', "%", "\n"])
def test_cmd_refuses_what_it_cannot_quote(character):
    with pytest.raises(RuntimeError, match="PowerShell"):
        shell_line("cmd", f"C:\\a{character}b")


def test_an_unset_variable_becomes_our_folder(ours):
    assert extended_trainer_path(None) == extended_trainer_path("") == ours


def test_other_entries_keep_their_order_and_come_first(ours):
    assert extended_trainer_path(os.pathsep.join(["/b", "/a"])) == os.pathsep.join(["/b", "/a", ours])


def test_extending_twice_changes_nothing(ours):
    once = extended_trainer_path("/b")
    assert extended_trainer_path(once) == once


def test_empty_and_repeated_entries_are_dropped(ours):
    value = os.pathsep.join(["", "/a", " ", "/a/", "/b", ""])
    assert extended_trainer_path(value) == os.pathsep.join(["/a", "/b", ours])


def test_our_folder_is_recognised_under_another_spelling(ours, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(ours, target_is_directory=True)
    for spelling in (f"{ours}/", f"{ours}/../our trainers", str(link)):
        assert extended_trainer_path(spelling) == spelling


def test_a_missing_trainers_folder_is_reported(monkeypatch, tmp_path):
    monkeypatch.setattr(environment, "resource_folder", lambda name: tmp_path / name)
    with pytest.raises(RuntimeError, match=r"trainers is missing.*Reinstall"):
        extended_trainer_path(None)


def test_a_separator_in_our_path_is_refused(monkeypatch, tmp_path):
    folder = tmp_path / f"a{os.pathsep}b"
    folder.mkdir()
    monkeypatch.setattr(environment, "resource_folder", lambda name: folder)
    with pytest.raises(RuntimeError, match="separates the folders"):
        extended_trainer_path(None)


@pytest.mark.parametrize(
    ("value", "shell"),
    [
        ("/bin/bash", "bash"),
        ("/usr/bin/zsh", "zsh"),
        ("/usr/bin/fish", "fish"),
        ("/usr/bin/pwsh", "powershell"),
        ("C:/Program Files/Git/usr/bin/bash.exe", "bash"),
        ("/bin/dash", "sh"),
        ("", "powershell" if os.name == "nt" else "sh"),
    ],
)
def test_the_shell_is_guessed(monkeypatch, value, shell):
    monkeypatch.setenv("SHELL", value)
    assert guessed_shell() == shell


def _env_command(*arguments):
    parser = argparse.ArgumentParser()
    environment.register(parser.add_subparsers())
    args = parser.parse_args(["env", *arguments])
    return args.func(args)


def test_the_command_prints_the_line_and_nothing_else(ours, monkeypatch, capsys):
    monkeypatch.setenv(VARIABLE, "/mine")
    monkeypatch.setenv("SHELL", "/bin/bash")
    assert _env_command() == 0
    assert capsys.readouterr().out == f"export {VARIABLE}='/mine{os.pathsep}{ours}'\n"
    assert _env_command("--shell", "fish") == 0
    assert capsys.readouterr().out.startswith("set -gx ")


def test_help_shows_how_to_apply_the_line(capsys):
    with pytest.raises(SystemExit):
        _env_command("--help")
    assert 'eval "$(nnUNetv2_diffrefine env)"' in capsys.readouterr().out


def test_the_command_line_starts_without_torch_and_nnunet():
    """``env`` stands in shell start-up files, and ``doctor`` has to run where torch is broken."""
    code = "import sys, nnunet_diffrefine.cli as c; c.parser(); print({'torch', 'nnunetv2'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
