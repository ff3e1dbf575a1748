"""Constructing a network of one library for a contract: our own, torchvision, timm, smp, or the user's factory."""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import torchvision
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode
from torchvision.models import get_model, list_models

from dfadc.errors import DfadcError, RequirementMissing
from dfadc.networks.flops import in_eval_mode
from dfadc.networks.user_code import guard_, running_user_code
from dfadc.networks.zoo import find_network

if TYPE_CHECKING:
    from collections.abc import Callable

    from dfadc.contract import ImageContract

Library = Literal["own", "torchvision", "timm", "smp", "factory"]

_NAME_FORMS = (
    "write torchvision:NAME, timm:NAME, smp:NAME:ENCODER, package.module:factory or a name of `dfadc students`"
)


@dataclass(frozen=True, slots=True)
class ArchitectureName:
    """A resolved name: where the network comes from and what it is called there."""

    library: Library
    name: str

    @property
    def canonical(self) -> str:
        """The one spelling that is written to files, e.g. ``torchvision:mobilenet_v2`` or ``lenet5``."""
        return self.name if self.library in ("own", "factory") else f"{self.library}:{self.name}"


@functools.cache
def torchvision_classifiers() -> tuple[str, ...]:
    """Names of torchvision's image classifiers."""
    return tuple(str(name) for name in list_models(module=torchvision.models))


@functools.cache
def torchvision_segmenters() -> tuple[str, ...]:
    """Names of torchvision's semantic segmentation networks."""
    return tuple(str(name) for name in list_models(module=torchvision.models.segmentation))


