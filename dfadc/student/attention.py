"""Attention blocks: which of their tensors are made of heads."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

#: Names of a block's number of heads: torch and timm, transformers.
_HEADS = ("num_heads", "num_attention_heads")
#: Names of the layer that reads the heads, beside the queries, keys and values or beside their module.
_OUTPUTS = ("proj", "out_proj", "output.dense", "o_proj")


class Part(NamedTuple):
    """Axis of a tensor that is made of heads.

    Args:
        name: of the tensor in the network's state dict.
        axis: of it.
        copies: times that the heads follow each other there: 3 where queries, keys and values are packed.
    """

    name: str
    axis: int
    copies: int = 1


class Attention(NamedTuple):
    """Block whose queries, keys and values are made of heads.

    Args:
        num_heads: of them.
        parts: axes along which channels are those of the heads.
        tables: names of tensors with a column for each head: relative positions.
    """

    num_heads: int
    parts: tuple[Part, ...]
    tables: tuple[str, ...] = ()


def find_attention(network: nn.Module) -> dict[str, Attention]:
    """Attention blocks by name: torch's, torchvision's and timm's with packed queries, and those of transformers."""
    return {name: block for name, module in network.named_modules() if (block := _describe(network, name, module))}


def _describe(network: nn.Module, name: str, module: nn.Module) -> Attention | None:
    num_heads = next((value for each in _HEADS if isinstance(value := getattr(module, each, None), int)), None)
    if not num_heads:
        return None
    own = dict(module.named_parameters())
    at = f"{name}." if name else ""
    for packed in ("in_proj_", "qkv."):
        if f"{packed}weight" in own:
            parts = [Part(f"{at}{packed}{kind}", 0, 3) for kind in ("weight", "bias") if f"{packed}{kind}" in own]
            break
    else:
        layers = [key for key in ("query", "key", "value", "q_proj", "k_proj", "v_proj") if f"{key}.weight" in own]
        parts = [
            Part(f"{at}{key}.{kind}", 0) for key in layers for kind in ("weight", "bias") if f"{key}.{kind}" in own
        ]
    output = next(_output_names(network, name), None)
    if not parts or output is None:
        return None
    tables = tuple(f"{at}{key}" for key, tensor in own.items() if "bias_table" in key and tensor.ndim == 2)
    return Attention(num_heads, (*parts, Part(output, 1)), tables)


def _output_names(network: nn.Module, name: str) -> Iterator[str]:
    """Weights of the layer that reads a block's heads: within the block, or beside it."""
    names = {key for key, _ in network.named_parameters()}
    for at in (name, name.rpartition(".")[0]):
        for output in _OUTPUTS:
            if (key := ".".join(filter(None, (at, output, "weight")))) in names:
                yield key
