"""Files that are damaged, edited or not ours, and backends that lack something: one clear error each, nothing lost."""

from __future__ import annotations

import json
import shutil
import sys
from typing import TYPE_CHECKING

import numpy as np
import onnx
import pytest
from command_line import files_of, run_command
from onnx import TensorProto, helper, numpy_helper

from dfadc.errors import DfadcError, ExportFailed, RuntimeRefused
from dfadc.run_folder import RunFolder
from exporters.exporter import BuildSettings, ExportRequest
from exporters.kit.write import write_kit
from exporters.registry import get_exporter
from exporters.sessions.onnx_runtime import OnnxRuntimeSession

if TYPE_CHECKING:
    from pathlib import Path


def foreign_onnx(
    path: Path,
    *,
    operator: str = "Relu",
    domain: str = "",
    batch: str | int = "batch",
    size: tuple[int, int, int] = (1, 8, 8),
    name: str = "images",
) -> Path:
    """A sound ONNX that dfadc did not make: ``operator``, flatten, one linear layer into ten classes."""
    features = int(np.prod(size))
    weight = np.random.default_rng(0).normal(size=(features, 10)).astype(np.float32)
    graph = helper.make_graph(
        [
            helper.make_node(operator, [name], ["maps"], name="the_operator", domain=domain),
            helper.make_node("Flatten", ["maps"], ["flat"], name="flatten"),
            helper.make_node("MatMul", ["flat", "weight"], ["logits"], name="linear"),
        ],
        "foreign",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [batch, *size])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [batch, 10])],
        [numpy_helper.from_array(weight, "weight")],
    )
    opsets = [helper.make_opsetid("", 20), *([helper.make_opsetid(domain, 1)] if domain else [])]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    return path


def build(export: str, source: Path, folder: Path) -> None:
    request = ExportRequest.parse(export)
    exporter = get_exporter(request.name)
    if not (capability := exporter.capability()).can_build:
        pytest.skip(f"{capability.reason}: {capability.install}")
    target = folder / "built" / request.file_name
    try:
        exporter.export(source, target, request, BuildSettings())
    finally:
        assert not target.exists()


@pytest.fixture
def run_copy(finished_run: RunFolder, tmp_path: Path) -> RunFolder:
    shutil.copytree(finished_run.path, tmp_path / "run")
    return RunFolder(tmp_path / "run")


# Foreign ONNX


def test_a_foreign_onnx_is_run_where_it_fits_and_named_where_it_does_not(
    finished_run: RunFolder, tmp_path: Path
) -> None:
    samples = ("--samples", finished_run.samples)
    fits = foreign_onnx(tmp_path / "fits.onnx")
    judged = run_command("verify", fits, *samples, "--json")
    assert judged.code == 3  # it runs, and its answers are not the student's
    assert json.loads(judged.out)["artifacts"]["fits.onnx"]["verdict"] == "FAIL"
    wide = foreign_onnx(tmp_path / "wide.onnx", size=(3, 16, 16))
    refused = run_command("verify", wide, *samples)
    assert refused.code == 2
    assert "images are 1x8x8, the network takes 3x16x16" in refused.errors[0]
    unknown = run_command("bench", fits)
    assert unknown.code == 2
    assert "fits.onnx does not record its image contract" in unknown.errors[0]
    assert run_command("inspect", fits).code == 0


def test_a_kit_takes_no_foreign_onnx(finished_run: RunFolder, tmp_path: Path) -> None:
    foreign = foreign_onnx(tmp_path / "foreign.onnx")
    with pytest.raises(DfadcError, match=r"foreign\.onnx has no metadata dfadc\.contract"):
        write_kit(tmp_path / "kit", [foreign], finished_run.samples, thresholds={})
    assert not (tmp_path / "kit").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"batch": 4}, "a fixed batch of 4"), ({"name": "pixels"}, "not one called 'images'")],
    ids=["fixed batch", "input name"],
)
def test_an_engine_needs_our_input(changes: dict[str, str | int], message: str, tmp_path: Path) -> None:
    source = foreign_onnx(tmp_path / "foreign.onnx", **changes)  # type: ignore[arg-type]
    with pytest.raises(DfadcError, match=message):
        build("tensorrt-rtx", source, tmp_path)


