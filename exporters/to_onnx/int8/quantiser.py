"""INT8 graphs by ONNX Runtime's quantiser: one calibration serves any choice of fp32 layers. Free of torch."""

from __future__ import annotations

from functools import cached_property
from itertools import count
from typing import TYPE_CHECKING

import onnx
from onnx import TensorProto
from onnxruntime.quantization import QDQQuantizer, QuantType

from exporters.to_onnx.file import all_nodes
from exporters.to_onnx.int8.calibration import OPERATORS, quantiser_errors

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator

    from onnxruntime.quantization import TensorsData

    from exporters.to_onnx.int8.presets import Preset


class Quantiser:
    """Makes INT8 graphs from one fp32 graph and ranges that were measured once.

    Args:
        source: the fp32 graph, in which no two inputs read the same constant (see :func:`with_separate_constants`).
        ranges: of its activations, from :func:`calibrate`.
        preset: how activations and biases are quantised.
        fp32_layers: names of layers that are in fp32 in every graph.
    """

    def __init__(
        self, source: onnx.ModelProto, ranges: TensorsData, preset: Preset, fp32_layers: Iterable[str] = ()
    ) -> None:
        self._source = source
        self._ranges = ranges
        self._preset = preset
        self.fp32_layers = frozenset(fp32_layers)

    @cached_property
    def layers(self) -> list[str]:
        """Names of the nodes that compute on several quantised inputs: convolutions, matrix products, additions, ..."""
        model = self._run(_final_softmax(self._source))
        producers = {name: node for node in model.graph.node for name in node.output}
        return [node.name for node in model.graph.node if len(list(_dequantised_inputs(node, producers))) > 1]

    def quantise(self, fp32_layers: Iterable[str] = ()) -> onnx.ModelProto:
        """The INT8 graph with more layers in fp32: their weights, their biases and the activations they read.

        The graph's outputs are never rounded: in 256 steps the two highest logits are often one. Rounding them saves
        nothing, for no layer reads them, and cost 0.1 to 0.2 points of real accuracy.

        Raises:
            ExportFailed: ONNX Runtime cannot quantise the graph.
            StorageFailed: the folder of temporary files cannot be written.
        """
        excluded = self._excluded(self.fp32_layers.union(fp32_layers))
        model = self._run(excluded)
        _bypass_rounding(model.graph, excluded)
        metadata = {entry.key: entry.value for entry in self._source.metadata_props}
        del model.metadata_props[:]
        onnx.helper.set_model_props(model, metadata)
        model.producer_name, model.producer_version = self._source.producer_name, self._source.producer_version
        return model

    def _run(self, excluded: Collection[str]) -> onnx.ModelProto:
        """ONNX Runtime's own result, outputs rounded."""
        copy = onnx.ModelProto()
        copy.CopyFrom(self._source)
        with quantiser_errors():
            quantizer = QDQQuantizer(
                copy,
                per_channel=True,
                reduce_range=False,
                weight_qType=QuantType.QInt8,
                activation_qType=self._preset.activations,
                tensors_range=self._ranges,
                nodes_to_quantize=[],
                nodes_to_exclude=sorted(excluded),
                op_types_to_quantize=OPERATORS,
                extra_options=self._preset.options,
            )
            model: onnx.ModelProto = quantizer.quantize_model()
            quantizer.model.topological_sort()
        return model

    def _excluded(self, fp32_layers: Iterable[str]) -> set[str]:
        """Nodes to exclude: the fp32 layers, and what only carries activations to them or to the graph's outputs.

        Carriers (ReLU, reshape, pooling, softmax) would round what they pass on.
        """
        producers = {name: node for node in self._source.graph.node for name in node.output}
        nodes = {node.name: node for node in self._source.graph.node}
        excluded = set(fp32_layers)
        pending = [output.name for output in self._source.graph.output]
        pending += [name for layer in excluded for name in nodes[layer].input]
        while pending:
            node = producers.get(pending.pop())
            if node is not None and node.name not in excluded and node.name not in self.layers:
                excluded.add(node.name)
                pending += node.input
        return excluded


def with_separate_constants(source: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of a graph in which no two inputs read the same fp32 constant.

    Equal tensors are stored once, and a layer may be used twice. Quantised, a shared weight has one DequantizeLinear,
    which ONNX Runtime cannot load with ``session.x64quantprecision``; a shared bias has the scale of one reader only,
    and cannot go back to fp32 for one of them.
    """
    model = onnx.ModelProto()
    model.CopyFrom(source)
    constants = {tensor.name: tensor for tensor in source.graph.initializer if tensor.data_type == TensorProto.FLOAT}
    taken = {name for node in all_nodes(source.graph) for name in (*node.input, *node.output)}
    read: set[str] = set()
    for node in model.graph.node:
        for position, name in enumerate(node.input):
            if name in read and name in constants:
                own = next(f"{name}_{n}" for n in count(2) if f"{name}_{n}" not in taken)
                taken.add(own)
                copy = model.graph.initializer.add()
                copy.CopyFrom(constants[name])
                copy.name = node.input[position] = own
            read.add(name)
    return model


def _final_softmax(source: onnx.ModelProto) -> list[str]:
    """An embedded softmax: its probabilities in 256 steps would lose every class but the likeliest."""
    outputs = {value.name for value in source.graph.output}
    return [node.name for node in source.graph.node if node.op_type == "Softmax" and outputs.intersection(node.output)]


def _bypass_rounding(graph: onnx.GraphProto, names: Collection[str]) -> None:
    """Lets named nodes and the graph's outputs read activations as they are before QuantizeLinear, in place.

    ONNX Runtime replaces a quantised activation for all its readers, those that are excluded from quantisation too.
    """
    producers = {name: node for node in graph.node for name in node.output}
    for output in graph.output:
        dequantise = producers[output.name]
        if dequantise.op_type == "DequantizeLinear":
            quantise = producers[dequantise.input[0]]
            writer = producers[quantise.input[0]]
            dequantise.output[0] += "_unread"
            position = list(writer.output).index(quantise.input[0])
            quantise.input[0] = writer.output[position] = output.name
    for node in graph.node:
        if node.name in names:
            for position, dequantise in _dequantised_inputs(node, producers):
                quantise_node = producers.get(dequantise.input[0])
                if quantise_node is not None:
                    node.input[position] = quantise_node.input[0]
    _drop_unread(graph)


def _dequantised_inputs(
    node: onnx.NodeProto, producers: dict[str, onnx.NodeProto]
) -> Iterator[tuple[int, onnx.NodeProto]]:
    """Position of each input that comes out of a DequantizeLinear, and that node."""
    for position, name in enumerate(node.input):
        if (producer := producers.get(name)) is not None and producer.op_type == "DequantizeLinear":
            yield position, producer


def _drop_unread(graph: onnx.GraphProto) -> None:
    """Removes QuantizeLinear and DequantizeLinear nodes that nothing reads, with their constants."""
    outputs = {value.name for value in graph.output}
    while True:
        read = {name for node in graph.node for name in node.input} | outputs
        linear = (node for node in graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear"))
        unread = [node for node in linear if not read.intersection(node.output)]
        if not unread:
            break
        for node in unread:
            graph.node.remove(node)
    written = {name for node in graph.node for name in node.output}
    for tensors, alive in ((graph.initializer, read), (graph.value_info, written)):
        kept = [tensor for tensor in tensors if tensor.name in alive]
        del tensors[:]
        tensors.extend(kept)
