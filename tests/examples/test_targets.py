"""Every family of students through every export: nothing crashes, fp32 and fp16 pass, and what fails says why."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command_line import Outcome, run_python, run_script

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "targets" / "table.py"
EXPORTS = ("onnx", "onnx:fp16", "onnx:int8", "openvino:fp16")
#: A Transpose that crashed ONNX Runtime and shared constants; batch norms that survive.
QUICK = ("vit", "mobilenet_v3_small")
#: A cast of bool; shared constants in convolutions; channels in groups: each is tested where it is converted, too.
SLOW = ("edgenext_xx_small", "repvit_m0_9", "shufflenet_v2")


def table(*arguments: object) -> Outcome:
    """The script in a process of its own, as a person starts it."""
    program = "import runpy, sys; del sys.argv[0]; sys.path.insert(0, sys.argv[0].rpartition('/')[0])\n"
    return run_python(f"{program}runpy.run_path(sys.argv[0], run_name='__main__')", SCRIPT, *arguments)


@pytest.mark.example
@pytest.mark.parametrize("family", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_a_family_passes_in_fp32_and_fp16(family: str, tmp_path: Path) -> None:
    """After a few steps only: INT8 is built, or says why; it is judged in the slow test."""
    pytest.importorskip("openvino", reason="pip install openvino")
    if "timm" in (SCRIPT.parent / "students.py").read_text().partition(f'"{family}": "')[2].partition('"')[0]:
        pytest.importorskip("timm", reason="pip install timm")
    exports = [part for export in EXPORTS for part in ("--export", export)]
    quick = ("--steps", 8, "--calibrator", "minmax", "--keep-fp32", "none", "--out", tmp_path / "cells", "--in-process")
    done = run_script(SCRIPT, "--family", family, *exports, *quick)
    assert done.code == 0, done.err
    lines = (tmp_path / "cells").read_text().splitlines()
    cells = {export: (text, why, broken) for _, export, text, why, broken in map(json.loads, lines)}
    assert list(cells) == list(EXPORTS)
    assert not any(broken for _, _, broken in cells.values()), cells
    for export in ("onnx", "onnx:fp16", "openvino:fp16"):
        assert cells[export][0].startswith("PASS"), cells[export]
    text, why, _ = cells["onnx:int8"]
    assert text.startswith("PASS") or why, text


@pytest.mark.example
def test_it_prints_a_table_and_exits_with_1_where_a_cell_broke(tmp_path: Path) -> None:
    out = tmp_path / "cells"
    quick = ("--family", "vit", "--steps", 1, "--export", "onnx", "--out", out)
    good = table(*quick)
    assert good.code == 0, good.err
    assert "| family | onnx |\n|---|---|\n| vit | PASS 100.0% |" in good.out
    again = table(*quick)  # what the file holds is not made again
    assert (again.out, again.err) == (good.out, "")
    out.unlink()
    broken = table(*quick, "--export", "onnx:fp16", "--size", 31)  # no multiple of the patches
    assert broken.code == 1
    assert "| vit | crashed | crashed |" in broken.out
    assert "- vit onnx:fp16: its process ended with 2" in broken.out
    unknown = table("--family", "vitt")
    assert (unknown.code, unknown.errors) == (2, ["error: unknown family 'vitt'"])


@pytest.mark.slow
@pytest.mark.parametrize("size", [32, 64])
def test_no_cell_of_the_table_breaks(size: int, tmp_path: Path) -> None:
    for package in ("openvino", "timm", "tensorrt_rtx"):
        pytest.importorskip(package)
    done = table("--size", size, "--out", tmp_path / "cells")
    print(done.out)
    assert done.code == 0, done.out
    rows = [line for line in done.out.splitlines() if line.startswith("| ")]
    assert len(rows) == 1 + 19
