"""Reader of Keras files (.keras and .h5), loaded by Keras 3 on its torch backend."""

from __future__ import annotations

import json
import os
import sys
import warnings
import zipfile
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dfadc.errors import DfadcError
from dfadc.networks.construct import import_extra
from dfadc.networks.logits import list_outputs
from dfadc.networks.user_code import running_user_code
from dfadc.teacher.exported_norms import ExportedBatchNorm
from dfadc.teacher.file_kind import FileKind
from dfadc.teacher.teacher_file import DAMAGED, TeacherFile
from dfadc.teacher.training_arguments import TrainingArguments

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_BACKEND = "KERAS_BACKEND"
#: Layers that hold code or pickles of their own.
_CODE_LAYERS = ("Lambda", "TorchModuleWrapper", "JaxLayer", "FlaxLayer", "TFSMLayer")
_HEADS = ("softmax", "log_softmax", "sigmoid")
#: Layers at the beginning among which the preprocessing is looked for.
_FIRST_LAYERS = 4
#: Largest difference that restored batch norms may make, as a share of the outputs' range.
_TOLERANCE = 1e-4
_THROUGH_ONNX = "export it where its code is: model.export('teacher.onnx', format='onnx')"


class KerasNetwork(nn.Module):
    """A Keras network that takes images as torch's networks do.

    Args:
        network: the loaded Keras model.
        is_channels_last: whether it takes (N, H, W, C).
    """

    def __init__(self, network: Any, *, is_channels_last: bool) -> None:
        super().__init__()
        self.network = network
        self.is_channels_last = is_channels_last
        self.norms = nn.ModuleList()

    # Keras looks up its state by name in every call: dynamo would compile it piece by piece.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, images: Tensor) -> Any:
        """Images (N, C, H, W) -> logits (N, K), or several outputs."""
        import keras  # noqa: PLC0415 -- an extra

        if self.is_channels_last:
            images = images.permute(0, 2, 3, 1)
        # Keras moves every tensor to its own current device, which is the GPU where there is one.
        with keras.device(str(images.device)):
            return self.network(images, training=False)


def read_keras(path: Path, *, trust: bool) -> TeacherFile:
    """Reads a Keras file with its architecture.

    Args:
        path: of an archive (.keras) or an HDF5 file (.h5).
        trust: whether code in the file may run (``--trust-teacher``).

    Raises:
        RequirementMissing: Keras is not installed.
        DfadcError: the file holds weights alone, code that is not trusted, custom objects, or no image network.
    """
    keras = _import_keras(path)
    if not trust and (code := sorted(set(_code_in(_read_config(path))))):
        raise DfadcError(
            f"{path} holds code: {', '.join(code[:5])}",
            f"if you trust the file, pass --trust-teacher; or {_THROUGH_ONNX}",
        )
    problem, remedy = f"Keras cannot load {path}", f"where it needs custom objects, {_THROUGH_ONNX}"
    with running_user_code(problem, remedy), warnings.catch_warnings(), keras.device("cpu"):
        warnings.simplefilter("ignore")  # Keras 3.15 calls NumPy 2 as NumPy 1 was called
        network = keras.models.load_model(path, compile=False, safe_mode=not trust)
    channels, side, is_channels_last = _image_axes(network, path)
    module = KerasNetwork(network, is_channels_last=is_channels_last)
    notes = [f"loaded by Keras {keras.__version__} on torch; its images {'NHWC' if is_channels_last else 'NCHW'}"]
    head = _cut_head(keras, network) if len(network.outputs) == 1 else ""
    if head:
        notes.append(f"the last {head} was taken off: the outputs before it are the logits")
    _restore_norms_(module, torch.rand(2, channels, *(side or (64, 64))), path)
    spread = _pixel_range(network)
    if spread is not None:
        notes.append(f"its preprocessing is part of it: it takes pixels of 0..{spread:.0f}")
    values = {"mean": (0.0,) * channels, "std": (1 / (spread or 1),) * channels}
    return TeacherFile(
        path,
        FileKind.KERAS,
        module=module,
        input_size=None if side is None else (channels, *side),
        channels=channels,
        notes=tuple(notes),
        cut_head=head,
        arguments=None if spread is None else TrainingArguments("preprocessing layers of the network", values),
    )


def _import_keras(path: Path) -> Any:
    """Keras on its torch backend."""
    if "keras" not in sys.modules:
        os.environ[_BACKEND] = "torch"
    problem = f"{path} is a Keras file, and Keras, which loads it, is not installed"
    import_extra("h5py", "keras", problem)
    keras = import_extra("keras", "keras", problem)
    if keras.backend.backend() != "torch":
        raise DfadcError(
            f"Keras runs on {keras.backend.backend()} in this process, not on torch", f"set {_BACKEND}=torch before it"
        )
    return keras


def _read_config(path: Path) -> Any:
    """The architecture as JSON values."""
    import h5py  # noqa: PLC0415 -- an extra

    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                return json.loads(archive.read("config.json"))
        with h5py.File(path) as file:
            config = file.attrs.get("model_config")
    except (KeyError, OSError, RuntimeError, ValueError, zipfile.BadZipFile) as exc:
        raise DfadcError(f"cannot read {path}: {exc}", DAMAGED) from exc
    if config is None:
        raise DfadcError(
            f"{path} is an HDF5 file without a Keras architecture (weights alone?)",
            "save the whole network: model.save('teacher.keras')",
        )
    return json.loads(config)


