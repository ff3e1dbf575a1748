"""Which layers INT8 hurts most, and an INT8 graph with the fewest of them back in fp32. Free of torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import onnx

from dfadc.verification.agreement import Agreement, compare
from dfadc.verification.gate import default_export_limits
from exporters.sessions import OnnxRuntimeSession

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    import numpy as np
    from numpy.typing import NDArray

#: Agreement with fp32 on the held-out images below which INT8 has lost something. The gate asks for a lower bound of
#: 0.97 on 2,048 samples, so for 0.978; the few hundred held-out images tell agreement to about a point only.
LEAST_AGREEMENT = 0.99
LEAST_SQNR_DB = default_export_limits()["int8"].min_sqnr_db or 0.0
#: Images that a layer is tried on alone; the graph that is kept is judged on all.
_RANKING_IMAGES = 64
#: No more than this share of the layers goes back to fp32: beyond it, fp16 is the better artifact.
_LARGEST_SHARE = 0.5


@dataclass(frozen=True, slots=True)
class Layer:
    """How well the INT8 graph does with this layer alone back in fp32."""

    name: str
    alone_in_fp32: Agreement


@dataclass(frozen=True, slots=True)
class Recovered:
    """An INT8 graph with ``kept`` back in fp32, and its agreement with the fp32 graph."""

    model: onnx.ModelProto
    kept: tuple[str, ...]
    agreement: Agreement


def has_recovered(found: Agreement) -> bool:
    """Whether INT8 answers as fp32 does, nearly."""
    return found.agreement >= LEAST_AGREEMENT and found.sqnr_db >= LEAST_SQNR_DB


def rank_layers(
    quantised: onnx.ModelProto, source: onnx.ModelProto, images: NDArray[np.float32], reference: NDArray[np.float32]
) -> list[Layer]:
    """Every quantised layer, the worst first: the one whose return to fp32 brings the answers back the furthest.

    Args:
        quantised: the INT8 graph.
        source: the fp32 graph that it was made of.
        images: (N, C, H, W); the first few are used.
        reference: (N, K), the fp32 graph's answers.
    """
    images, reference = images[:_RANKING_IMAGES], reference[:_RANKING_IMAGES]
    layers = [
        Layer(name, compare(logits_of(in_fp32(quantised, source, [name]), images), reference))
        for name in _layer_names(quantised)
    ]
    return sorted(layers, key=lambda layer: (-layer.alone_in_fp32.k, -layer.alone_in_fp32.sqnr_db))


def recover(
    quantised: onnx.ModelProto,
    source: onnx.ModelProto,
    images: NDArray[np.float32],
    reference: NDArray[np.float32],
    *,
    ranking: Iterable[Layer],
) -> Recovered:
    """Returns layers to fp32, the worst first, until agreement recovers; then takes back what was not needed.

    Where it does not recover, the best graph that was seen is returned.
    """

    def attempt(names: Iterable[str]) -> Recovered:
        model = in_fp32(quantised, source, names)
        return Recovered(model, tuple(names), compare(logits_of(model, images), reference))

    order = [layer.name for layer in ranking]
    tried = []
    for count in range(1, max(1, int(_LARGEST_SHARE * len(order))) + 1):
        tried.append(attempt(order[:count]))
        if has_recovered(tried[-1].agreement):
            break
    else:
        return max(tried, key=lambda found: (found.agreement.k, found.agreement.sqnr_db))
    best = tried[-1]
    for name in order[: len(best.kept) - 1]:
        without = attempt([kept for kept in best.kept if kept != name])
        if without.kept and has_recovered(without.agreement):
            best = without
    return best


def in_fp32(quantised: onnx.ModelProto, source: onnx.ModelProto, names: Iterable[str]) -> onnx.ModelProto:
    """A copy of an INT8 graph in which the named layers read fp32 activations and the source's fp32 weights.

    What carries an activation to them (ReLU, reshape, pooling) goes along: it would read rounded values otherwise.
    """
    model = onnx.ModelProto()
    model.CopyFrom(quantised)
    graph = model.graph
    producer = {name: node for node in graph.node for name in node.output}
    originals = {node.name: node for node in source.graph.node}
    weights = {tensor.name: tensor for tensor in source.graph.initializer}
    present = {tensor.name for tensor in graph.initializer}
    pending = [node for node in graph.node if node.name in set(names)]
    while pending:
        node = pending.pop()
        for position, dequantise in _dequantised_inputs(node, producer):
            quantise = producer.get(dequantise.input[0])
            if quantise is None:  # a weight, or a bias
                name = originals[node.name].input[position]
                if name not in present:
                    graph.initializer.append(weights[name])
                    present.add(name)
                node.input[position] = name
                continue
            node.input[position] = quantise.input[0]
            carrier = producer.get(quantise.input[0])
            if carrier is not None and len(_dequantised_inputs(carrier, producer)) == 1:
                pending.append(carrier)
    _drop_unread(graph)
    return model


def logits_of(model: onnx.ModelProto, images: NDArray[np.float32]) -> NDArray[np.float32]:
    """(N, K), what a graph answers on ONNX Runtime's CPU provider with one thread."""
    with OnnxRuntimeSession(model.SerializeToString(), threads=1) as session:
        return session.run(images)


def _layer_names(model: onnx.ModelProto) -> list[str]:
    """Nodes that compute on several quantised inputs: convolutions and matrix products, additions, ..."""
    producer = {name: node for node in model.graph.node for name in node.output}
    return [node.name for node in model.graph.node if len(_dequantised_inputs(node, producer)) > 1]


def _dequantised_inputs(node: onnx.NodeProto, producer: dict[str, onnx.NodeProto]) -> list[tuple[int, onnx.NodeProto]]:
    """Position of each input that comes out of a DequantizeLinear, and that node."""
    found = ((position, producer.get(name)) for position, name in enumerate(node.input))
    return [(position, made_by) for position, made_by in found if made_by and made_by.op_type == "DequantizeLinear"]


def _drop_unread(graph: onnx.GraphProto) -> None:
    """Removes quantisation that nobody reads any more, and its weights."""
    outputs = {value.name for value in graph.output}
    while True:
        read = _read(graph) | outputs
        unread = [
            node
            for node in graph.node
            if node.op_type in ("QuantizeLinear", "DequantizeLinear") and not read.intersection(node.output)
        ]
        if not unread:
            break
        for node in unread:
            graph.node.remove(node)
    kept = [tensor for tensor in graph.initializer if tensor.name in read]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    written: Collection[str] = {name for node in graph.node for name in node.output}
    values = [value for value in graph.value_info if value.name in written]
    del graph.value_info[:]
    graph.value_info.extend(values)


def _read(graph: onnx.GraphProto) -> set[str]:
    return {name for node in graph.node for name in node.input}
