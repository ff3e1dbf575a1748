"""Facts about the repository as a whole: packaging, the direction of imports, what may stand in a tracked file."""

from __future__ import annotations

import ast
import importlib
import os
import re
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import dfadc

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("dfadc", "exporters")
MODULES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))

#: Modules that import torch nowhere, not even inside a function's first call through another module.
FREE_OF_TORCH = (
    *("dfadc", "dfadc.sampling.calibration", "dfadc.recipe.load", "dfadc.run_folder", "dfadc.contract"),
    *("dfadc.verification.summary", "dfadc.verification.samples", "dfadc.verification.gate"),
    *("exporters.exporter", "exporters.registry", "exporters.sessions.open", "exporters.kit.check"),
)

MACHINE_PATH = re.compile(r"(?<![\w.$}-])/(?:work|root|home|tmp|Users|mnt|opt|data)/\w")


def module_name(path: Path) -> str:
    """``dfadc/networks/__init__.py`` -> ``dfadc.networks``."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def tracked_text_files() -> list[Path]:
    """The files git tracks (or would, before the first commit) that are text."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=False)  # noqa: S603 -- git, as named
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    paths = [ROOT / os.fsdecode(name) for name in listed.stdout.split(b"\0") if name]
    return [path for path in paths if path.is_file() and b"\0" not in path.read_bytes()[:4096]]


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)  # noqa: S603 -- our own interpreter


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    with (ROOT / "pyproject.toml").open("rb") as stream:
        return tomllib.load(stream)


def test_both_packages_are_listed_and_typed(project: dict[str, Any]) -> None:
    listed = project["tool"]["setuptools"]["packages"]["find"]["include"]
    data = project["tool"]["setuptools"]["package-data"]
    for package in PACKAGES:
        assert f"{package}*" in listed
        assert "py.typed" in data[package]
        assert (ROOT / package / "py.typed").is_file()
        folders = {path.parent for path in (ROOT / package).rglob("*.py")}
        assert [folder for folder in folders if not (folder / "__init__.py").is_file()] == []


def test_console_script_names_a_function(project: dict[str, Any]) -> None:
    module, function = project["project"]["scripts"]["dfadc"].split(":")
    assert callable(getattr(importlib.import_module(module), function))


def test_licence_is_apache_2(project: dict[str, Any]) -> None:
    assert project["project"]["license"] == "Apache-2.0"
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text
    assert "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text


def test_version_is_said_once(project: dict[str, Any]) -> None:
    assert project["project"]["version"] == dfadc.__version__
    assert f"## [{dfadc.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


def test_constraints_admit_what_the_project_asks_for(project: dict[str, Any]) -> None:
    """A name in constraints.txt that no requirement has would constrain nothing."""
    extras = project["project"]["optional-dependencies"].values()
    asked = [*project["project"]["dependencies"], *(requirement for extra in extras for requirement in extra)]
    names = {re.split(r"[<>=!~;\[ ]", requirement, maxsplit=1)[0] for requirement in asked}
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    assert {line.split("==")[0] for line in lines if not line.startswith("#")} <= names


def test_what_is_free_of_torch_imports_none() -> None:
    """With torch blocked, as on a device that has numpy and a runtime only."""
    names = ", ".join(FREE_OF_TORCH)
    done = run_python("-c", f"import sys\nsys.modules['torch'] = None\nimport {names}")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_every_module_says_what_it_is(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text()))


def documented(tree: ast.Module) -> Iterator[ast.Module | ast.ClassDef | ast.FunctionDef]:
    """The module, its classes and functions."""
    yield from (node for node in ast.walk(tree) if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef))


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_modules_and_functions_fit_a_screen_or_two(path: Path) -> None:
    source = path.read_text()
    assert len(source.splitlines()) <= 320
    nodes = [node for node in documented(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    bodies = {node.name: (node.end_lineno or node.lineno) - node.body[0].lineno + 1 for node in nodes}
    long = {name: size for name, size in bodies.items() if size > 60}  # a signature is the list of a command's flags
    assert long == {}


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_a_docstring_opens_with_a_noun_or_a_verb(path: Path) -> None:
    """Docstrings state what a thing is or does; they ask no question."""
    openers = {"What", "Whatever", "Who", "Whether", "Where", "How", "Which"}
    opened = [(ast.get_docstring(node) or "It").split()[0] for node in documented(ast.parse(path.read_text()))]
    assert openers.intersection(opened) == set()


def test_no_machine_path_is_tracked() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in tracked_text_files()
        if path != Path(__file__).resolve()
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), start=1)
        if MACHINE_PATH.search(line)
    ]
    assert found == []


def test_public_names_are_documented_names() -> None:
    assert sorted(dfadc.__all__) == sorted(dfadc._PUBLIC)  # noqa: SLF001 -- the one table of public names
    for name in dfadc.__all__:
        assert getattr(dfadc, name).__doc__, f"dfadc.{name} has no docstring"


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'distil'"):
        dfadc.distil  # noqa: B018


def test_help_is_quick_and_imports_nothing_heavy() -> None:
    """``dfadc --help`` is what a person types first: under 1 s, best of three because machines are shared."""
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        done = run_python("-X", "importtime", "-m", "dfadc", "--help")
        seconds.append(time.perf_counter() - start)
        assert done.returncode == 0, done.stderr[-2000:]
        assert "distill" in done.stdout
        imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
        assert imported & {"torch", "numpy", "pydantic"} == set()
        if seconds[-1] < 1:
            break
    assert min(seconds) < 1


def broad_excepts(source: str) -> int:
    """Handlers of everything that do not raise it again."""
    handlers = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ExceptHandler)]
    names = [set() if each.type is None else {ast.unparse(node) for node in ast.walk(each.type)} for each in handlers]
    again = [any(isinstance(node, ast.Raise) and node.exc is None for node in each.body) for each in handlers]
    is_broad = (
        each.type is None or bool({"Exception", "BaseException"} & of) for each, of in zip(handlers, names, strict=True)
    )
    return sum(broad and not raises for broad, raises in zip(is_broad, again, strict=True))


def test_a_broad_except_is_for_foreign_code() -> None:
    """Everywhere else what is raised is converted by its type, or is a bug."""
    found = {path.relative_to(ROOT).as_posix() for path in MODULES if broad_excepts(path.read_text())}
    # The user's networks; backends that a doctor looks at; what may not pass through a builder's C++ frames.
    assert found == {"dfadc/networks/user_code.py", "dfadc/pipeline/doctor.py", "exporters/to_tensorrt/api.py"}