def _code_in(config: Any) -> Iterator[str]:
    """Layers that hold code, and classes of modules other than Keras's own."""
    if isinstance(config, dict):
        name, module = config.get("class_name"), config.get("module")
        if name in _CODE_LAYERS:
            yield f"layer {name}"
        if isinstance(module, str) and module.partition(".")[0] not in ("keras", "builtins"):
            yield f"{module}.{name}"
        config = list(config.values())
    for entry in config if isinstance(config, list) else ():
        yield from _code_in(entry)


def _image_axes(network: Any, path: Path) -> tuple[int, tuple[int, int] | None, bool]:
    """Channels, (H, W) where they are fixed, and whether the channels are the last axis."""
    inputs, outputs = getattr(network, "inputs", None) or [], getattr(network, "outputs", None) or []
    if len(inputs) != 1 or not outputs:
        raise DfadcError(
            f"{path} has {len(inputs)} inputs and {len(outputs)} outputs; a teacher takes one batch of images",
            "save the part from the images to the logits: keras.Model(images, logits).save('teacher.keras')",
        )
    shape = list(inputs[0].shape)[1:]
    if len(shape) != 3 or (shape[0] is None and shape[2] is None):
        raise DfadcError(
            f"{path} takes inputs of shape {tuple(shape)}, not images with channels", "give an image network"
        )
    is_channels_last = shape[2] is not None and (shape[0] is None or shape[2] < shape[0])
    channels, *side = (shape[2], *shape[:2]) if is_channels_last else shape
    return channels, None if None in side else (side[0], side[1]), is_channels_last


def _cut_head(keras: Any, network: Any) -> str:
    """Makes a last softmax or sigmoid linear, in place; its name, or nothing where there is none."""
    last = network
    while getattr(last, "outputs", None):
        last = last.outputs[0]._keras_history.operation  # noqa: SLF001 -- there is no other way
    if isinstance(last, keras.layers.Softmax):
        vars(last)["call"] = lambda inputs, mask=None: inputs  # noqa: ARG005 -- Keras calls it so
        return "Softmax"
    name = getattr(getattr(last, "activation", None), "__name__", "")
    if name not in _HEADS:
        return ""
    last.activation = keras.activations.linear
    return name


def _layers_of(network: Any) -> Iterator[Any]:
    """All layers in their order, those of inner networks included."""
    for layer in network.layers:
        yield from _layers_of(layer) if hasattr(layer, "layers") else (layer,)


def _restore_norms_(module: KerasNetwork, images: Tensor, path: Path) -> None:
    """Computes batch norms by layers of torch, in place, so that they can be found and watched."""
    with running_user_code(f"{path} cannot take its images", "check --input-size"), torch.no_grad():
        before = list_outputs(module(images))
        for layer in _layers_of(module.network):
            if type(layer).__name__ == "BatchNormalization":
                # Keras keeps each tensor under ``value``; scale and shift are missing where they are switched off.
                names = {"weight": layer.gamma, "bias": layer.beta}
                tensors = {name: None if each is None else each.value for name, each in names.items()}
                statistics = {"running_mean": layer.moving_mean, "running_var": layer.moving_variance}
                tensors |= {name: each.value.detach().clone() for name, each in statistics.items()}
                norm = ExportedBatchNorm(tensors, layer.epsilon)
                module.norms.append(norm)
                vars(layer)["call"] = _NormCall(norm, layer.axis)
        after = list_outputs(module(images))
    spans = {key: float(each.max() - each.min()) or 1.0 for key, each in before.items()}
    difference = max(float((after[key] - each).abs().max()) / spans[key] for key, each in before.items())
    if not difference <= _TOLERANCE:
        raise DfadcError(
            f"{path} gives other outputs with torch's batch norms ({difference:.1e} of their range)", _THROUGH_ONNX
        )


class _NormCall:
    """Forward of a Keras batch norm by a torch layer, which takes the channels as axis 1."""

    def __init__(self, norm: nn.Module, axis: int) -> None:
        self.norm = norm
        self.axis = axis

    def __call__(self, inputs: Tensor, training: Any = None, mask: Any = None) -> Tensor:  # noqa: ARG002 -- Keras's
        normalised: Tensor = self.norm(inputs.movedim(self.axis, 1))
        return normalised.movedim(1, self.axis)


def _pixel_range(network: Any) -> float | None:
    """255 or 1 where preprocessing layers at the beginning tell the range of the images; None where there are none."""
    for layer in list(_layers_of(network))[:_FIRST_LAYERS]:
        kind = type(layer).__name__
        if kind in ("Rescaling", "Normalization"):
            largest = float(torch.as_tensor(layer.scale if kind == "Rescaling" else layer.mean).abs().max())
            return 255.0 if (largest < 0.1 if kind == "Rescaling" else largest > 2) else 1.0
    return None
