"""Who may import whom, read from the source: layers, the seams to nnU-Net, declared dependencies, sizes."""

import ast
import re
import sys
from importlib import metadata
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGE = REPOSITORY / "nnunet_diffrefine"

# From the bottom up; a module imports from its own layer and those below. Anything new has to be given a layer here.
LAYERS = [
    {"batch", "config", "image_files", "paths", "settings_block"},
    {"diffusion", "environment", "errors", "plans"},
    {"networks"},
    {"methods"},
    {"data", "stage_one"},
    {"calibration"},
    {"inference"},
    {"training"},
    {"demo", "doctor", "plan_command"},
    {"cli"},
]
# What these import of the package; only training and what is above it imports them.
APART = {"evaluation": {"image_files"}, "reports": {"evaluation", "image_files"}}

# The files to look at again at each nnU-Net release.
NNUNET_SEAMS = (
    "data/*.py",
    "doctor.py",
    "inference/*.py",
    "networks/planned.py",
    "plan_command.py",
    "plans.py",
    "stage_one/export.py",
    "stage_one/trainer.py",
    "training/trainer*.py",
)


def _imports(file):
    """Dotted names of all modules a file imports, also inside functions; ``from a import b`` counts as ``a.b``."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}:{node.lineno}: relative import; write the module's full name"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _part(dotted):
    """``nnunet_diffrefine.methods.bridge`` -> ``methods``; names of the package itself, e.g. its version, -> None."""
    names = dotted.split(".")
    part = names[1] if names[0] == PACKAGE.name and len(names) > 1 else None
    return part if part and ((PACKAGE / part).is_dir() or (PACKAGE / f"{part}.py").is_file()) else None


def _layer(part):
    return next((number for number, layer in enumerate(LAYERS) if part in layer), None)


MODULES = sorted(PACKAGE.rglob("*.py"))
IMPORTS = {file.relative_to(PACKAGE).as_posix(): set(_imports(file)) for file in MODULES}
PARTS = {name: name.split("/")[0].removesuffix(".py") for name in IMPORTS}


def test_every_part_of_the_package_has_a_layer():
    assert {p for p in PARTS.values() if _layer(p) is None} <= {"__init__", *APART}


@pytest.mark.parametrize("name", [name for name, part in PARTS.items() if _layer(part) is not None])
def test_no_module_imports_from_a_layer_above_its_own(name):
    own = _layer(PARTS[name])
    for part in filter(None, map(_part, IMPORTS[name])):
        if part in APART:
            assert own >= _layer("training"), f"{name} imports {part}, which stands apart"
        else:
            assert _layer(part) <= own, f"{name} (layer {own}) imports {part} (layer {_layer(part)})"


@pytest.mark.parametrize("name", [name for name, part in PARTS.items() if part in APART])
def test_evaluation_and_reports_stand_apart(name):
    own = PARTS[name]
    assert set(filter(None, map(_part, IMPORTS[name]))) <= APART[own] | {own}


def test_nnunet_is_imported_only_at_the_seams():
    users = {name for name, imports in IMPORTS.items() if any(i.split(".")[0] == "nnunetv2" for i in imports)}
    assert {name for name in users if not any(Path(name).match(seam) for seam in NNUNET_SEAMS)} == set()


def test_the_package_declares_exactly_what_it_imports():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    declared = {_canonical(re.match(r"[\w.-]+", requirement)[0]) for requirement in project["dependencies"]}
    modules = {name.split(".")[0] for imports in IMPORTS.values() for name in imports}
    third_party = modules - set(sys.stdlib_module_names) - {PACKAGE.name}
    distributions = metadata.packages_distributions()
    imported = {_canonical(name) for module in third_party for name in distributions[module]}
    assert imported == declared


def _canonical(name):
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.mark.parametrize("file", sorted((REPOSITORY / "trainers").glob("*.py")), ids=lambda file: file.stem)
def test_a_shim_holds_one_import_and_is_named_after_it(file):
    """nnU-Net unloads the modules of this folder, so a class defined there could not be pickled."""
    statements = [node for node in ast.parse(file.read_text()).body if not isinstance(node, ast.Expr)]
    assert [type(node) for node in statements] == [ast.ImportFrom]
    assert [alias.name for alias in statements[0].names] == [file.stem]
    assert statements[0].module.startswith(f"{PACKAGE.name}.")


@pytest.mark.parametrize("file", MODULES, ids=lambda file: file.relative_to(PACKAGE).as_posix())
def test_modules_stay_below_300_lines(file):
    assert len(file.read_text().splitlines()) < 300


@pytest.mark.parametrize("file", MODULES, ids=lambda file: file.relative_to(PACKAGE).as_posix())
def test_functions_stay_below_30_lines(file):
    """Of their body; signature and docstring do not count."""
    functions = [n for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.FunctionDef)]
    lengths = {f"{function.name}, line {function.lineno}": _body_lines(function) for function in functions}
    assert {name: lines for name, lines in lengths.items() if lines >= 30} == {}


def _body_lines(function):
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    return body[-1].end_lineno - body[0].lineno + 1 if body else 0


def test_ci_runs_the_test_command_of_the_readme():
    command = re.search(r'step "(python3 -m venv .*pytest -n 2)"', (REPOSITORY / ".ci" / "run").read_text())[1]
    assert command in (REPOSITORY / "README.md").read_text()
