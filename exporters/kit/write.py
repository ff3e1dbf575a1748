"""Device kit: a folder with typed ONNX files, samples with the expected logits, a build script and a check.

The check is dfadc's own verification, copied as files: a device needs numpy and one runtime to run it.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dfadc.errors import DfadcError
from dfadc.storage import replace_together, sha256_file, storage_errors
from exporters.exporter import BatchProfile
from exporters.kit.check import SCHEMA
from exporters.to_onnx.file import INPUT_NAME, METADATA_PREFIX, load_onnx, read_metadata

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

FOLDER = "kit"
#: Modules and folders behind check.py, copied byte for byte. They run on Python 3.10, which JetPack 6 has.
CARRIED = (
    *(f"dfadc/{name}.py" for name in ("__init__", "_version", "array_file", "contract", "errors", "preprocessing")),
    *("dfadc/storage.py", "dfadc/verification"),
    *("exporters/__init__.py", "exporters/kit", "exporters/sessions"),
)

_CHECK = '''\
"""Checks the models of this folder: python check.py [FILE ...] [--runtime NAME] [--json]; exit 0, 2, 3 or 4."""

import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER))

from exporters.kit.check import main  # noqa: E402

sys.exit(main(FOLDER))
'''

_BUILD = """\
#!/bin/sh
# Builds an engine from each model on this device with trtexec 10 or 11; arguments are passed on to trtexec.
set -eu
cd "$(dirname "$0")"
trtexec=${{TRTEXEC:-$(command -v trtexec || echo /usr/src/tensorrt/bin/trtexec)}}
if [ ! -x "$trtexec" ]; then
    echo "no trtexec at $trtexec: install TensorRT, or set TRTEXEC" >&2
    exit 4
fi
help=$("$trtexec" --help 2>&1 || true)
# The first line ends in [TensorRT v8601] for 8.6.1 and in [TensorRT v100300] for 10.3.0.
version=$(printf '%s\\n' "$help" | sed -n 's/.*\\[TensorRT v\\([0-9][0-9]*\\).*/\\1/p' | head -n 1)
major=${{version:-0}}
if [ "$major" -ge 10000 ]; then
    major=$((major / 10000))
elif [ "$major" -ge 1000 ]; then
    major=$((major / 1000))
fi
if [ "$major" -lt 10 ]; then
    release="does not name its TensorRT release"
    [ "$major" -eq 0 ] || release="belongs to TensorRT $major"
    echo "$trtexec $release, and this kit needs TensorRT 10 or newer: older ones choose the precision themselves" >&2
    exit 4
fi
# Precision lives in the ONNX. 10 needs a flag for that; 11 always works so and may lack the flag.
flags=""
for flag in --stronglyTyped --noTF32 --skipInference; do
    if printf '%s\\n' "$help" | grep -q -- "$flag"; then
        flags="$flags $flag"
    fi
done
for model in {models}; do
    "$trtexec" --onnx="$model" --saveEngine="${{model%.onnx}}.engine" $flags \\
        --minShapes={lowest} --optShapes={optimum} --maxShapes={highest} "$@"
done
"""


def write_kit(
    target: Path,
    models: Sequence[Path],
    samples: Path,
    *,
    thresholds: Mapping[str, Any],
    batch: BatchProfile | None = None,
) -> Path:
    """Writes the kit, whole or not at all; an existing kit is replaced.

    ``models`` are typed ONNX files of one student, ``samples`` the run's samples.npz, ``thresholds`` the gates of
    ``dfadc verify`` as plain values; ``batch`` is that of the engines that build.sh builds.

    Raises:
        DfadcError: there is no model, or one is not ONNX.
        StorageFailed: the folder cannot be written.
    """
    if not models:
        raise DfadcError("a device kit needs a typed ONNX, and there is none", "add -e onnx:fp16")
    facts = {"schema": SCHEMA, "thresholds": dict(thresholds), "models": _facts(models)}
    size = "x".join(map(str, json.loads(_own_metadata(models[0])[f"{METADATA_PREFIX}contract"])["input_size"]))
    sides = asdict(batch or BatchProfile())
    shapes = {name: f"{INPUT_NAME}:{images}x{size}" for name, images in sides.items()}
    build = _BUILD.format(models=" ".join(model.name for model in models), **shapes)
    with storage_errors(f"write the kit {target}", "free some space"):
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as scratch:
            draft = Path(scratch) / target.name
            for module in carried_files():
                (draft / module).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(_source(module), draft / module)
            for model in models:
                shutil.copyfile(model, draft / model.name)
            shutil.copyfile(samples, draft / "samples.npz")
            (draft / "kit.json").write_text(json.dumps(facts, indent=2, allow_nan=False) + "\n", encoding="utf-8")
            (draft / "check.py").write_text(_CHECK, encoding="utf-8")
            (draft / "build.sh").write_text(build, encoding="utf-8")
            mode = (draft / "build.sh").stat().st_mode
            (draft / "build.sh").chmod(mode | (mode & 0o444) >> 2)  # executable for all who may read it
            aside = Path(scratch) / "replaced"
            aside.mkdir()
            replace_together({target: draft}, aside)
    return target


def _facts(models: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """File -> precision, sha256 and form, for the models and for the engines that will be built from them."""
    facts: dict[str, dict[str, Any]] = {}
    for model in models:
        metadata = _own_metadata(model)
        form = {key: metadata[key] for key in (f"{METADATA_PREFIX}input", f"{METADATA_PREFIX}output")}
        precision = metadata[f"{METADATA_PREFIX}precision"]
        facts[model.name] = {"precision": precision, "sha256": sha256_file(model), "form": form}
        facts[f"{model.stem}.engine"] = {"precision": precision, "sha256": None, "form": form}
    return facts


def _own_metadata(model: Path) -> dict[str, str]:
    """The metadata of dfadc in an ONNX file, which describes its inputs and outputs; refuses one without it."""
    metadata = read_metadata(load_onnx(model))
    for key in ("contract", "input", "output", "precision"):
        if f"{METADATA_PREFIX}{key}" not in metadata:
            raise DfadcError(f"{model} has no metadata dfadc.{key}: dfadc did not write it", "export it with dfadc")
    return metadata


def carried_files() -> list[str]:
    """Python files of a kit, as paths relative to the folder of both packages."""
    files: list[str] = []
    for name in CARRIED:
        root = _source(name)
        files += [name] if name.endswith(".py") else sorted(f"{name}/{path.name}" for path in root.glob("*.py"))
    return files


def _source(file: str) -> Path:
    """Path of a file or folder of the installed packages."""
    package, _, rest = file.partition("/")
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise DfadcError(f"the package {package} is not installed as files", "install dfadc with pip")
    return Path(next(iter(spec.submodule_search_locations))) / rest
