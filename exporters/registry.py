"""Exporters by name, imported when first asked for: this module loads no torch, ONNX or backend."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, cast

from exporters.exporter import FORMATS, unknown_value

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from exporters.exporter import Exporter

#: Export name -> "module:factory".
_FACTORIES: Mapping[str, str] = {
    "onnx": "exporters.to_onnx.exporter:DerivedOnnxExporter",
    "tensorrt": "exporters.to_tensorrt.exporter:full_tensorrt",
    "tensorrt-rtx": "exporters.to_tensorrt.exporter:tensorrt_rtx",
    "openvino": "exporters.to_openvino.exporter:OpenVinoExporter",
}


def exporter_names() -> tuple[str, ...]:
    """Every name that :func:`get_exporter` knows, in the order of the documentation."""
    return tuple(FORMATS)


def get_exporter(name: str) -> Exporter:
    """The exporter called ``name``. It is returned whether or not its backend is installed; ask its ``capability()``.

    Raises:
        DfadcError: there is no such exporter; the nearest names are offered.
    """
    if name not in _FACTORIES:
        raise unknown_value("export", name, _FACTORIES)
    module_name, _, factory_name = _FACTORIES[name].partition(":")
    factory = cast("Callable[[], Exporter]", getattr(import_module(module_name), factory_name))
    return factory()
