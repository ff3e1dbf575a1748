"""INT8 graphs by ONNX Runtime's quantiser: one calibration serves any choice of fp32 layers. Free of torch."""

from __future__ import annotations

import json
from copy import deepcopy
from functools import cached_property
from typing import TYPE_CHECKING

from onnxruntime.quantization import QDQQuantizer, QuantType

from exporters.to_onnx.file import read_metadata
from exporters.to_onnx.int8.calibration import OPERATORS, quantiser_errors
from exporters.to_onnx.int8.constants import with_int8_weights
from exporters.to_onnx.int8.never import never_quantised
from exporters.to_onnx.int8.rounding import dequantised_inputs, without_rounding

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    import onnx
    from onnxruntime.quantization import TensorsData

    from dfadc.contract import Task
    from exporters.to_onnx.int8.presets import Preset


class Quantiser:
    """Makes INT8 graphs from one fp32 graph and ranges that were measured once.

    Args:
        source: the fp32 graph, after ``constants.with_separate_constants``.
        ranges: of its activations, from :func:`calibrate`.
        fp32_layers: names of layers that are in fp32 in every graph, besides those of :func:`never_quantised`.
    """

    def __init__(
        self, source: onnx.ModelProto, ranges: TensorsData, preset: Preset, fp32_layers: Iterable[str] = ()
    ) -> None:
        self._source = source
        self._ranges = ranges
        self._preset = preset
        self.task = task_of(source)
        self.fp32_layers = frozenset({*fp32_layers, *never_quantised(source)})

    @cached_property
    def layers(self) -> list[str]:
        """Names of the nodes that compute on several quantised inputs: convolutions, matrix products, additions, ..."""
        graph = self._all_int8.graph
        producers = {name: node for node in graph.node for name in node.output}
        return [node.name for node in graph.node if len(list(dequantised_inputs(node, producers))) > 1]

    def quantise(self, fp32_layers: Iterable[str] = ()) -> onnx.ModelProto:
        """The INT8 graph with more layers in fp32: their weights, their biases and the activations they read.

        The graph's outputs are never rounded: in 256 steps the two highest logits are often one. Rounding them saves
        nothing, for no layer reads them, and cost 0.1 to 0.2 points of real accuracy.

        Raises:
            ExportFailed: ONNX Runtime cannot quantise the graph.
            StorageFailed: the folder of temporary files cannot be written.
        """
        excluded = self._excluded(fp32_layers)
        model = without_rounding(self._run(self._source, excluded), excluded)
        del model.metadata_props[:]
        model.metadata_props.extend(self._source.metadata_props)
        model.producer_name, model.producer_version = self._source.producer_name, self._source.producer_version
        return model

    def preview(self, fp32_layers: Iterable[str] = ()) -> onnx.ModelProto:
        """A graph with the same logits as that of :meth:`quantise`, without metadata; for trying many layers.

        ONNX Runtime quantises weights channel by channel in Python, which takes most of the time: 2.4 s for a
        MobileNetV2 on two busy cores, 0.4 s with the weights of the graph in which every layer is INT8.
        """
        excluded = self._excluded(fp32_layers)
        model = self._run(with_int8_weights(self._all_int8, self._source, excluded), excluded)
        return without_rounding(model, excluded)

    @cached_property
    def _all_int8(self) -> onnx.ModelProto:
        """The graph with every layer in INT8, its outputs rounded."""
        return self._run(self._source, _final_softmax(self._source))

    def _run(self, source: onnx.ModelProto, excluded: Collection[str]) -> onnx.ModelProto:
        """ONNX Runtime's own result, outputs rounded."""
        with quantiser_errors():
            quantizer = QDQQuantizer(
                deepcopy(source),
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
        excluded = set(self.fp32_layers.union(fp32_layers))
        pending = [output.name for output in self._source.graph.output]
        pending += [name for layer in excluded for name in nodes[layer].input]
        while pending:
            node = producers.get(pending.pop())
            if node is not None and node.name not in excluded and node.name not in self.layers:
                excluded.add(node.name)
                pending += node.input
        return excluded


def task_of(source: onnx.ModelProto) -> Task:
    """Task in the contract that an exported graph carries; classification for a graph without one."""
    task: Task = json.loads(read_metadata(source).get("dfadc.contract", "{}")).get("task", "classification")
    return task


def _final_softmax(source: onnx.ModelProto) -> list[str]:
    """An embedded softmax: its probabilities in 256 steps would lose every class but the likeliest."""
    outputs = {value.name for value in source.graph.output}
    return [node.name for node in source.graph.node if node.op_type == "Softmax" and outputs.intersection(node.output)]
