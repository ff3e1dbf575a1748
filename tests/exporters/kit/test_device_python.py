"""The device kit on Python 3.10, which JetPack 6 has: its files use nothing newer, and its check runs there."""

from __future__ import annotations

import glob
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from command_line import run_command

from exporters.kit.write import carried_files

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dfadc.run_folder import RunFolder

ROOT = Path(__file__).resolve().parents[3]
DEVICE_VERSION, OUR_VERSION = "3.10", "3.11"
#: Names the interpreter of the device's version; without it, one on PATH or of pyenv is taken.
VARIABLE = "DFADC_PYTHON310"
RUNTIMES = ("numpy", "onnxruntime")


def newer_than_the_device(files: Sequence[Path]) -> list[str]:
    """Faults of files on the device's Python that they do not have on ours: newer syntax, newer standard library."""
    ruff = [sys.executable, "-m", "ruff", "check", "--isolated", "--no-cache", "--output-format", "concise"]
    command = [*ruff, "--select", "E9", "--target-version", "py" + DEVICE_VERSION.replace(".", ""), *map(str, files)]
    syntax = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    assert syntax.returncode in (0, 1), syntax.stderr
    on_device, on_ours = (types_of(files, version) for version in (DEVICE_VERSION, OUR_VERSION))
    faults = [line for line in syntax.stdout.splitlines() if "syntax" in line]
    return faults + [line for line in on_device if line not in on_ours and ": error: " in line]


def types_of(files: Sequence[Path], version: str) -> list[str]:
    """Messages of mypy, which knows what each version's standard library holds; other packages are left out."""
    options = ["--config-file=", f"--cache-dir={os.devnull}", "--follow-imports=skip"]
    command = [sys.executable, "-m", "mypy", *options, "--python-version", version, *map(str, files)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)  # noqa: S603
    assert done.returncode in (0, 1), done.stderr + done.stdout
    return done.stdout.splitlines()


def test_the_files_of_the_kit_use_nothing_newer() -> None:
    assert newer_than_the_device([ROOT / file for file in carried_files()]) == []


NEWER = {
    "self_type": "from typing import Self",
    "string_enum": "from enum import StrEnum",
    "toml": "import tomllib",
    "digest": "import hashlib\n\nhashlib.file_digest(open('x', 'rb'), 'md5')",
}
#: What mypy stops at, and ruff names.
NEWER_SYNTAX = {
    "groups": "try:\n    pass\nexcept* OSError:\n    pass",
    "nested": "print(f'{'nested'}')",
}


@pytest.mark.parametrize("newer", [NEWER, NEWER_SYNTAX], ids=["library", "syntax"])
def test_what_is_newer_is_found(newer: dict[str, str], tmp_path: Path) -> None:
    files = [tmp_path / f"{name}.py" for name in newer]
    for file, source in zip(files, newer.values(), strict=True):
        file.write_text(source + "\n")
    faults = newer_than_the_device(files)
    assert [file.name for file in files if not any(file.name in fault for fault in faults)] == []


def runs_device_version(python: str) -> bool:
    program = "import sys; print('%d.%d' % sys.version_info[:2])"
    done = subprocess.run([python, "-c", program], capture_output=True, text=True, check=False)  # noqa: S603
    return done.returncode == 0 and done.stdout.strip() == DEVICE_VERSION


def has_runtimes(python: Path) -> bool:
    program = "import " + ", ".join(RUNTIMES)
    return subprocess.run([python, "-I", "-c", program], capture_output=True, check=False).returncode == 0  # noqa: S603


@pytest.fixture(scope="module")
def device_python(request: pytest.FixtureRequest) -> Path:
    """An interpreter of the device's version with numpy and ONNX Runtime; an environment that it needs is kept."""
    pyenv = os.environ.get("PYENV_ROOT", str(Path.home() / ".pyenv"))
    named, found = os.environ.get(VARIABLE), shutil.which(f"python{DEVICE_VERSION}")
    installed = sorted(glob.glob(f"{pyenv}/versions/{DEVICE_VERSION}.*/bin/python"))  # noqa: PTH207
    candidates = [named] if named else [*([found] if found else []), *installed]
    python = next((candidate for candidate in candidates if runs_device_version(candidate)), None)
    if python is None:
        assert not named, f"{VARIABLE}={named} is no Python {DEVICE_VERSION}"
        pytest.skip(f"no Python {DEVICE_VERSION} on PATH or in pyenv, and {VARIABLE} is not set")
    if has_runtimes(Path(python)):
        return Path(python)
    assert request.config.cache is not None
    folder = request.config.cache.mkdir(f"python{DEVICE_VERSION}")
    own = folder / "bin" / "python"
    if not (own.exists() and has_runtimes(own)):
        pip = [str(own), "-m", "pip", "install", "--quiet", "--retries", "0", "--timeout", "10", *RUNTIMES]
        for command in ([python, "-m", "venv", "--clear", str(folder)], pip):
            done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
            if done.returncode:
                pytest.skip(f"no {' and '.join(RUNTIMES)} for Python {DEVICE_VERSION}: {done.stderr.strip()[-200:]}")
    return own


def test_the_check_runs_there_as_here(device_python: Path, finished_run: RunFolder, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished_run.path, run)
    assert run_command("export", run, "-e", "kit", "--quiet").code == 0
    kit = run / "artifacts" / "kit"
    done = subprocess.run(  # noqa: S603
        [device_python, "-W", "error", "check.py", "--json"],
        cwd=kit,
        env={key: value for key, value in os.environ.items() if not key.startswith("PYTHON")},
        capture_output=True,
        text=True,
        check=False,
    )
    here = run_command("verify", run, "--json")
    assert done.returncode == here.code, done.stderr
    on_device, verified = json.loads(done.stdout), json.loads(here.out)
    assert on_device["verdict"] == verified["verdict"]
    assert on_device["artifacts"]["student.onnx"]["verdict"] == verified["artifacts"]["student.onnx"]["verdict"]
    assert on_device["student"] == verified["student"]
