"""Proves that a gate blocks: damages the student of a finished run on purpose, and `dfadc verify` must fail each time.

    python examples/ci/prove_the_gate_blocks.py runs/demo

A gate that nobody has seen fail is a hope. Every candidate goes the way a model of your own CI job goes, as one ONNX
file beside the run's samples and a baseline; an unharmed copy must pass. Exits 0 if all of it is so, else 1.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import onnx
from onnx import numpy_helper
from onnxruntime.quantization import QuantType, quantize_dynamic

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

PASSED, GATE_FAILED = 0, 3
#: The share of each convolution's output channels that pruning takes: those with the smallest weights.
PRUNED_SHARE = 0.1
#: Channels are rescaled by up to this power of two.
LARGEST_EXPONENT = 8


class Candidate(NamedTuple):
    """A model as a CI job may bring it.

    Args:
        name: what was done to the student.
        make: writes it, from the run's student.onnx.
        precision: what it is judged as; INT8's limits are the most lenient.
        exit_code: what `dfadc verify` must say of it.
    """

    name: str
    make: Callable[[Path, Path], object]
    precision: str
    exit_code: int


def rescale_channels(source: Path, target: Path) -> None:
    """The same function with unequal channels: what goes up before a ReLU goes down in the convolution after it.

    Folded batch norms leave networks such as MobileNets like this. It harms nothing, until one scale must fit a tensor.
    """
    model = onnx.load(source)
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    random = np.random.default_rng(0)
    for first, second in convolution_pairs(model.graph):
        channels = weights[first.input[1]].dims[0]
        factors = (2.0 ** random.integers(0, LARGEST_EXPONENT + 1, channels)).astype(np.float32)
        for name in first.input[1:]:
            multiply(weights[name], factors.reshape(-1, *[1] * (len(weights[name].dims) - 1)))
        multiply(weights[second.input[1]], 1 / factors.reshape(1, -1, 1, 1))
    onnx.save(model, target)


def quantise_per_tensor(source: Path, target: Path) -> None:
    """INT8 as the quickest tutorial makes it, dynamic with one scale a tensor, of a student with unequal channels."""
    rescale_channels(source, target)
    logging.getLogger().setLevel(logging.ERROR)  # it advises preprocessing, which would change nothing here
    quantize_dynamic(target, target, per_channel=False, weight_type=QuantType.QInt8)


def prune_channels(source: Path, target: Path) -> None:
    """Sets a tenth of each convolution's output channels to zero, the weakest ones, and trains no more."""
    model = onnx.load(source)
    for tensor in model.graph.initializer:
        if len(tensor.dims) == 4:
            strength = np.abs(numpy_helper.to_array(tensor)).sum(axis=(1, 2, 3))
            kept = np.argsort(np.argsort(strength)) >= PRUNED_SHARE * len(strength)
            multiply(tensor, kept.astype(np.float32).reshape(-1, 1, 1, 1))
    onnx.save(model, target)


def shuffle_classes(source: Path, target: Path) -> None:
    """Every class answers in its neighbour's place, as after a change in the order of a label file."""
    model = onnx.load(source)
    output = model.graph.output[0]
    node = next(node for node in model.graph.node if output.name in node.output)
    node.output[list(node.output).index(output.name)] = "in_order"
    order = np.roll(np.arange(output.type.tensor_type.shape.dim[1].dim_value), 1)
    model.graph.initializer.append(numpy_helper.from_array(order, "order"))
    model.graph.node.append(onnx.helper.make_node("Gather", ["in_order", "order"], [output.name], axis=1))
    onnx.save(model, target)


CANDIDATES = (
    Candidate("unharmed copy", shutil.copyfile, "fp32", PASSED),
    Candidate("channels rescaled", rescale_channels, "fp32", PASSED),
    Candidate("dynamic INT8 per tensor", quantise_per_tensor, "int8", GATE_FAILED),
    Candidate("a tenth of the channels pruned", prune_channels, "int8", GATE_FAILED),
    Candidate("classes shuffled", shuffle_classes, "int8", GATE_FAILED),
)


def convolution_pairs(graph: onnx.GraphProto) -> Iterator[tuple[onnx.NodeProto, onnx.NodeProto]]:
    """Convolutions with nothing but a ReLU between them."""
    producers = {output: node for node in graph.node for output in node.output}
    users: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            users.setdefault(name, []).append(node)
    for relu in graph.node:
        if relu.op_type == "Relu":
            first, following = producers.get(relu.input[0]), users.get(relu.output[0], [])
            if first is not None and [first.op_type, *(node.op_type for node in following)] == ["Conv", "Conv"]:
                yield first, following[0]


def multiply(tensor: onnx.TensorProto, factors: NDArray[np.float32]) -> None:
    """Multiplies stored weights in place."""
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * factors, tensor.name))


def verify(file: Path, run: Path, baseline: Path, precision: str) -> tuple[int, dict[str, Any]]:
    """Exit code and report of `dfadc verify` for one file."""
    command = [
        *(sys.executable, "-m", "dfadc", "verify", str(file), "--samples", str(run / "samples.npz")),
        *("--baseline", str(baseline), "--max-drop", "0.01", "--precision", precision, "--json"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 -- our own command
    if not done.stdout:
        sys.exit(f"dfadc verify {file.name} ended with {done.returncode}:\n{done.stderr}")
    return done.returncode, json.loads(done.stdout)


def main() -> int:
    """Damages, judges and prints; see the module."""
    parser = argparse.ArgumentParser(description="Prove that the gate blocks damaged students.")
    parser.add_argument("run", type=Path, help="folder of a finished run that passes its gates")
    run: Path = parser.parse_args().run
    source = run / "artifacts" / "student.onnx"
    proven = True
    with tempfile.TemporaryDirectory() as scratch:
        baseline = Path(scratch) / "baseline.npz"
        freeze = [sys.executable, "-m", "dfadc", "baseline", str(run), "-o", str(baseline), "--quiet"]
        subprocess.run(freeze, check=True, stdout=subprocess.DEVNULL)  # noqa: S603 -- our own command
        for candidate in CANDIDATES:
            # Networks are matched by file name: the damaged file has that of the original.
            file = Path(scratch) / candidate.name.replace(" ", "_") / source.name
            file.parent.mkdir()
            candidate.make(source, file)
            code, report = verify(file, run, baseline, candidate.precision)
            proven &= code == candidate.exit_code
            entry = report["artifacts"][file.name]
            wanted = "as it must" if code == candidate.exit_code else f"and must be {candidate.exit_code}"
            print(f"{candidate.name}: exit {code}, {wanted}; agreement with the teacher {entry['agreement']:.2%}")
            for check in entry["checks"]:
                print(f"    {check['verdict']}  {check['message']}")
    print("the gate blocks" if proven else "THE GATE DOES NOT BLOCK")
    return 0 if proven else 1


if __name__ == "__main__":
    sys.exit(main())
