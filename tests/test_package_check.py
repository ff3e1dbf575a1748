"""A foreign package called ``exporters`` is named in one error, wherever Python finds it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def python(*arguments: object, folder: Path, path: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Our interpreter in ``folder``, which ``-m`` and ``-c`` put first on sys.path."""
    command = [sys.executable, *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(path)}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)  # noqa: S603


@pytest.fixture(params=["exporters/__init__.py", "exporters.py"])
def foreign(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A package or module of a user's own, which says so where it is imported."""
    file = tmp_path / "project" / str(request.param)
    file.parent.mkdir(parents=True)
    file.write_text("print('foreign code ran')\n")
    return file if file.name == "exporters.py" else file.parent


@pytest.mark.parametrize("command", [("doctor",), ("export", "run"), ("inspect", "student.onnx"), ("bench", "run")])
def test_a_command_names_it_and_the_remedy(command: tuple[str, ...], foreign: Path) -> None:
    done = python("-m", "dfadc", *command, folder=foreign.parent)
    assert done.returncode == 4, done.stderr
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {foreign} hides the package exporters that belongs to dfadc ({ROOT / 'exporters'})")
    assert "rename it, or run from a directory" in line


def test_an_import_names_it(foreign: Path) -> None:
    done = python("-c", "import dfadc; dfadc.export_student", folder=foreign.parent)
    assert done.returncode == 1
    assert f"RequirementMissing: {foreign} hides the package exporters" in done.stderr.splitlines()[-1]
    assert done.stdout == ""


def test_it_is_found_on_pythonpath_too(foreign: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    code = "from dfadc.cli.main import main; main()"
    path = Path(f"{foreign.parent}{os.pathsep}{ROOT}")
    done = python("-c", code, "doctor", folder=tmp_path / "elsewhere", path=path)
    assert done.returncode == 4
    assert f"error: {foreign} hides" in done.stderr


def test_a_folder_without_code_is_no_package(tmp_path: Path) -> None:
    (tmp_path / "exporters").mkdir()
    (tmp_path / "exporters" / "notes.txt").write_text("")
    done = python("-m", "dfadc", "recipe", "list", folder=tmp_path)
    assert done.returncode == 0, done.stderr


def test_dfadc_alone_is_not_enough(tmp_path: Path) -> None:
    """A copy of dfadc without exporters beside it, as an incomplete installation is."""
    (tmp_path / "dfadc").symlink_to(ROOT / "dfadc")
    code = f"import sys; sys.path[:] = [p for p in sys.path if p != {str(ROOT)!r}]\nimport dfadc; dfadc.export_student"
    done = python("-S", "-c", code, folder=tmp_path, path=tmp_path)
    assert f"the package {tmp_path / 'exporters'} is missing" in done.stderr.splitlines()[-1]