class WeightsOnMeta(TorchFunctionMode):
    """Puts weights on the meta device and leaves the small tensors that a network computes its widths with.

    Under ``torch.device("meta")`` torchvision's RegNets cannot be built: they read numbers back from a tensor.
    """

    # Filling weights that have no memory only costs time.
    _FILLERS = frozenset({"normal_", "uniform_", "fill_", "zero_", "erfinv_", "mul_", "add_", "clamp_"})
    _CREATORS = (torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if args and isinstance(args[0], Tensor) and args[0].is_meta and func.__name__ in self._FILLERS:
            return args[0]
        if func in self._CREATORS and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def construct(resolved: ArchitectureName, contract: ImageContract) -> nn.Module:
    """Builds a network with random weights, as its library makes it.

    Raises:
        DfadcError: it cannot be built for this contract.
    """
    if resolved.library == "factory":
        return _construct_from_factory(resolved.name, contract)
    try:
        if resolved.library == "own":
            network = find_network(resolved.name)
            assert network is not None, "resolve_architecture has found it"  # noqa: S101
            return network(contract)
        if resolved.library == "torchvision":
            return _construct_torchvision(resolved.name, contract)
        if resolved.library == "timm":
            return _construct_timm(resolved.name, contract)
        return _construct_smp(resolved.name, contract)
    except (AssertionError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError) as exc:
        raise DfadcError(
            f"{resolved.canonical} cannot be built for input size {_size(contract)}: {exc}",
            "choose another network or another --input-size; `dfadc students` lists what fits",
        ) from exc


def _construct_torchvision(name: str, contract: ImageContract) -> nn.Module:
    channels, height, width = contract.input_size
    settings: dict[str, Any] = {"weights": None, "num_classes": contract.num_classes}
    if name in torchvision_segmenters():
        settings["weights_backbone"] = None
    if name in ("googlenet", "inception_v3"):
        settings |= {"aux_logits": False, "init_weights": False}
    if name.startswith("vit_"):
        if height != width:
            raise ValueError("it takes square images only")
        settings["image_size"] = height
    if name.startswith("maxvit"):
        settings["input_size"] = (height, width)
    module = get_model(name, **settings)
    if not isinstance(module, nn.Module):
        raise TypeError(f"torchvision gave a {type(module).__name__} for {channels} channels")
    return module


def _construct_timm(name: str, contract: ImageContract) -> nn.Module:
    timm = import_timm()
    documented = timm.get_pretrained_cfg(name, allow_unregistered=True)
    settings: dict[str, Any] = {"num_classes": contract.num_classes, "in_chans": contract.channels}
    if documented is not None and documented.fixed_input_size:
        settings["img_size"] = contract.input_size[1:]
    module = timm.create_model(name, pretrained=False, **settings)
    if not isinstance(module, nn.Module):
        raise TypeError(f"timm gave a {type(module).__name__}")
    return module


def _construct_smp(name: str, contract: ImageContract) -> nn.Module:
    """``Unet:resnet18``: a segmentation network and its encoder, without the encoder's pretrained weights."""
    decoder, _, encoder = name.partition(":")
    module = import_smp().create_model(
        decoder,
        encoder_name=encoder,
        encoder_weights=None,
        in_channels=contract.channels,
        classes=contract.num_classes,
    )
    if not isinstance(module, nn.Module):
        raise TypeError(f"segmentation-models-pytorch gave a {type(module).__name__}")
    return module


def _construct_from_factory(name: str, contract: ImageContract) -> nn.Module:
    """Calls the user's factory with those of our keywords that its signature has.

    These are ``contract`` alone, or any of ``num_classes``, ``in_channels``/``in_chans``/``channels``, ``input_size``
    and ``image_size``/``img_size`` (the height). A factory that takes none of them is called without arguments.
    """
    factory = import_factory(name)
    offered: dict[str, Any] = {
        "num_classes": contract.num_classes,
        **dict.fromkeys(("in_channels", "in_chans", "channels"), contract.channels),
        "input_size": contract.input_size,
        **dict.fromkeys(("image_size", "img_size"), contract.input_size[1]),
    }
    try:
        parameters = inspect.signature(factory).parameters
    except (TypeError, ValueError) as exc:
        raise DfadcError(f"{name} has no readable signature", "write it as a plain function") from exc
    if "contract" in parameters:
        offered = {"contract": contract}
    accepted = {key: value for key, value in offered.items() if key in parameters}
    with running_user_code(f"{name}({', '.join(accepted)}) failed", "it is called with these keywords"):
        module = factory(**accepted)
    if not isinstance(module, nn.Module):
        raise DfadcError(f"{name} gave a {type(module).__name__}, not a torch.nn.Module")
    _materialise_(module, name, contract)
    return guard_(module, name)


def _materialise_(module: nn.Module, name: str, contract: ImageContract) -> None:
    """Gives lazy layers their weights, which two empty images do, in place.

    Raises:
        DfadcError: a lazy layer sees no image.
    """
    if not _lazy_weights(module):
        return
    problem = f"{name} has lazy layers, and images of size {_size(contract)} cannot initialise them"
    with running_user_code(problem, "check --input-size"), torch.no_grad(), in_eval_mode(module):
        module(torch.zeros(2, *contract.input_size))
    if unused := _lazy_weights(module):
        raise DfadcError(
            f"{name} has a lazy layer that no image passes through: {unused[0]} has no shape",
            "remove that layer, or give it its size",
        )


def _lazy_weights(module: nn.Module) -> list[str]:
    """Names of the parameters and buffers that have no shape yet."""
    named = chain(module.named_parameters(), module.named_buffers())
    return [name for name, tensor in named if is_lazy(tensor)]


def import_factory(name: str) -> Callable[..., object]:
    """Imports ``package.module:factory``; the working directory is on the path, as it is for ``python -m``.

    Raises:
        DfadcError: the module or the factory does not exist.
    """
    module_name, _, attribute = name.partition(":")
    here = str(Path.cwd())
    if here not in sys.path and "" not in sys.path:
        sys.path.append(here)
    with running_user_code(f"cannot import {module_name!r} of architecture {name!r}", _NAME_FORMS):
        found: object = importlib.import_module(module_name)
        for part in attribute.split("."):
            found = getattr(found, part, None)
    if not callable(found):
        raise DfadcError(f"{module_name} has no callable {attribute!r}", _NAME_FORMS)
    return found


def import_timm() -> Any:
    """The timm package.

    Raises:
        RequirementMissing: it is not installed.
    """
    try:
        return importlib.import_module("timm")
    except ImportError as exc:
        raise RequirementMissing("timm is not installed", 'pip install "dfadc[timm]"') from exc


def import_smp() -> Any:
    """The segmentation-models-pytorch package.

    Raises:
        RequirementMissing: it is not installed.
    """
    try:
        return importlib.import_module("segmentation_models_pytorch")
    except ImportError as exc:
        raise RequirementMissing("segmentation-models-pytorch is not installed", 'pip install "dfadc[smp]"') from exc


def _size(contract: ImageContract) -> str:
    return "x".join(map(str, contract.input_size))
