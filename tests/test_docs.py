"""README and docs: short, built strictly, their commands run, their links lead somewhere."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import run_command

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "docs" / "quickstart.md"]
GATES = tuple(f"verify.min_{precision}_agreement=0.9" for precision in ("fp16", "int8"))  # few samples can show
FEW_IMAGES = ("verify.num_samples=192", *GATES, "calibration.num_images=32")
SETTINGS = " ".join(f"--set {each}" for each in FEW_IMAGES)
#: Budgets that would take minutes become a few steps and images; everything else is run as it stands.
SHORTENED = {
    "--minutes 4": f"--steps 2 --batch-size 16 {SETTINGS}",
    "teacher.pt --student mobilenetv2": f"teacher.pt --student mobilenetv2 --steps 1 --batch-size 8 -e onnx {SETTINGS}",
}


def blocks(page: Path, language: str) -> list[str]:
    """Fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def shell_lines(page: Path) -> list[str]:
    return [line for block in blocks(page, "sh") for line in block.replace("\\\n", "").splitlines() if line]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders that a command of the documentation reads, in a place that it may write to."""
    folder = tmp_path_factory.mktemp("checkout")
    (folder / "examples").mkdir()
    shutil.copytree(ROOT / "examples" / "fashion_mnist", folder / "examples" / "fashion_mnist")
    shutil.copy(ROOT / "examples" / "fashion_mnist" / "teacher.safetensors", folder / "teacher.pt")
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    return folder


def test_readme_is_one_screen_and_a_half() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


@pytest.mark.example
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_shell_line_runs(page: Path, checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In order, in one folder, as a reader would type them; gates may fail after two steps."""
    monkeypatch.chdir(checkout)
    lines = shell_lines(page)
    assert lines
    for line in lines:
        for long, short in SHORTENED.items():
            line = line.replace(long, short)  # noqa: PLW2901
        program, *arguments = shlex.split(line)
        if program == "make":
            done = subprocess.run(["make", "--dry-run", *arguments], capture_output=True, text=True, check=False)  # noqa: S603, S607
            assert done.returncode == 0, done.stderr
        else:
            assert program == "dfadc"
            outcome = run_command(*arguments)
            assert outcome.code in (0, 3), f"{line}\n{outcome.err}"


@pytest.mark.example
def test_the_python_block_runs(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(checkout)
    (source,) = blocks(ROOT / "README.md", "python")
    assert blocks(ROOT / "docs" / "python.md", "python") == [source]
    short = f'recipe=load_recipe("auto", {["steps=2", "batch_size=16", *FEW_IMAGES]})'
    changed = source.replace('recipe="auto"', short).replace("load_teacher,", "load_recipe, load_teacher,", 1)
    assert short in changed
    exec(compile(changed, "README.md", "exec"), {})  # noqa: S102
    assert capsys.readouterr().out.split()[0] in {"PASS", "FAIL"}


def test_links_of_the_readme_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)#]+)", (ROOT / "README.md").read_text(encoding="utf-8"))
    local = [link for link in links if not link.startswith("http")]
    assert [link for link in local if not (ROOT / link).exists()] == []
    assert len(local) > 15


def build_docs(folder: Path, site: Path) -> subprocess.CompletedProcess[str]:
    quiet = {"NO_MKDOCS_2_WARNING": "1", "DISABLE_MKDOCS_2_WARNING": "true"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)]
    environment = {**os.environ, **quiet}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)  # noqa: S603


@pytest.mark.example
def test_docs_build_strictly(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="pip install 'dfadc[docs]'")
    folder = tmp_path / "checkout"
    folder.mkdir()
    shutil.copytree(ROOT / "docs", folder / "docs")
    shutil.copy(ROOT / "mkdocs.yml", folder)
    done = build_docs(folder, tmp_path / "site")
    assert done.returncode == 0, done.stderr
    commands, settings = ((tmp_path / "site" / page).read_text() for page in ("cli.html", "recipes.html"))
    assert "--min-agreement" in commands
    assert "student.optimizer.learning_rate" in settings


@pytest.mark.example
def test_a_broken_link_is_an_error(tmp_path: Path) -> None:
    """In a site of one page with the same settings; the pages that are generated take most of the time."""
    pytest.importorskip("mkdocs", reason="pip install 'dfadc[docs]'")
    text = (ROOT / "mkdocs.yml").read_text()
    before, validation = text.partition("plugins:\n")[0], text[text.index("validation:") : text.index("nav:")]
    (tmp_path / "mkdocs.yml").write_text(before + validation)
    (tmp_path / "docs").mkdir()
    page = tmp_path / "docs" / "index.md"
    page.write_text("[here](index.md)\n")
    done = build_docs(tmp_path, tmp_path / "site")
    assert done.returncode == 0, done.stderr
    page.write_text("[gone](nowhere.md)\n")
    done = build_docs(tmp_path, tmp_path / "site")
    assert done.returncode != 0
    assert "nowhere.md" in done.stderr


@pytest.mark.parametrize("page", sorted((ROOT / "docs").rglob("*.md")), ids=lambda page: page.stem)
def test_a_page_says_for_whom_it_is(page: Path) -> None:
    first = page.read_text(encoding="utf-8").splitlines()[2]
    assert first.startswith("For "), first
