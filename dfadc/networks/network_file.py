"""Network files: safetensors that carry architecture and contract in their metadata.

A run's ``student.safetensors`` and a "dfadc teacher file" are this one format.
"""

from __future__ import annotations

import json
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import safetensors
import safetensors.torch
from torch import Tensor, nn

from dfadc.contract import ImageContract
from dfadc.errors import DfadcError
from dfadc.networks.adaptation import adapt, random_images
from dfadc.networks.architecture_name import split_arguments
from dfadc.networks.logits import unwrap
from dfadc.networks.names import build_architecture, resolve_architecture
from dfadc.networks.state_dict import load_strictly_
from dfadc.networks.stems import Stem, parse_stem
from dfadc.storage import atomic_write_bytes

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping
    from pathlib import Path

SCHEMA = "1"
SCHEMA_KEY = "dfadc.schema"
ARCHITECTURE_KEY = "dfadc.architecture"
STEM_KEY = "dfadc.stem"
CONTRACT_KEY = "dfadc.contract"
_RESERVED = (SCHEMA_KEY, ARCHITECTURE_KEY, STEM_KEY, CONTRACT_KEY)


@dataclass(frozen=True, slots=True)
class NetworkMetadata:
    """Metadata of a network file.

    Args:
        architecture: canonical name that builds the network.
        stem: the stem it was built with.
        contract: its images and classes.
        extra: the writer's own keys, such as the recipe or the seed.
    """

    architecture: str
    stem: Stem
    contract: ImageContract
    extra: Mapping[str, str] = field(default_factory=dict)


def save_network(
    path: Path,
    module: nn.Module,
    *,
    architecture: str,
    stem: Stem,
    contract: ImageContract,
    extra: Mapping[str, str] | None = None,
) -> None:
    """Writes a network file, whole or not at all; the same weights and metadata give the same bytes.

    Raises:
        DfadcError: ``extra`` uses a key of ours.
        StorageFailed: the file cannot be written.
    """
    extra = extra or {}
    if taken := sorted(set(extra) & set(_RESERVED)):
        raise DfadcError(f"metadata key {taken[0]!r} is reserved")
    metadata = {
        **extra,
        SCHEMA_KEY: SCHEMA,
        ARCHITECTURE_KEY: resolve_architecture(architecture).canonical,
        STEM_KEY: stem,
        CONTRACT_KEY: contract.to_json(),
    }
    atomic_write_bytes(path, serialise(_unwrapped(module).state_dict(), metadata))


def load_network(path: Path, *, factories: Collection[str] = ()) -> tuple[nn.Module, NetworkMetadata]:
    """Reads a network file: the network on the CPU in eval mode, its parameters trainable, and its metadata.

    Args:
        path: the file.
        factories: each ``module:factory`` that the caller allows; a file may not choose code to import.

    Raises:
        DfadcError: the file is missing, damaged or no network file, its weights do not fit its architecture, or that
            is a factory that the caller does not allow.
    """
    metadata = read_network_metadata(path)
    refuse_factory_from_file(metadata.architecture, path, allowed=factories, flag="--factory")
    built = build_architecture(metadata.architecture, metadata.contract, stem=metadata.stem)
    load_strictly_(built.module, read_safetensors(path), architecture=built.name, source=str(path))
    if resolve_architecture(built.name).library == "factory":
        images = random_images(metadata.contract)
        return adapt(built.module.eval(), images, built.name, learns=False).module, metadata
    return built.module.eval(), metadata


def read_network_metadata(path: Path) -> NetworkMetadata:
    """The metadata of a network file; the weights are not read.

    Raises:
        DfadcError: the file is missing, damaged or no network file, or its schema is newer than this version.
    """
    metadata = read_safetensors_metadata(path)
    missing = [key for key in _RESERVED if key not in metadata]
    if missing:
        raise DfadcError(f"{path} is no dfadc network file: its metadata lacks {', '.join(missing)}")
    if metadata[SCHEMA_KEY] != SCHEMA:
        raise DfadcError(f"{path} has schema {metadata[SCHEMA_KEY]!r}, this version reads {SCHEMA!r}", "update dfadc")
    return NetworkMetadata(
        architecture=metadata[ARCHITECTURE_KEY],
        stem=parse_stem(metadata[STEM_KEY], path),
        contract=ImageContract.from_dict(parse_contract_json(metadata[CONTRACT_KEY], path)),
        extra={key: value for key, value in metadata.items() if key not in _RESERVED},
    )


def parse_contract_json(text: str, path: Path) -> dict[str, Any]:
    """The JSON object under the contract key.

    Raises:
        DfadcError: it is no JSON object.
    """
    try:
        values = json.loads(text)
    except ValueError as exc:
        raise DfadcError(f"{path}: the contract in its metadata is not JSON: {exc}") from exc
    if not isinstance(values, dict):
        raise DfadcError(f"{path}: the contract in its metadata is not a JSON object")
    return values


def refuse_factory_from_file(
    architecture: str, path: Path, *, allowed: Collection[str] = (), flag: str = "--teacher-arch"
) -> None:
    """Refuses to import code that a file chose.

    Args:
        architecture: as the file names it.
        path: of the file.
        allowed: factories that the user named, with their arguments or without.
        flag: of the command line that names one.

    Raises:
        DfadcError: the architecture is a ``module:factory`` that the user did not name.
    """
    library, colon, _ = architecture.partition(":")
    is_allowed = architecture in allowed or split_arguments(architecture)[0] in allowed
    if colon and library not in ("torchvision", "timm", "smp") and not is_allowed:
        raise DfadcError(
            f"{path} names {architecture!r} as its architecture, which would import code",
            f"if you trust that code, name it yourself: {flag} {architecture}",
        )


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, on the CPU.

    Raises:
        DfadcError: the file is missing or damaged.
    """
    with _reading(path):
        return safetensors.torch.load_file(path)


def read_safetensors_metadata(path: Path) -> dict[str, str]:
    """The free-text metadata of a safetensors file; empty where there is none.

    Raises:
        DfadcError: the file is missing or damaged.
    """
    with _reading(path), safetensors.safe_open(path, framework="pt") as file:
        return dict(file.metadata() or {})


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, safetensors.SafetensorError) as exc:
        raise DfadcError(
            f"cannot read {path} as safetensors: {exc}", "the file is missing, cut off or damaged"
        ) from exc


def serialise(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """Safetensors bytes that depend on nothing but the content: the header's keys come in a fixed order.

    The library writes its metadata from a hash map, whose order changes from run to run.
    """
    # Clones untie shared weights, which the format refuses; a tied network ties them again when it is built.
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    data = safetensors.torch.save(plain)
    length = int.from_bytes(data[:8], "little")
    layout = json.loads(data[8 : 8 + length])
    layout.pop("__metadata__", None)
    header = {"__metadata__": dict(sorted(metadata.items())), **dict(sorted(layout.items()))}
    encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    encoded += b" " * (-len(encoded) % 8)
    return len(encoded).to_bytes(8, "little") + encoded + data[8 + length :]


def _unwrapped(module: nn.Module) -> nn.Module:
    """The module inside a compiled or data-parallel wrapper, or one of ours."""
    module = unwrap(module)
    for attribute in ("_orig_mod", "module"):
        inner = getattr(module, attribute, None)
        if isinstance(inner, nn.Module) and len(list(module.children())) == 1:
            return _unwrapped(inner)
    return module