@pytest.mark.parametrize("export", ["onnx:fp16", "onnx:int8", "openvino", "tensorrt-rtx"])
@pytest.mark.parametrize("content", [b"", b"\x80\x02nonsense", b"cut"], ids=["empty", "nonsense", "cut"])
def test_a_damaged_onnx_builds_nothing(export: str, content: bytes, finished_run: RunFolder, tmp_path: Path) -> None:
    source = tmp_path / "student.onnx"
    whole = (finished_run.artifacts / "student.onnx").read_bytes()
    source.write_bytes(whole[: len(whole) // 2] if content == b"cut" else content)
    with pytest.raises(DfadcError, match=r"student\.onnx") as caught:
        build(export, source, tmp_path)
    assert caught.value.exit_code == 2
    assert caught.value.hint == "export it again"


# What a backend lacks


@pytest.mark.parametrize("export", ["openvino", "tensorrt-rtx"])
def test_an_operator_that_a_backend_lacks_is_named(export: str, tmp_path: Path) -> None:
    source = foreign_onnx(tmp_path / "odd.onnx", operator="Unheard", domain="of.somebody")
    with pytest.raises(ExportFailed, match="Unheard"):
        build(export, source, tmp_path)


def test_an_operator_that_onnx_runtime_lacks_is_named(finished_run: RunFolder, tmp_path: Path) -> None:
    source = foreign_onnx(tmp_path / "odd.onnx", operator="Unheard", domain="of.somebody")
    with pytest.raises(RuntimeRefused, match="Unheard"):
        OnnxRuntimeSession(source)
    outcome = run_command("verify", source, "--samples", finished_run.samples)
    assert outcome.code == 4
    assert "odd.onnx NOT RUN: ONNX Runtime cannot load" in outcome.out
    assert "Unheard" in outcome.out


def test_a_backend_that_is_missing_is_exit_4_with_its_install_line(
    run_copy: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = files_of(run_copy.path)
    for module, export, install in (
        ("openvino", "openvino:int8", "pip install openvino"),
        ("tensorrt_rtx", "tensorrt-rtx", "pip install tensorrt-rtx"),
    ):
        monkeypatch.setitem(sys.modules, module, None)
        outcome = run_command("export", run_copy.path, "-e", "onnx:fp16", "-e", export)
        assert outcome.code == 4
        assert f"cannot build {ExportRequest.parse(export)} here: " in outcome.errors[0]
        assert "is not installed" in outcome.errors[0]
        assert outcome.hints == [f"hint: {install}"]
    assert files_of(run_copy.path) == before


# What changed since the export


@pytest.mark.parametrize(
    ("file", "command"),
    [
        *(("student.onnx", command) for command in (("baseline", "-o", "b.npz"), ("bench",), ("export", "-e", "kit"))),
        *(("student.fp16.openvino.bin", command) for command in (("baseline", "-o", "b.npz"), ("bench",))),
    ],
)
def test_an_edited_artifact_is_refused_by_every_command_but_verify_which_fails_it(
    file: str, command: tuple[str, ...], run_copy: RunFolder
) -> None:
    if file.endswith(".bin"):
        pytest.importorskip("openvino", reason="pip install openvino")
        assert run_command("export", run_copy.path, "-e", "openvino:fp16", "--quiet").code == 0
    path = run_copy.artifacts / file
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    before = files_of(run_copy.path)
    outcome = run_command(command[0], run_copy.path, *command[1:])
    assert outcome.code == 2
    assert f"{file} is not the file that was exported" in outcome.errors[0]
    assert "again" in outcome.hints[0]
    assert files_of(run_copy.path) == before
    judged = run_command("verify", run_copy.path)
    assert judged.code == 3
    assert f"{file} is not the file that was exported" in judged.out


def test_an_engine_of_another_release_is_not_run_and_says_so(run_copy: RunFolder) -> None:
    pytest.importorskip("tensorrt_rtx", reason="pip install tensorrt-rtx")
    assert run_command("export", run_copy.path, "-e", "tensorrt-rtx:fp16", "--quiet").code == 0
    sidecar = run_copy.artifacts / "student.fp16.rtx.engine.json"
    facts = json.loads(sidecar.read_text())
    facts["versions"]["tensorrt_rtx"] = "1.2.0"
    sidecar.write_text(json.dumps(facts))
    engine = run_copy.artifacts / "student.fp16.rtx.engine"
    judged = run_command("verify", engine, "--samples", run_copy.samples)
    assert judged.code == 4
    assert "verdict: NOT RUN" in judged.out
    assert "was built by tensorrt-rtx 1.2.0, and 1." in judged.out
    timed = run_command("bench", engine)
    assert timed.code == 4
    assert "tensorrt_rtx==1.2.0" in timed.hints[0]
