"""Batch norms of exported programs: nodes of a graph, turned back into layers that can be found and watched."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

if TYPE_CHECKING:
    from collections.abc import Mapping

#: Batch norm by running statistics as torch.export writes it, and as ``run_decompositions`` rewrites it, which then
#: gives a tuple. Both take input, weight, bias, mean and variance first; the value is the place of epsilon.
_FORMS = {
    torch.ops.aten.batch_norm.default: 7,
    torch.ops.aten._native_batch_norm_legit_no_training.default: 6,  # noqa: SLF001 -- it has no other name
}
_TENSORS = ("weight", "bias", "running_mean", "running_var")


class ExportedBatchNorm(nn.Module):
    """A batch norm in eval mode that stands where a node of the graph stood.

    Args:
        tensors: parameters and buffers, each (C,), by the names that ``nn.BatchNorm2d`` gives them; weight and bias may
            be missing or None.
        epsilon: added to the variance.
    """

    def __init__(self, tensors: Mapping[str, Tensor | None], epsilon: float) -> None:
        super().__init__()
        self.eps = epsilon
        for name, tensor in tensors.items():
            if isinstance(tensor, nn.Parameter):
                self.register_parameter(name, tensor)
            else:
                self.register_buffer(name, tensor)

    def forward(self, maps: Tensor) -> Tensor:
        """Maps (N, C, ...) in and out."""
        weight, bias, mean, variance = (getattr(self, name, None) for name in _TENSORS)
        return functional.batch_norm(maps, mean, variance, weight, bias, eps=self.eps)


def restore_batch_norms_(module: nn.Module) -> None:
    """Replaces the batch-norm nodes of an exported graph by calls of layers, in place; all else stays as it is.

    In a loaded program the statistics hang on containers that nothing ever calls, and the batch norm is a function:
    there is nothing to watch. What is not a layer's own batch norm any more (training mode, weights that were folded,
    FrozenBatchNorm2d, which is exported as plain arithmetic) stays a node.
    """
    if not isinstance(module, fx.GraphModule):
        return
    for node in list(module.graph.nodes):
        if node.op == "call_function" and node.target in _FORMS and (owner := _owner_of(module, node)):
            _restore(module, node, owner)
    module.graph.lint()
    module.recompile()


def _owner_of(module: fx.GraphModule, node: fx.Node) -> str:
    """Path of the container that holds all tensors of a batch norm under their own names; empty if there is none."""
    trains = len(node.args) == 9 and node.args[5] is not False
    sources = {name: source for name, source in zip(_TENSORS, node.args[1:5], strict=True) if source is not None}
    paths = {name: str(getattr(source, "target", "")) for name, source in sources.items()}
    owner = paths.get("running_mean", "").rpartition(".")[0]
    if trains or not owner or any(path != f"{owner}.{name}" for name, path in paths.items()):
        return ""
    return "" if list(module.get_submodule(owner).children()) else owner


def _restore(module: fx.GraphModule, node: fx.Node, owner: str) -> None:
    container = module.get_submodule(owner)
    if not isinstance(container, ExportedBatchNorm):  # else the network calls the layer more than once
        epsilon = node.args[_FORMS[cast("Any", node.target)]]
        tensors = {**dict(container.named_parameters()), **dict(container.named_buffers())}
        module.set_submodule(owner, ExportedBatchNorm(tensors, cast("float", epsilon)))
    with module.graph.inserting_before(node):
        call = module.graph.call_module(owner, (node.args[0],))
    # The second form gives a tuple, of which eval mode uses the first part alone.
    firsts = [use for use in node.users if use.target is operator.getitem]
    for output in firsts or [node]:
        output.replace_all_uses_with(call)
    for dead in (*firsts, node):
        module.graph.erase_node(dead)
