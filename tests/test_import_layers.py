"""Imports go down one list of layers, strings and lazy imports included; each layer has its class of dependencies."""

from __future__ import annotations

import ast
import re
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parents[1]
MODULES = sorted(path for package in ("dfadc", "exporters") for path in (ROOT / package).rglob("*.py"))

#: From the bottom to the top: a layer imports itself and those before it. docs/architecture.md draws it.
LAYERS = (
    ("dfadc._version", "dfadc.errors"),
    ("dfadc.storage", "dfadc.array_file", "dfadc.preprocessing", "dfadc.package_check"),
    ("dfadc.contract",),
    ("dfadc.run_folder", "dfadc.run_lock", "dfadc.provenance"),
    ("dfadc.recipe",),
    ("dfadc.networks",),
    ("dfadc.teacher", "dfadc.student"),
    ("dfadc.verification",),
    ("exporters",),
    ("dfadc.distillation",),
    ("dfadc.training",),
    ("dfadc.sampling",),
    ("dfadc.evaluation", "dfadc.reporting"),
    ("dfadc.pipeline",),
    ("dfadc", "dfadc.cli", "dfadc.__main__"),
)
#: Layer -> packages outside the standard library that it may import; None: any that dfadc requires.
DEPENDENCIES: dict[str, set[str] | None] = {
    "dfadc._version": set(),
    "dfadc.errors": set(),
    "dfadc.package_check": set(),
    "dfadc.storage": set(),
    "dfadc.preprocessing": set(),
    "dfadc.array_file": {"numpy"},
    "dfadc.contract": set(),
    "dfadc.run_folder": set(),
    "dfadc.provenance": set(),
    "dfadc.run_lock": {"filelock"},
    "dfadc.recipe": {"pydantic", "tomli_w"},
    "dfadc.verification": {"numpy"},
    "dfadc.distillation": {"torch", "numpy"},
    "exporters.sessions": {"numpy", "onnxruntime", "torch"},
    "exporters.kit": {"numpy", "onnxruntime", "openvino", "tensorrt", "tensorrt_rtx"},
}
_MODULE = re.compile(r"(dfadc|exporters)(\.[a-z_0-9]+)+")


def module_name(path: Path) -> str:
    """``dfadc/teacher/__init__.py`` -> ``dfadc.teacher``."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def rank(name: str) -> int:
    """Number of the layer that holds a module: the layer with the longest name that fits."""
    fitting = [(len(entry), number) for number, layer in enumerate(LAYERS) for entry in layer if is_within(name, entry)]
    return max(fitting)[1]


def is_typing_block(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def imported_modules(tree: ast.AST, *, typing: bool = True) -> Iterator[str]:
    """Modules that imports name, wherever they stand; ``from a import b`` gives ``a.b`` where that is a module."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            assert node.module is not None
            yield from (submodule(node.module, alias.name) for alias in node.names)
        elif typing or not is_typing_block(node):
            yield from imported_modules(node, typing=typing)


def submodule(package: str, name: str) -> str:
    whole = f"{package}.{name}"
    return whole if package.partition(".")[0] in {"dfadc", "exporters"} and is_module(whole) else package


def named_modules(tree: ast.AST) -> Iterator[str]:
    """Modules of ours that stand in strings, as for ``import_module``; metadata keys are no modules."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield from (found[0] for found in _MODULE.finditer(node.value) if is_module(found[0]))


def is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def broken_rules(name: str, source: str) -> list[str]:
    """Imports of module ``name`` that go up, and foreign packages that its layer has no business with."""
    tree = ast.parse(source)
    ours = {*imported_modules(tree), *(named_modules(tree) if name != "dfadc" else ())}
    broken = [f"{name} imports {module}" for module in ours if is_ours(module) and rank(module) > rank(name)]
    allowed = next((packages for layer, packages in DEPENDENCIES.items() if is_within(name, layer)), None)
    if allowed is not None:
        foreign = {module.partition(".")[0] for module in imported_modules(tree, typing=False) if not is_ours(module)}
        broken += [f"{name} imports {package}" for package in foreign - allowed - sys.stdlib_module_names]
    return sorted(broken)


def is_ours(module: str) -> bool:
    return module.partition(".")[0] in {"dfadc", "exporters"}


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_imports_go_down_the_layers(path: Path) -> None:
    assert broken_rules(module_name(path), path.read_text()) == []


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("dfadc.teacher.load", "from dfadc.distillation.loop import play"),
        ("dfadc.teacher.load", "from dfadc import verification"),
        ("dfadc.distillation.loop", "def draw():\n    from dfadc.training import run"),
        ("dfadc.distillation.loop", "import torchvision"),
        ("dfadc.verification.gate", "import torch"),
        ("dfadc.verification.gate", "def f():\n    import scipy"),
        ("dfadc.verification.gate", "from dfadc import __version__"),
        ("dfadc.run_folder", "from exporters import registry"),
        ("exporters.exporter", "from dfadc.networks import logits\nfrom dfadc.evaluation import masks"),
        ("exporters.exporter", "from importlib import import_module\nimport_module('dfadc.pipeline.export')"),
    ],
)
def test_a_wrong_import_is_found(name: str, source: str) -> None:
    assert broken_rules(name, source) != []


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("exporters.exporter", "from dfadc.errors import ExportFailed\nfrom dfadc.verification import agreement"),
        ("dfadc.pipeline.export", "from exporters import registry\nfrom dfadc.distillation import loop"),
        ("dfadc.distillation.loop", "from dfadc.teacher.load import Teacher"),
        (
            "dfadc.verification.gate",
            "if TYPE_CHECKING:\n    from typing_extensions import Self",
        ),
    ],
)
def test_a_right_import_is_left_alone(name: str, source: str) -> None:
    assert broken_rules(name, source) == []


def test_every_layer_is_there() -> None:
    for name in [entry for layer in LAYERS for entry in layer]:
        assert find_spec(name) is not None
