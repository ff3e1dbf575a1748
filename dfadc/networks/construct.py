"""Constructing a network of one library for a contract: our own, torchvision, timm, smp, or the user's factory."""

from __future__ import annotations

import functools
import importlib
from typing import TYPE_CHECKING, Any

import torch
import torchvision
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torchvision.models import get_model, list_models

from dfadc.errors import DfadcError, RequirementMissing
from dfadc.networks.factory import load_factory
from dfadc.networks.zoo import find_network

if TYPE_CHECKING:
    from collections.abc import Callable

    from dfadc.contract import ImageContract
    from dfadc.networks.architecture_name import ArchitectureName


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


class SkipInitialisation(TorchFunctionMode):
    """Leaves new parameters as they are in memory, for a network whose every weight is loaded next.

    Drawing the weights of a ViT-B/16 takes 3 s on a busy 2-core x86-64 machine, loading them 0.1 s.
    """

    _FILLERS = frozenset(
        {"normal_", "uniform_", "erfinv_", "mul_", "add_", "clamp_", "kaiming_uniform_", "kaiming_normal_"}
    )

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        target = args[0] if args else (kwargs or {}).get("tensor")
        if isinstance(target, nn.Parameter) and func.__name__ in self._FILLERS:
            return target
        return func(*args, **(kwargs or {}))


def construct(resolved: ArchitectureName, contract: ImageContract) -> nn.Module:
    """Builds a network with random weights, as its library makes it.

    Raises:
        DfadcError: it cannot be built for this contract.
    """
    if resolved.library == "factory":
        return load_factory(resolved.name).build(contract, dict(resolved.arguments))
    try:
        if resolved.library == "own":
            if resolved.arguments:
                raise TypeError(f"it takes no argument {resolved.arguments[0][0]!r}")
            network = find_network(resolved.name)
            assert network is not None, "resolve_architecture has found it"  # noqa: S101
            return network(contract)
        if resolved.library == "torchvision":
            return _construct_torchvision(resolved.name, contract, dict(resolved.arguments))
        if resolved.library == "timm":
            return _construct_timm(resolved.name, contract, dict(resolved.arguments))
        return _construct_smp(resolved.name, contract)
    except (AssertionError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError) as exc:
        size = "x".join(map(str, contract.input_size))
        raise DfadcError(
            f"{resolved.canonical} cannot be built for input size {size}: {exc}",
            "choose another network or another --input-size; `dfadc students` lists what fits",
        ) from exc


def _construct_torchvision(name: str, contract: ImageContract, arguments: dict[str, object]) -> nn.Module:
    height, width = contract.input_size[1:]
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
    module: nn.Module = get_model(name, **settings | arguments)
    return module


def _construct_timm(name: str, contract: ImageContract, arguments: dict[str, object]) -> nn.Module:
    timm = import_timm()
    documented = timm.get_pretrained_cfg(name, allow_unregistered=True)
    settings: dict[str, Any] = {"num_classes": contract.num_classes, "in_chans": contract.channels}
    if documented is not None and documented.fixed_input_size:
        settings["img_size"] = contract.input_size[1:]
    module: nn.Module = timm.create_model(name, pretrained=False, **settings | arguments)
    return module


def _construct_smp(name: str, contract: ImageContract) -> nn.Module:
    """``Unet:resnet18``: a segmentation network and its encoder, without the encoder's pretrained weights."""
    decoder, _, encoder = name.partition(":")
    images = {"in_channels": contract.channels, "classes": contract.num_classes}
    module: nn.Module = import_smp().create_model(decoder, encoder_name=encoder, encoder_weights=None, **images)
    return module


def import_extra(package: str, extra: str, problem: str = "") -> Any:
    """A package that an extra installs.

    Args:
        package: its name for ``import``.
        extra: as in ``dfadc[extra]``.
        problem: the error's message; by default that the package is not installed.

    Raises:
        RequirementMissing: it is not installed.
    """
    try:
        return importlib.import_module(package)
    except ImportError as exc:
        missing = f"{package.replace('_', '-')} is not installed"
        raise RequirementMissing(problem or missing, f"pip install 'dfadc[{extra}]'") from exc


def import_timm() -> Any:
    """The timm package; RequirementMissing where it is not installed."""
    return import_extra("timm", "timm")


def import_smp() -> Any:
    """The segmentation-models-pytorch package; RequirementMissing where it is not installed."""
    return import_extra("segmentation_models_pytorch", "smp")
